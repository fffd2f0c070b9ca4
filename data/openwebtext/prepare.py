"""Prepares OpenWebText, or your own documents, as GPT-2 tokens for training.

    python data/openwebtext/prepare.py --num_proc=8
    python data/openwebtext/prepare.py --input=my.parquet --out_dir=data/mine

The full corpus is 8,013,769 documents: 17 GB of train.bin and 9 MB of val.bin. The validation
documents are nanoGPT's (0.05 %, chosen with seed 2357), so that losses compare; the training
documents stay in the order of the source (the loader shuffles windows).
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

from nanosophia.command import command  # noqa: E402
from nanosophia.configurator import load, option  # noqa: E402
from nanosophia.corpus import ColumnSettings, prepare  # noqa: E402
from nanosophia.documents import CorpusError, Documents, hub_documents, local_documents  # noqa: E402
from nanosophia.tokenizer import get_tokenizer  # noqa: E402

VAL_FRACTION, VAL_SEED = 0.0005, 2357  # nanoGPT's
PUBLISHED = dict(documents=8_013_769, train=9_035_582_198, val=4_434_897)  # nanoGPT's README


@dataclass(frozen=True, kw_only=True)
class OpenWebTextSettings(ColumnSettings):
    """The settings of this script."""

    input: str = option("", "local parquet, jsonl (.gz, .zst; column `text`) or txt files, a "
                            "folder or a glob, comma-separated; empty = the hub's corpus")
    hub: str = option("Skylion007/openwebtext", "data set of the hub, or a local folder like one")
    streaming: bool = option(False, "read the hub without keeping a copy on the disk")


def validation_split(count: int) -> Callable[[int], str]:
    """Returns the split of document number n of `count`, as datasets' train_test_split does."""
    if count < 2:
        raise CorpusError(f"{count} document is not enough for a training and a validation split; "
                          "give at least 2")
    n_val = math.ceil(VAL_FRACTION * count)
    val = set(np.random.default_rng(VAL_SEED).permutation(count)[:n_val].tolist())
    return lambda row: "val" if row in val else "train"


def check_published(meta: dict) -> None:
    """Raises CorpusError when the full corpus gave other tokens than the published ones."""
    splits = meta["splits"]
    if sum(s["documents"] for s in splits.values()) != PUBLISHED["documents"]:
        return
    for name in ("train", "val"):
        if splits[name]["tokens"] != PUBLISHED[name]:
            raise CorpusError(f"{name}.bin holds {splits[name]['tokens']:,} tokens, nanoGPT's "
                              f"{PUBLISHED[name]:,}: the source has changed, losses will not "
                              "compare")


@command()
def main(argv: list[str]) -> None:
    """Prepares the corpus; exits with 2 and one line when that fails."""
    settings, _ = load(OpenWebTextSettings, argv,
                            "python data/openwebtext/prepare.py [--key=value]")

    def documents() -> Documents:
        if settings.input:
            return local_documents(settings.input, validation_split, settings.text_column)
        get_tokenizer("gpt2")  # a missing one fails before a long download
        return hub_documents(settings.hub, "train", validation_split, streaming=settings.streaming,
                             column=settings.text_column)

    meta = prepare(settings, HERE, documents, "gpt2")
    if meta:
        check_published(meta)
        print(f"next: python train.py config/train_gpt2_30m_sophiag.py{settings.next_flags()}")


if __name__ == "__main__":
    main(sys.argv[1:])
