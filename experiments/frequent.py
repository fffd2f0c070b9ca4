"""Keeps the most frequent tokens of a prepared folder, so that small models can study its text.

    python -m experiments.frequent --dataset=data/books --out_dir=data/books4096 --vocab_size=4096

Ids are renumbered by their frequency in the training split, and all rarer tokens share the last id.
The result trains like any prepared folder; it cannot be decoded to text.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import hashlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, load, option
from nanosophia.dataloader import open_dataset
from nanosophia.files import write_text
from nanosophia.schemas import META, Meta, read


@dataclass(frozen=True, kw_only=True)
class FrequentSettings(Settings):
    """Settings of `python -m experiments.frequent`."""

    dataset: str = option("openwebtext", "prepared folder to read")
    out_dir: str = option("data/frequent", "folder to write")
    vocab_size: int = option(4096, "classes of the result, with the one that rarer tokens share",
                             low=2, high=65536)
    val_tokens: int = option(0, "size of a validation split taken from the end of the training "
                                "split, where the folder's own is small; 0 = the folder's own",
                             unit="tokens", low=0)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(FrequentSettings, argv, "python -m experiments.frequent [--key=value]")
    data = open_dataset(settings.dataset, 1)
    if settings.vocab_size > data.vocab_size:
        raise ConfigError(f"vocab_size = {settings.vocab_size} is more than the "
                          f"{data.vocab_size} classes of {data.folder}; lower it", "vocab_size")
    out_dir = Path(settings.out_dir)
    if out_dir.exists() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty; give a new --out_dir", "out_dir")
    if settings.val_tokens > len(data.train) - 2:
        raise ConfigError(f"val_tokens = {settings.val_tokens} leaves nothing of the "
                          f"{len(data.train)} training tokens; lower it", "val_tokens")
    before = read(data.folder / META, Meta)
    counts = np.bincount(data.train, minlength=data.vocab_size)
    new_id = np.full(data.vocab_size, settings.vocab_size - 1, dtype=np.uint16)
    kept = np.argsort(-counts, kind="stable")[:settings.vocab_size - 1]
    new_id[kept] = np.arange(len(kept))
    out_dir.mkdir(parents=True, exist_ok=True)
    splits = {}
    train, val = data.train, data.val
    if settings.val_tokens:
        train, val = np.split(train, [-settings.val_tokens])
    for split, tokens in (("train", train), ("val", val)):
        ids = new_id[tokens]
        ids.tofile(out_dir / f"{split}.bin")
        splits[split] = dict(file=f"{split}.bin", tokens=len(ids),
                             documents=int((tokens == before["eot_token"]).sum()),
                             sha256=hashlib.sha256(ids).hexdigest())
    meta = dict(format=1, eot_token=int(new_id[before["eot_token"]]),
                tokenizer_sha256=hashlib.sha256(new_id).hexdigest(),
                source=f"{data.folder}, the {len(kept)} most frequent tokens", dtype="uint16",
                tokenizer=f"{data.tokenizer} by frequency", vocab_size=settings.vocab_size,
                splits=splits)
    write_text(out_dir / META, json.dumps(meta, indent=1) + "\n")
    share = counts[kept].sum() / counts.sum()
    print(f"{out_dir}: {settings.vocab_size} classes, {share:.1%} of the training tokens kept")


if __name__ == "__main__":
    main(sys.argv[1:])
