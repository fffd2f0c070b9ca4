"""Prepares the embedded default corpus: the running Python's own standard library.

    python data/stdlib/prepare.py

Source and documentation files, split by file, as bytes: nothing is downloaded. Writes train.bin,
val.bin and meta.json beside this script, or into --out_dir. The text depends on the Python version,
so compare losses of runs on one and the same folder.
"""

import hashlib
import platform
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

from nanosophia.command import command  # noqa: E402
from nanosophia.configurator import load  # noqa: E402
from nanosophia.corpus import PrepareSettings, prepare  # noqa: E402
from nanosophia.documents import CorpusError, Documents  # noqa: E402

VAL_PER_MILLE = 50
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SUFFIXES = {".py", ".txt", ".rst"}


def stdlib_documents() -> Documents:
    """Returns the library's source and documentation, without tests and installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts = [(path, text) for path in sorted(root.rglob("*")) if _belongs(path.relative_to(root))
             and (text := _read(path)) is not None]
    if not texts:
        raise CorpusError(f"{root} holds no source files (a zipped library?); use another Python")

    def read(start: int) -> Iterator[tuple[str, str]]:
        for path, text in texts[start:]:  # a file's path decides its split
            digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
            bucket = int.from_bytes(digest[:4], "big") % 1000
            yield ("val" if bucket < VAL_PER_MILLE else "train"), text

    name = f"Python {platform.python_version()} standard library"
    digest = hashlib.sha256(repr(texts).encode()).hexdigest()
    return Documents(name, digest, len(texts), read)


def _belongs(path: Path) -> bool:
    return path.suffix in SUFFIXES and not LEFT_OUT & set(path.parts)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError):  # a few inputs of tests are not UTF-8 on purpose
        return None


@command()
def main(argv: list[str]) -> None:
    """Prepares the corpus; exits with 2 and one line when that fails."""
    settings, _ = load(PrepareSettings, argv, "python data/stdlib/prepare.py [--key=value]")
    if prepare(settings, HERE, stdlib_documents, "bytes"):
        print(f"next: python train.py config/quickstart.py{settings.next_flags()}")


if __name__ == "__main__":
    main(sys.argv[1:])
