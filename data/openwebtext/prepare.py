"""Prepares OpenWebText, or your own documents, as GPT-2 tokens for training.

    python data/openwebtext/prepare.py            # Skylion007/openwebtext from the hub
    python data/openwebtext/prepare.py --input=my.parquet --out_dir=data/mine

The full corpus is 8,013,769 documents: 17 GB of train.bin and 9 MB of val.bin. The validation
documents are nanoGPT's (0.05 %, chosen with seed 2357), so that losses compare.
"""

import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from configurator import ConfigError, Settings, exit_with, knob, load  # noqa: E402
from corpus import (  # noqa: E402
    CorpusError,
    count_documents,
    find_files,
    read_documents,
    report,
    write_corpus,
)
from tokenizer import TokenizerError, get_tokenizer  # noqa: E402

HUB_NAME = "Skylion007/openwebtext"
VAL_FRACTION, VAL_SEED = 0.0005, 2357  # nanoGPT's


@dataclass(frozen=True, kw_only=True)
class OpenWebTextSettings(Settings):
    """The settings of this script."""

    input: str = knob("", "local parquet, jsonl (column `text`) or txt files, a folder or a glob, "
                          "comma-separated; empty = the hub's corpus")
    out_dir: str = knob(str(HERE), "where train.bin, val.bin and meta.json go")
    num_proc: int = knob(1, "tokenising processes", low=1)


def validation_rows(n_documents: int) -> set[int]:
    """Row numbers of the validation documents, as datasets' train_test_split chooses them."""
    if n_documents < 2:
        raise CorpusError(f"{n_documents} document is not enough for a training and a validation "
                          "split; give at least 2")
    n_val = math.ceil(VAL_FRACTION * n_documents)
    return set(np.random.default_rng(VAL_SEED).permutation(n_documents)[:n_val].tolist())


def with_split(texts: Iterable[str], n_documents: int) -> Iterator[tuple[str, str]]:
    """(split, text) of each of `n_documents` texts."""
    val = validation_rows(n_documents)
    for row, text in enumerate(texts):
        yield ("val" if row in val else "train"), text


def hub_documents() -> tuple[Iterable[str], int]:
    """The hub's corpus and its number of documents; raises CorpusError when out of reach."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise CorpusError("the package `datasets` is missing; run pip install -r "
                          "requirements.txt, or give local files with --input") from None
    errors = []
    for revision in (None, "refs/convert/parquet"):  # the first may hold only a loading script
        try:
            rows = load_dataset(HUB_NAME, split="train", revision=revision)
            return (row["text"] for row in rows), len(rows)
        except Exception as error:  # the hub's clients raise of many kinds
            errors.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    raise CorpusError(f"{HUB_NAME} could not be loaded ({'; then '.join(errors)}); check the "
                      "network, or give local files with --input=FILES")


def main(argv: list[str]) -> None:
    """Prepares the corpus; exits with 2 and one line when it cannot."""
    try:
        settings, _ = load(OpenWebTextSettings, argv,
                           "python data/openwebtext/prepare.py [--key=value]")
        get_tokenizer("gpt2")  # before a long download
        if settings.input:
            files = find_files(settings.input)
            texts, n, source = read_documents(files), count_documents(files), settings.input
        else:
            (texts, n), source = hub_documents(), HUB_NAME
        out_dir = Path(settings.out_dir)
        meta = write_corpus(with_split(texts, n), out_dir, "gpt2", source=source, total=n,
                            num_proc=settings.num_proc)
        report(meta, out_dir)
        print(f"next: python train.py config/train_gpt2_30m_sophiag.py --dataset={out_dir}")
    except (ConfigError, CorpusError, TokenizerError) as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv[1:])
