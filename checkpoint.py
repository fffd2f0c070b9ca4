"""Checkpoints: atomic save, newest valid, load. No pickle.

A checkpoint is a folder `step_00001000` with model.safetensors, optimizer.safetensors, state.json,
and manifest.json (size and sha256 of each) written last. It is built under a temporary name,
fsynced and renamed, so that a kill at any moment leaves the old ones or the new one. Knows neither
the model's class nor the loop.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
_NAME = re.compile(r"step_(\d{8,})")
_TEMPORARY = ".partial"


class CheckpointError(ValueError):
    """A checkpoint cannot be written or read; the message says which and what to do."""


class Checkpoint(NamedTuple):
    """A verified checkpoint: its folder and what state.json holds."""

    folder: Path
    state: dict

    def model_tensors(self) -> dict[str, Tensor]:
        """The parameters by name, on the CPU."""
        return load_file(self.folder / MODEL)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """The optimizer's state as `flatten_state` names it, on the CPU."""
        return load_file(self.folder / OPTIMIZER)


def save(out_dir: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict,
         keep: int) -> Path:
    """Writes the checkpoint of step `state["step"]`, then removes all but the `keep` newest.

    Raises CheckpointError when the disk refuses; older checkpoints are untouched then.
    """
    folder = out_dir / f"step_{state['step']:08d}"
    partial = folder.with_name(folder.name + _TEMPORARY)
    try:
        _require_space(out_dir, model, optimizer)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({k: v.detach().cpu().contiguous() for k, v in model.items()}, partial / MODEL)
        save_file({k: v.detach().cpu().contiguous() for k, v in optimizer.items()},
                  partial / OPTIMIZER)
        (partial / STATE).write_text(json.dumps(state, indent=1))
        manifest = {name: _describe(partial / name) for name in (MODEL, OPTIMIZER, STATE)}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*partial.iterdir(), partial):
            _fsync(path)
        if folder.exists():  # the same step again, after resuming from before it
            _set_aside(folder, ".replaced")
        os.rename(partial, folder)
        _replace_text(out_dir / "latest", folder.name + "\n")
        _fsync(out_dir)
        for old in (*checkpoints(out_dir)[keep:], *out_dir.glob("step_*.replaced*")):
            shutil.rmtree(old, ignore_errors=True)  # the save itself has succeeded
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint {folder} could not be written: {error}; earlier "
                              "checkpoints are intact") from error
    return folder


def checkpoints(out_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, not yet verified."""
    found = [p for p in out_dir.glob("step_*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(_NAME.fullmatch(p.name)[1]), reverse=True)


def newest(out_dir: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None where there is no checkpoint at all.

    One that does not verify is renamed to `.corrupt`, with the reason on stderr, and the one before
    is taken. Raises CheckpointError when none of several is left.
    """
    folders = checkpoints(out_dir)
    damaged = list(out_dir.glob("step_*.corrupt*"))
    for folder in folders:
        try:
            return open_checkpoint(folder)
        except CheckpointError as error:
            aside = _set_aside(folder, ".corrupt")
            print(f"warning: {error}; renamed to {aside.name}, trying the one before",
                  file=sys.stderr, flush=True)
    if folders or damaged:
        raise CheckpointError(f"no checkpoint in {out_dir} is intact (see *.corrupt there); start "
                              "again with another --out_dir")
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verifies every file of a checkpoint folder; raises CheckpointError naming the bad one."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        for name in (MODEL, OPTIMIZER, STATE):
            if _describe(folder / name) != manifest[name]:
                raise CheckpointError(f"{folder / name} does not match its checksum")
        return Checkpoint(folder, json.loads((folder / STATE).read_text()))
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"checkpoint {folder} is damaged: {error!r}") from error


def flatten_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """State tensors as `<parameter number>.<name>`, without hyperparameters."""
    return {f"{number}.{name}": torch.as_tensor(value)
            for number, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()}


def restore_state(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Inverse of `flatten_state`; the optimizer keeps the hyperparameters it was built with."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict(dict(state=state, param_groups=groups))


def _require_space(out_dir: Path, model: dict, optimizer: dict) -> None:
    out_dir.mkdir(parents=True, exist_ok=True)
    needed = sum(t.nbytes for t in (*model.values(), *optimizer.values())) + (1 << 20)
    free = shutil.disk_usage(out_dir).free
    if free < needed:
        raise OSError(f"{needed >> 20} MiB are needed, {free >> 20} MiB of disk space are free")


def _describe(path: Path) -> dict:
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(size=path.stat().st_size, sha256=digest)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _set_aside(folder: Path, suffix: str) -> Path:
    aside, n = folder.with_name(folder.name + suffix), 1
    while aside.exists():
        aside, n = folder.with_name(f"{folder.name}{suffix}{n}"), n + 1
    return folder.rename(aside)


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + _TEMPORARY)
    partial.write_text(text)
    _fsync(partial)
    os.replace(partial, path)
