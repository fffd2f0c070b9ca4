"""Writes a ckpt.pt that nanoGPT's sample.py and train.py take."""

import os
import shlex
from dataclasses import fields
from pathlib import Path

import torch

from nanosophia.checkpoint import CheckpointError
from nanosophia.configurator import ConfigError
from nanosophia.files import create, fsync, remove
from nanosophia.tokenizer import CHARACTERS
from nanosophia.weights import Weights

ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "dropout")  # beside vocab_size


def write_checkpoint(weights: Weights, file: Path, records: list[dict]) -> str:
    """Writes the ckpt.pt of a run's weights, without padding; returns what to do with it.

    `records` are the run's metrics. nanoGPT's train.py also wants the state of AdamW: its moments
    start anew there. Raises ConfigError on a name that is taken, CheckpointError on a model that
    nanoGPT cannot compute and where the disk refuses.
    """
    if file.name != "ckpt.pt":  # the only one that its sample.py opens
        raise ConfigError(f"--export_nanogpt={file}: nanoGPT opens FOLDER/ckpt.pt; give that name",
                          "export_nanogpt")
    if file.exists():
        raise ConfigError(f"--export_nanogpt={file} exists; remove it, or give another name",
                          "export_nanogpt")
    losses = [r["val/loss"] for r in records if r.get("val/loss") is not None]
    dataset = Path(weights.state["config"]["dataset"]).name
    content = _model_of(weights) | dict(
        iter_num=weights.state["step"], best_val_loss=min(losses, default=1e9),
        config=dict(dataset=dataset, activation=weights.config.activation))
    partial = file.with_name(file.name + ".partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with create(partial) as stream:
            torch.save(content, stream)
        fsync(partial)
        os.replace(partial, file)
        fsync(file.parent)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        remove(partial)
        raise CheckpointError(f"{file} cannot be written: {error}") from error
    lines = [f"wrote {file}; in nanoGPT's folder: python sample.py "
             f"--out_dir={shlex.quote(str(file.parent.resolve()))} --device=cpu --compile=False"]
    if weights.tokenizer == "bytes" or weights.tokenizer.endswith(CHARACTERS):
        lines.append(f"it decodes by data/{dataset}/{CHARACTERS} there: a copy of the one beside "
                     "this run's data")
    if weights.config.activation != "gelu":
        lines.append("nanoGPT computes the exact GELU, this model the tanh approximation: losses "
                     "differ by about 1e-4")
    return "\n".join(lines)


def _model_of(weights: Weights) -> dict:
    """Returns parameters, settings and a fresh AdamW, as nanoGPT's train.py saves them."""
    config = weights.config
    for f in fields(config):
        value = getattr(config, f.name)
        if f.name not in (*ARGS, "vocab_size", "activation") and value != f.default:
            raise CheckpointError(f"{weights.source} has {f.name} = {value!r}, which nanoGPT "
                                  "cannot compute; the export would be another model")
    classes, tensors = weights.num_classes, dict(weights.tensors)
    tensors["transformer.wte.weight"] = tensors["transformer.wte.weight"][:classes].clone()
    groups = [[x for x in tensors.values() if (x.dim() >= 2) is matrices]
              for matrices in (True, False)]
    optimizer = torch.optim.AdamW([dict(params=groups[0], weight_decay=0.1),
                                   dict(params=groups[1], weight_decay=0.0)], betas=(0.9, 0.95))
    return dict(
        model=tensors | {"lm_head.weight": tensors["transformer.wte.weight"]},
        model_args={key: getattr(config, key) for key in ARGS} | dict(vocab_size=classes),
        optimizer=optimizer.state_dict())
