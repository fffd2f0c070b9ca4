"""Prepares any text of yours for training, as GPT-2 tokens or as bytes.

    python data/text/prepare.py --input=books/ --out_dir=data/books
    python data/text/prepare.py --input=notes.txt --tokenizer=bytes --out_dir=data/notes

--input takes txt files (one document each), parquet and jsonl with a column `text`, folders and
globs. Every 1/val_fraction-th document goes to the validation split; a single document is cut in
two.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from nanosophia.configurator import command, load, option  # noqa: E402
from nanosophia.corpus import PrepareSettings, prepare  # noqa: E402
from nanosophia.documents import CorpusError, Documents, local_documents  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class TextSettings(PrepareSettings):
    """The settings of this script."""

    input: str = option("", "your files: a comma-separated list of files, folders and globs")
    tokenizer: Literal["gpt2", "bytes"] = option("gpt2", "GPT-2's byte-pair encoding, or bytes")
    val_fraction: float = option(0.05, "share of the documents for validation", above=0, below=1)


def text_documents(pattern: str, val_fraction: float) -> Documents:
    """Returns the files' documents, every 1/val_fraction-th for validation; one is cut in two."""
    every = max(2, round(1 / val_fraction))

    def split(count: int):
        every_ = min(every, count)
        return lambda row: "val" if row % every_ == every_ - 1 else "train"

    documents = local_documents(pattern, split)
    if documents.count != 1:
        return documents

    def read(start: int) -> Iterator[tuple[str, str]]:
        (_, text), = documents.read(0)
        cut = _cut(text, val_fraction)
        yield from [("train", text[:cut]), ("val", text[cut:])][start:]

    return replace(documents, count=2, read=read)


def _cut(text: str, val_fraction: float) -> int:
    """Returns where the validation part of a single document begins.

    That is after a line break or else a space, if one lies so near before the exact place that the
    part grows by less than half. Raises CorpusError when the text cannot be cut in two.
    """
    if len(text) < 2:
        raise CorpusError(f"--input is one document of {len(text)} characters, too short for a "
                          "training and a validation part; give more text")
    exact = min(max(int(len(text) * (1 - val_fraction)), 1), len(text) - 1)
    earliest = max(0, exact - (len(text) - exact) // 2)
    for separator in ("\n", " "):
        found = text.rfind(separator, earliest, exact)
        if found > 0:
            return found + 1
    return exact


@command()
def main(argv: list[str]) -> None:
    """Prepares the corpus; exits with 2 and one line when that fails."""
    settings, _ = load(TextSettings, argv,
                            "python data/text/prepare.py --input=FILES [--key=value]")
    meta = prepare(settings, HERE, lambda: text_documents(settings.input, settings.val_fraction),
                   settings.tokenizer)
    if meta:
        print(f"next: python train.py config/train_gpt2_30m_sophiag.py "
              f"--dataset={settings.out_dir or 'text'}")


if __name__ == "__main__":
    main(sys.argv[1:])
