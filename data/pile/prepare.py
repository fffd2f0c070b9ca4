"""Prepares the Pile (or jsonl.zst shards like it) with the GPT-NeoX tokenizer.

    python data/pile/prepare.py --train='pile/train/*.jsonl.zst' --val=pile/val.jsonl.zst
    python data/pile/prepare.py --hub=NAME --streaming

The corpus's own training and validation splits are kept. The tokenizer is a tokenizer.json, given
by path, or the hub's EleutherAI/gpt-neox-20b by name; a copy goes beside the data.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

from nanosophia.command import command  # noqa: E402
from nanosophia.configurator import load, option  # noqa: E402
from nanosophia.corpus import ColumnSettings, prepare  # noqa: E402
from nanosophia.documents import CorpusError, Documents, hub_documents, local_documents  # noqa: E402
from nanosophia.tokenizer import get_tokenizer  # noqa: E402


@dataclass(frozen=True, kw_only=True)
class PileSettings(ColumnSettings):
    """The settings of this script."""

    train: str = option("", "local training files: a comma-separated list of files, folders, globs")
    val: str = option("", "local validation files, likewise")
    hub: str = option("", "instead of files: data set of the hub, or a local folder like one")
    hub_val_split: str = option("validation", "with hub, the name of its validation split")
    streaming: bool = option(False, "read the hub without keeping a copy on the disk")
    tokenizer: str = option("EleutherAI/gpt-neox-20b", "path of a tokenizer.json, or a hub name")


def pile_documents(settings: PileSettings) -> Documents:
    """Returns validation documents, then training documents, each with its split's name."""
    if settings.hub:
        get_tokenizer(settings.tokenizer)  # a missing one fails before a long download
        parts = [hub_documents(settings.hub, hub_split, _all(split), streaming=settings.streaming,
                               column=settings.text_column)
                 for split, hub_split in (("val", settings.hub_val_split), ("train", "train"))]
    elif settings.train and settings.val:
        parts = [local_documents(settings.val, _all("val"), settings.text_column),
                 local_documents(settings.train, _all("train"), settings.text_column)]
    else:
        raise CorpusError("give --train=FILES and --val=FILES, or --hub=NAME")
    first, second = parts

    def read(start: int) -> Iterator[tuple[str, str | None]]:
        if start < first.count:
            yield from first.read(start)
        yield from second.read(max(0, start - first.count))

    return Documents(second.name, first.identity + second.identity, first.count + second.count,
                     read)


def _all(split: str):
    return lambda count: lambda row: split


@command()
def main(argv: list[str]) -> None:
    """Prepares the corpus; exits with 2 and one line when that fails."""
    settings, _ = load(PileSettings, argv, "python data/pile/prepare.py [--key=value]")
    if prepare(settings, HERE, lambda: pile_documents(settings), settings.tokenizer):
        print(f"next: python train.py CONFIG{settings.next_flags() or ' --dataset=pile'}")


if __name__ == "__main__":
    main(sys.argv[1:])
