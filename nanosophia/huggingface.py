"""Command that exports a run for transformers or nanoGPT, or imports GPT-2 into a run.

    python -m nanosophia.huggingface --out_dir=out/quickstart --export=out/quickstart-hf
    python -m nanosophia.huggingface --out_dir=out/quickstart --export_nanogpt=out/nanogpt/ckpt.pt
    python -m nanosophia.huggingface --import_from=gpt2 --out_dir=out/gpt2

The folder holds model.safetensors, config.json, the tokenizer and a model card; it loads with
AutoModelForCausalLM and AutoTokenizer, as GPT-2 or, with rotary positions, GPT-NeoX. These always
have biases there: those that a model lacks are written as zeros. Padding rows are left out.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import hashlib
import itertools
import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError
from safetensors.torch import save_file

from nanosophia.checkpoint import CheckpointError, checkpoint_folders, run_state, save
from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, load, option
from nanosophia.files import fsync, read_bytes, remove, write_text
from nanosophia.metrics import read_records
from nanosophia.nanogpt import write_checkpoint
from nanosophia.options import Config
from nanosophia.schemas import TransformersConfig, read
from nanosophia.tokenizer import (
    EOT,
    FILE_NAME,
    FileEncoding,
    bytes_to_unicode,
    get_tokenizer,
)
from nanosophia.transformers_models import (
    check_exportable,
    family_of,
    their_config,
    their_tensors,
)
from nanosophia.weights import Weights, foreign_weights, run_weights

MARK = "nanosophia_card_sha256"  # in config.json: this command wrote the folder, and this README.md


@dataclass(frozen=True, kw_only=True)
class HuggingFaceSettings(Settings):
    """The settings of this command."""

    out_dir: str = option("out", "folder of the run that is exported, or made by an import")
    export: str = option("", "folder to write for transformers")
    export_nanogpt: str = option("", "ckpt.pt to write for nanoGPT's sample.py and train.py")
    checkpoint: Literal["newest", "best"] = option("newest", "which of the run's checkpoints")
    licence: str = option("other", "licence that the model card states")
    import_from: str = option("", "GPT-2 or GPT-NeoX folder of transformers, name on its hub, or "
                                  "nanoGPT's ckpt.pt")

    def check(self) -> None:
        if sum(map(bool, (self.export, self.export_nanogpt, self.import_from))) != 1:
            raise ConfigError("give one of --export=FOLDER, --export_nanogpt=FILE and "
                              "--import_from=NAME_OR_FOLDER", "export", "export_nanogpt",
                              "import_from")
        if not self.licence.isprintable():
            raise ConfigError(f"licence = {self.licence!r} is more than a line of text", "licence")


@command()
def main(argv: list[str]) -> None:
    """Runs the command; exits with 2 and one line after a user's mistake."""
    settings, _ = load(HuggingFaceSettings, argv, "python -m nanosophia.huggingface --key=value")
    if settings.export:
        folder = export(settings)
        print(f"wrote {folder}; load it with AutoModelForCausalLM.from_pretrained({folder!s})")
    elif settings.export_nanogpt:
        print(write_checkpoint(_weights_of(settings), Path(settings.export_nanogpt),
                               _records(Path(settings.out_dir))))
    else:
        weights = import_weights(settings)
        print(f"wrote {settings.out_dir}; next:")
        if weights.tokenizer:  # else nothing says how to decode its samples
            print(f"  python sample.py --out_dir={shlex.quote(settings.out_dir)}")
        source = shlex.quote(settings.import_from)
        print(f"  python train.py --init_from={source}  (to train on from it)")


def export(settings: HuggingFaceSettings) -> Path:
    """Writes the folder, which appears as a whole; returns its path.

    Replaces an earlier export alone: a README.md that was edited and files that were added stay.
    """
    weights = _weights_of(settings)
    check_exportable(weights.config, settings.out_dir)
    tokenizer = get_tokenizer(weights.tokenizer)
    folder = Path(os.path.realpath(settings.export))
    if not folder.name:
        raise ConfigError(f"--export={settings.export} is no folder to write", "export")
    card = model_card(weights, settings)
    kept = _earlier_card(folder)
    partial = _beside(folder, "partial")
    remove(partial)
    partial.mkdir(parents=True)
    try:
        save_file(their_tensors(weights.tensors, weights.config, weights.num_classes),
                  partial / "model.safetensors", metadata=dict(format="pt"))
    except SafetensorError as error:  # of the disk, say
        raise CheckpointError(f"{partial} cannot be written: {error}") from error
    _write_tokenizer(partial, weights.tokenizer, tokenizer, weights.config.block_size)
    write_text(partial / "README.md", card if kept is None else kept)
    config = their_config(weights.config, weights.num_classes, tokenizer.eot_token)
    write_text(partial / "config.json", json.dumps(config | {MARK: _sha256(card)}, indent=1) + "\n")
    for path in (*partial.iterdir(), partial):
        fsync(path)
    _publish(partial, folder)
    if kept is not None:
        print(f"{folder / 'README.md'} was edited and is kept")
    return Path(settings.export)


def _weights_of(settings: HuggingFaceSettings) -> Weights:
    weights = run_weights(Path(settings.out_dir), settings.checkpoint)
    if weights is None:
        raise CheckpointError(f"{settings.out_dir} holds no checkpoint; give --out_dir=RUN")
    return weights


def _earlier_card(folder: Path) -> str | None:
    """Returns the README.md of an earlier export if it was edited, else None.

    Raises ConfigError where the folder holds anything but an export.
    """
    _finish_replacing(folder)
    if not folder.is_dir():
        if folder.exists():
            raise ConfigError(f"--export={folder} is a file; give a folder", "export")
        return None
    if not any(folder.iterdir()):
        return None
    try:
        recorded = read(folder / "config.json", TransformersConfig).get(MARK)
    except (OSError, ValueError):
        recorded = None
    if recorded is None:
        raise ConfigError(f"--export={folder} holds files that are no export of this command; give "
                          "a folder of its own", "export")
    try:
        card = read_bytes(folder / "README.md").decode(errors="replace")
    except FileNotFoundError:
        return None
    return None if _sha256(card) == recorded else card


def _beside(folder: Path, what: str) -> Path:
    """Returns the name of a folder of this command's own, which nobody else would choose."""
    return folder.with_name(f".{folder.name}.nanosophia-export-{what}")


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _publish(partial: Path, folder: Path) -> None:
    """Gives the complete folder its name; what an earlier one of that name had beside it stays."""
    replaced = _beside(folder, "replaced")
    if folder.exists():
        os.rename(folder, replaced)
    os.rename(partial, folder)
    fsync(folder.parent)
    _finish_replacing(folder)


def _finish_replacing(folder: Path) -> None:
    """Moves what the replaced folder alone has into its successor, also after a kill."""
    replaced = _beside(folder, "replaced")
    if not replaced.is_dir() or replaced.is_symlink():
        return
    if not folder.exists():
        os.rename(replaced, folder)
        return
    for path in replaced.iterdir():
        if not (folder / path.name).exists():
            os.rename(path, folder / path.name)
    remove(replaced)


def _write_tokenizer(folder: Path, name: str, encoding, block_size: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json."""
    if isinstance(encoding, FileEncoding):
        write_text(folder / FILE_NAME, encoding.json)
    else:
        _as_tokenizers(encoding, byte_pairs=name == "gpt2").save(
            str(folder / FILE_NAME))
    end = {} if encoding.eot_token is None else dict(eos_token=EOT, bos_token=EOT)
    write_text(folder / "tokenizer_config.json", json.dumps(dict(
        tokenizer_class="PreTrainedTokenizerFast", model_max_length=block_size, **end,
        clean_up_tokenization_spaces=False), indent=1) + "\n")


def _as_tokenizers(encoding, *, byte_pairs: bool):
    """Returns a tiktoken encoding of GPT-2's kind as a Tokenizer of the `tokenizers` library."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    letters = bytes_to_unicode()
    spelled = {"".join(letters[b] for b in token): rank
               for token, rank in encoding._mergeable_ranks.items()}
    merges = [_halves(encoding._mergeable_ranks, token, letters)
              for token in sorted(encoding._mergeable_ranks, key=encoding._mergeable_ranks.get)
              if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab=spelled, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False,
                                                       use_regex=byte_pairs)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(EOT, special=True)])  # gets the next id
    assert tokenizer.token_to_id(EOT) == encoding.eot_token
    return tokenizer


def _halves(ranks: dict[bytes, int], token: bytes, letters: dict[int, str]) -> tuple[str, str]:
    """Returns the two tokens whose merge makes this one, found by doing all merges but that."""
    parts = [bytes([b]) for b in token]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, len(ranks)), i)
                 for i, (a, b) in enumerate(itertools.pairwise(parts))
                 if a + b != token]
        _, i = min(pairs)
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    first, second = ("".join(letters[b] for b in part) for part in parts)
    return first, second


def model_card(weights: Weights, settings: HuggingFaceSettings) -> str:
    """Returns README.md, filled from the run."""
    config, records = weights.state["config"], _records(Path(settings.out_dir))
    steps, family = weights.state["step"], family_of(weights.config)
    seen = {key: next((r[key] for r in reversed(records) if key in r and r["step"] < steps), None)
            for key in ("train/loss", "val/loss")}
    losses = ", ".join(f"{name.partition('/')[0]} {value:.4f}" for name, value in seen.items()
                       if value is not None) or "not recorded"
    parameters = sum(x.numel() for x in weights.tensors.values())
    tokens = steps * config["total_batch_size"] * config["block_size"]
    versions = ", ".join(f"{k} {v}" for k, v in weights.state.get("versions", {}).items())
    return f"""---
license: {settings.licence}
library_name: transformers
pipeline_tag: text-generation
tags: [{family.lower()}, nanosophia, {config["optimizer"]}]
---
# {Path(settings.out_dir).name}

A {family} model pre-trained with nanoSophia.

| | |
|---|---|
| parameters | {parameters:,} ({config["n_layer"]} layers, width {config["n_embd"]}, context \
{config["block_size"]}) |
| data | {config["dataset"]} ({weights.state.get("data", {}).get("train", "not known")}) |
| tokens seen | {tokens:,} in {steps:,} steps |
| optimizer | {config["optimizer"]}, peak learning rate {config["learning_rate"]}, weight decay \
{config["weight_decay"]} |
| losses, nats per token | {losses} |
| made with | {versions or "not known"} |
| licence | {settings.licence} |

It continues text and has had no training to follow instructions or to avoid harm.
"""


def _records(run: Path) -> list[dict]:
    try:
        return read_records(run / "metrics.jsonl")
    except (OSError, ValueError):
        return []


def import_weights(settings: HuggingFaceSettings) -> Weights:
    """Writes the weights as a run's checkpoint of step 0, and returns them."""
    out_dir = Path(settings.out_dir)
    if os.path.realpath(out_dir) == os.path.realpath(settings.import_from):
        raise ConfigError(f"--import_from and --out_dir are both {out_dir}; give another --out_dir",
                          "out_dir")
    if checkpoint_folders(out_dir):
        raise ConfigError(f"{out_dir} already holds checkpoints; give another --out_dir", "out_dir")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        raise ConfigError(f"{out_dir} is not empty; give a new --out_dir", "out_dir")
    weights = foreign_weights(settings.import_from)
    model = weights.build()
    name = weights.tokenizer
    if name.endswith(".json"):
        write_text(out_dir / FILE_NAME, get_tokenizer(name).json)
        name = FILE_NAME  # beside the checkpoints, wherever the run is moved to
    config = asdict(Config(**asdict(weights.config))) | dict(
        dataset=f"imported from {settings.import_from}")
    save(out_dir, model.state_dict(), {}, run_state(
        step=0, config=config, model=asdict(weights.config), tokenizer=name,
        num_classes=weights.num_classes), keep=2)
    return weights


if __name__ == "__main__":
    main(sys.argv[1:])
