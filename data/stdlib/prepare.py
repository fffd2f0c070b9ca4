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
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import ConfigError, Settings, exit_with, knob, load  # noqa: E402
from corpus import CorpusError, report, write_corpus  # noqa: E402

VAL_PER_MILLE = 50
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
SUFFIXES = {".py", ".txt", ".rst"}


@dataclass(frozen=True, kw_only=True)
class StdlibSettings(Settings):
    """The settings of this script."""

    out_dir: str = knob(str(HERE), "where train.bin, val.bin and meta.json go")
    num_proc: int = knob(1, "tokenising processes", low=1)


def stdlib_files(root: Path) -> list[Path]:
    """The library's source and documentation files, without tests and installed packages."""
    return sorted(path for path in root.rglob("*") if path.suffix in SUFFIXES
                  and path.is_file() and not LEFT_OUT & set(path.relative_to(root).parts))


def documents(root: Path, files: list[Path]) -> Iterator[tuple[str, str]]:
    """(split, text) of every readable file; a file's path decides its split."""
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):  # a few test inputs are not UTF-8 on purpose
            continue
        digest = hashlib.sha256(path.relative_to(root).as_posix().encode()).digest()
        yield ("val" if int.from_bytes(digest[:4]) % 1000 < VAL_PER_MILLE else "train"), text


def main(argv: list[str]) -> None:
    """Prepares the corpus; exits with 2 and one line when it cannot."""
    try:
        settings, _ = load(StdlibSettings, argv, "python data/stdlib/prepare.py [--key=value]")
        root = Path(sysconfig.get_paths()["stdlib"])
        files = stdlib_files(root)
        if not files:
            raise CorpusError(f"{root} holds no source files (a zipped library?); use another "
                              "Python")
        out_dir = Path(settings.out_dir)
        meta = write_corpus(documents(root, files), out_dir, "bytes", total=len(files),
                            source=f"Python {platform.python_version()} standard library",
                            num_proc=settings.num_proc)
        report(meta, out_dir)
        print("next: python train.py config/quickstart.py")
    except (ConfigError, CorpusError) as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv[1:])
