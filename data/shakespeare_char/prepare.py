"""Prepares Shakespeare as characters, as nanoGPT's data/shakespeare_char does.

    python data/shakespeare_char/prepare.py
    python data/shakespeare_char/prepare.py --input=FILE.txt --out_dir=data/mine

Fetches a file of 1.1 MB, whose checksum is checked, or takes any text as --input. Writes train.bin
(the first 90 %), val.bin and meta.pkl, which nanoGPT reads too: the same bytes as its own script
writes.
"""

import hashlib
import shlex
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

from nanosophia.characters import CHARACTERS, write_characters  # noqa: E402
from nanosophia.command import command  # noqa: E402
from nanosophia.configurator import Settings, UserError, load, option  # noqa: E402
from nanosophia.files import read_bytes, reason, write_bytes  # noqa: E402

ADDRESS = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/"
           "input.txt")
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
TRAIN_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class ShakespeareSettings(Settings):
    """The settings of this script."""

    input: str = option("", "a text of yours, UTF-8; empty = fetch Shakespeare")
    out_dir: str = option("", "folder for train.bin, val.bin, meta.pkl; empty = beside the script")


def fetch() -> bytes:
    """Returns the published file; raises UserError."""
    try:
        with urllib.request.urlopen(ADDRESS, timeout=20) as answer:
            content = answer.read(1 << 24)
    except OSError as error:
        raise UserError(f"{ADDRESS} could not be fetched ({error}); fetch it elsewhere and give it "
                        "as --input=FILE") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{ADDRESS} gave another file than the published one (its sha256 is not "
                        f"{SHA256}); give a file as --input=FILE")
    return content


def read_text(settings: ShakespeareSettings) -> str:
    """Returns the text, with line ends as nanoGPT reads them; raises UserError."""
    try:
        content = read_bytes(Path(settings.input)) if settings.input else fetch()
        text = content.decode()
    except UnicodeError:
        raise UserError(f"{settings.input} is not UTF-8; convert it") from None
    except OSError as error:
        raise UserError(f"{settings.input} cannot be read: {reason(error)}; give a text file") \
            from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def write_folder(text: str, folder: Path) -> tuple[str, int, int]:
    """Writes the three files; returns the characters and the lengths of the splits.

    Raises UserError where the text is no text to train on, or the disk refuses.
    """
    characters = sorted(set(text))
    if len(text) < 20 or len(characters) >= 1 << 16:
        raise UserError(f"the text has {len(text):,} characters, {len(characters):,} different "
                        "ones; give a longer one, of fewer than 65,536")
    if (folder / "meta.json").exists() or (folder / "progress.json").exists():
        raise UserError(f"{folder} holds data of another preparation; give another --out_dir")
    cut = int(len(text) * TRAIN_SHARE)
    code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    ids = np.searchsorted([ord(c) for c in characters], code_points).astype(np.uint16)
    try:
        (folder / CHARACTERS).unlink(missing_ok=True)  # it describes the old files
        for name, part in (("train.bin", ids[:cut]), ("val.bin", ids[cut:])):
            write_bytes(folder / name, part.tobytes())
        write_characters(folder / CHARACTERS, characters)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {reason(error)}; mend that, or give another "
                        "--out_dir") from None
    return "".join(characters), cut, len(text) - cut


@command()
def main(argv: list[str]) -> None:
    """Prepares the folder; exits with 2 and one line when that fails."""
    settings, _ = load(ShakespeareSettings, argv,
                       "python data/shakespeare_char/prepare.py [--key=value]")
    folder = Path(settings.out_dir) if settings.out_dir else HERE
    characters, train, val = write_folder(read_text(settings), folder)
    print(f"{folder}: {train:,} characters to train on, {val:,} to validate, {len(characters)} "
          f"different ones: {characters!r}")
    dataset = f" --dataset={shlex.quote(str(folder))}" if settings.out_dir else ""
    print(f"next: python train.py config/shakespeare.py{dataset}")


if __name__ == "__main__":
    main(sys.argv[1:])
