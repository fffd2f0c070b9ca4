"""Prepares FineWeb-Edu, or another data set of the Hugging Face hub, as GPT-2 tokens.

    python data/fineweb/prepare.py --num_proc=8
    python data/fineweb/prepare.py --hub=HuggingFaceFW/fineweb --subset=sample-10BT --streaming

The sample of 10 billion tokens has 9.7 million documents. --split takes a part of a split, as
"train[:10%]", where it is not streamed. A share of the documents, evenly spaced, is for validation.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

from nanosophia.command import command  # noqa: E402
from nanosophia.configurator import load, option  # noqa: E402
from nanosophia.corpus import ColumnSettings, prepare  # noqa: E402
from nanosophia.documents import hub_documents  # noqa: E402
from nanosophia.tokenizer import get_tokenizer  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class FineWebSettings(ColumnSettings):
    """The settings of this script."""

    hub: str = option("HuggingFaceFW/fineweb-edu", "data set of the hub, or a local folder like "
                                                   "one")
    subset: str = option("sample-10BT", "its configuration; - = the data set has one alone")
    split: str = option("train", "its split, or a part of it")
    val_fraction: float = option(0.0005, "share of the documents for validation", low=0.00001,
                                 high=0.5)
    streaming: bool = option(False, "read the hub without keeping a copy on the disk")


def evenly_spaced(share: float) -> Callable[[int], Callable[[int], str]]:
    """Returns, of a number of documents, the function from a document's number to its split."""
    n, d = Fraction(share).limit_denominator(1_000_000).as_integer_ratio()

    def split(count: int) -> Callable[[int], str]:
        return lambda row: "val" if (row + 1) * n // d > row * n // d else "train"

    return split


@command()
def main(argv: list[str]) -> None:
    """Prepares the corpus; exits with 2 and one line when that fails."""
    settings, _ = load(FineWebSettings, argv, "python data/fineweb/prepare.py [--key=value]")

    def documents():
        get_tokenizer("gpt2")  # a missing one fails before a long download
        return hub_documents(settings.hub, settings.split, evenly_spaced(settings.val_fraction),
                             subset="" if settings.subset == "-" else settings.subset,
                             streaming=settings.streaming, column=settings.text_column)

    if prepare(settings, HERE, documents, "gpt2"):
        print("next: python train.py config/train_gpt2_30m_sophiag.py"
              f"{settings.next_flags() or ' --dataset=fineweb'}")


if __name__ == "__main__":
    main(sys.argv[1:])
