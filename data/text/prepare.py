"""Prepares any text of yours for training, as GPT-2 tokens or as bytes.

    python data/text/prepare.py --input=books/ --out_dir=data/books
    python data/text/prepare.py --input=notes.txt --tokenizer=bytes --out_dir=data/notes

--input takes txt files (one document each), parquet and jsonl with a column --column, folders and
globs. A share of the documents, evenly spaced, is for validation; a single document is cut in two,
at a token.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

from nanosophia.command import command  # noqa: E402
from nanosophia.configurator import load, option  # noqa: E402
from nanosophia.corpus import ColumnSettings, prepare  # noqa: E402
from nanosophia.documents import TEXT, Column, Documents, local_documents  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class TextSettings(ColumnSettings):
    """The settings of this script."""

    input: str = option("", "your files: a comma-separated list of files, folders and globs")
    tokenizer: Literal["gpt2", "bytes"] = option("gpt2", "GPT-2's byte-pair encoding, or bytes")
    val_fraction: float = option(0.05, "share of the documents for validation; of a single one, of "
                                       "its tokens", low=0.0001, high=0.5)


def text_documents(pattern: str, val_fraction: float,
                   column: Column = TEXT) -> Documents:
    """Returns the files' documents, a share of them, evenly spaced, for validation.

    Of a single document the last tokens are for validation.
    """
    share = Fraction(val_fraction).limit_denominator(10_000)

    def split(count: int) -> Callable[[int], str]:
        n, d = max(share, Fraction(1, max(count, 1))).as_integer_ratio()  # at least one
        return lambda row: "val" if (row + 1) * n // d > row * n // d else "train"

    documents = local_documents(pattern, split, column)
    return replace(documents, val_share=val_fraction) if documents.count == 1 else documents


@command()
def main(argv: list[str]) -> None:
    """Prepares the corpus; exits with 2 and one line when that fails."""
    settings, _ = load(TextSettings, argv,
                            "python data/text/prepare.py --input=FILES [--key=value]")
    meta = prepare(settings, HERE, lambda: text_documents(
        settings.input, settings.val_fraction, settings.text_column), settings.tokenizer)
    if meta:
        print("next: python train.py config/train_gpt2_30m_sophiag.py"
              f"{settings.next_flags() or ' --dataset=text'}")


if __name__ == "__main__":
    main(sys.argv[1:])
