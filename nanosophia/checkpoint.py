"""Saves checkpoints atomically in a thread and verifies them on loading; uses no pickle.

A checkpoint is a folder `step_00001000` of safetensors files, state.json, and manifest.json (size
and sha256 of each) written last. It is built under a temporary name, fsynced and renamed, so that a
kill at any moment leaves the old ones or the new one. A run that holds whole parameters has rank 0
write model.safetensors and optimizer.safetensors; one that splits them (FSDP2) has every rank write
its shards through torch.distributed.checkpoint. Either loads into either, on any number of ranks.
Does not depend on the model's class or the loop.
"""

import hashlib
import json
import os
import platform
import re
import shutil
import stat
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
import torch.nn as nn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from nanosophia.configurator import UserError
from nanosophia.distributed import (
    Ranks,
    is_sharded,
    on_main,
    zeros_like_shards,
)
from nanosophia.files import fsync, open_file, read_bytes, reason, remove, write_text
from nanosophia.optimizer_state import restore_state
from nanosophia.schemas import Manifest, State, read
from nanosophia.tokenizer import resolve_tokenizer

MODEL, OPTIMIZER, STATE, MANIFEST = (
    "model.safetensors", "optimizer.safetensors", "state.json", "manifest.json")
FORMAT = 1  # of state.json
_NAME = re.compile(r"(step_\d{8,12})(\.corrupt\d*)?")
TEMPORARY, CORRUPT = ".partial", ".corrupt"


class CheckpointError(UserError):
    """A checkpoint cannot be written or read; the message says which and what to do."""


class DamagedCheckpoint(CheckpointError):
    """A checkpoint was read and is not what was written."""


class Checkpoint(NamedTuple):
    """A verified checkpoint: its folder and what state.json holds."""

    folder: Path
    state: State

    @property
    def tokenizer(self) -> str:
        """Returns the run's tokenizer as `get_tokenizer` takes it."""
        return resolve_tokenizer(self.folder.parent, self.state["tokenizer"])

    def model_tensors(self) -> dict[str, Tensor]:
        """Returns the whole parameters by name, on the CPU."""
        return self._tensors(MODEL, lambda name: not name[0].isdigit())

    def model_shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of the whole parameters by name, without reading them."""
        return {name: tuple(m.size) for name, m in read_metadata(self.folder).items()
                if not name[0].isdigit()}

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Returns the optimizer's whole state as `flatten_state` names it, on the CPU."""
        return self._tensors(OPTIMIZER, lambda name: name[0].isdigit())

    def _tensors(self, file: str, belongs: Callable[[str], bool]) -> dict[str, Tensor]:
        if (self.folder / file).exists():
            try:
                return load_file(self.folder / file)
            except SafetensorError as error:
                raise CheckpointError(f"{self.folder / file} was not written by this code: {error}"
                                      ) from error
        found = {name: torch.empty(m.size, dtype=m.properties.dtype)
                 for name, m in read_metadata(self.folder).items() if belongs(name)}
        _read_shards(self.folder, found, no_dist=True)
        return found

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        """Loads parameters and optimizer state, whole or split as the model is now.

        Without an optimizer the parameters alone. The optimizer keeps the hyperparameters it was
        built with. Raises CheckpointError when the checkpoint is of another model or optimizer.
        """
        try:
            tensors = model.state_dict()
            if not any(map(is_sharded, tensors.values())):
                saved = self.model_tensors()
                converted = any(tensors[key].dtype != x.dtype for key, x in saved.items()
                                if key in tensors)
                model.load_state_dict(saved)
                if optimizer is not None:
                    restore_state(optimizer, self.optimizer_tensors(),
                                  self.state.get("optimizer"), converted=converted)
                return
            if optimizer is None:
                _read_shards(self.folder, tensors, no_dist=False)
                return
            params = [p for group in optimizer.param_groups for p in group["params"]]
            metadata = read_metadata(self.folder)
            state = {name: zeros_like_shards(params[int(name.partition(".")[0])], m.size,
                                             m.properties.dtype)
                     for name, m in metadata.items() if name[0].isdigit()}
            _read_shards(self.folder, tensors | state, no_dist=False)
            converted = any(metadata[key].properties.dtype != x.dtype
                            for key, x in tensors.items() if key in metadata)
            restore_state(optimizer, state, self.state.get("optimizer"), converted=converted)
        except (RuntimeError, ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise CheckpointError(f"{self.folder} is a checkpoint of another model or optimizer: "
                                  f"{str(error).partition(chr(10))[0]}") from error


def save(out_dir: Path, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict,
         keep: int, *, keep_best: bool = False, ranks: Ranks | None = None, group=None) -> Path:
    """Writes the checkpoint of step `state["step"]`, then removes all but the `keep` newest.

    `keep_best` spares the one with the lowest state["val_loss"] and names it in the file `best`.
    With `ranks`, all of them call this with their shards and communicate in `group`. Raises
    CheckpointError when the disk refuses; older checkpoints are untouched then.
    """
    folder = out_dir / f"step_{state['step']:08d}"
    partial = folder.with_name(folder.name + TEMPORARY)
    ranks = ranks or Ranks(0, 1, torch.device("cpu"))
    try:
        on_main(ranks, lambda: _prepare_folder(partial, model, optimizer), OSError, group=group)
        _write_tensors(partial, model, optimizer, group)
        on_main(ranks, lambda: _publish(partial, folder, state), OSError, CheckpointError,
                group=group)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"checkpoint {folder} could not be written: {error}"
                              ) from error
    if ranks.is_main:
        try:
            write_text(out_dir / "latest", folder.name + "\n")
            _purge(out_dir, keep, keep_best)
        except OSError as error:  # the save itself has succeeded
            print(f"warning: {out_dir} could not be tidied after a save: {error}", file=sys.stderr,
                  flush=True)
    return folder


def _prepare_folder(partial: Path, model: dict, optimizer: dict) -> None:
    out_dir = partial.parent
    out_dir.mkdir(parents=True, exist_ok=True)
    whole = sum(t.numel() * t.element_size() for t in (*model.values(), *optimizer.values()))
    needed, free = whole + (1 << 20), shutil.disk_usage(out_dir).free
    if free < needed:
        raise OSError(f"{needed >> 20} MiB are needed, {free >> 20} MiB of disk space are free")
    remove(partial)  # also a link that was planted there
    partial.mkdir()


def _write_tensors(partial: Path, model: dict, optimizer: dict, group) -> None:
    if group is None:
        save_file({k: v.detach().cpu().contiguous() for k, v in model.items()}, partial / MODEL)
        save_file({k: v.detach().cpu().contiguous() for k, v in optimizer.items()},
                  partial / OPTIMIZER)
        return
    import torch.distributed.checkpoint as dcp
    try:
        dcp.save(model | optimizer, process_group=group, storage_writer=dcp.
                 HuggingFaceStorageWriter(str(partial), save_distributed=True))
    except dcp.api.CheckpointException as error:
        raise OSError(f"of the ranks, {', '.join(map(str, error.failures))} failed: "
                      f"{next(iter(error.failures.values()))[0]}") from error


def _publish(partial: Path, folder: Path, state: dict) -> None:
    """Writes the manifest, syncs, and renames the folder: from here on the checkpoint exists."""
    (partial / STATE).write_text(json.dumps(state, indent=1))
    manifest = {path.name: file_digest(path) for path in sorted(partial.iterdir())}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    for path in (*partial.iterdir(), partial):
        fsync(path)
    if folder.exists():  # the same step again, after resuming from before it
        _set_aside(folder, ".replaced")
    os.rename(partial, folder)
    fsync(folder.parent)


def _purge(out_dir: Path, keep: int, keep_best: bool) -> None:
    """Removes old checkpoints; what cannot be removed stays, since the save has succeeded."""
    folders = checkpoint_folders(out_dir)
    losses = {folder: loss for folder in folders if (loss := _val_loss(folder)) is not None} \
        if keep_best else {}
    best = min(losses, key=losses.get, default=None)
    if best:
        write_text(out_dir / "best", best.name + "\n")
    for old in (*folders[keep:], *out_dir.glob("step_*.replaced*")):
        if old != best:
            shutil.rmtree(old, ignore_errors=True)


def missing_parts(out_dir: Path, step: int) -> str:
    """Returns what a checkpoint lacks according to its manifest, read back; "" for nothing."""
    folder = out_dir / f"step_{step:08d}"
    try:
        manifest = read(folder / MANIFEST, Manifest)
        lacking = [name for name, digest in manifest.items()
                   if (folder / name).stat().st_size != digest["size"]]
    except (OSError, ValueError) as error:
        return f"checkpoint {folder} is not there as it was written: {error}"
    return f"checkpoint {folder}: {', '.join(lacking)} has another size" if lacking else ""


def _val_loss(folder: Path) -> float | None:
    try:
        return read(folder / STATE, State).get("val_loss")
    except (OSError, ValueError):
        return None


def checkpoint_folders(out_dir: Path, *, quarantined: bool = False) -> list[Path]:
    """Returns the checkpoint folders of a run, newest first, not yet verified.

    With `quarantined` also those renamed to `.corrupt` whose name no other has taken. Raises
    CheckpointError where the run's folder is there and cannot be read.
    """
    try:
        names = [entry.name for entry in os.scandir(out_dir) if entry.is_dir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise _unreadable(error, out_dir) from error
    found = {name: match for name in names if (match := _NAME.fullmatch(name))
             and (not match[2] or (quarantined and match[1] not in names))}
    order = sorted(found, key=lambda name: int(found[name][1].removeprefix("step_")), reverse=True)
    return [out_dir / name for name in order]


def load_best(out_dir: Path) -> Checkpoint:
    """Returns the checkpoint with the lowest validation loss that was kept.

    Raises CheckpointError where it is damaged, or none is known as the best.
    """
    try:
        name = read_bytes(out_dir / "best").decode(errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{out_dir} names no best checkpoint ({reason(error)}); leave "
                              "--checkpoint=newest") from error
    if out_dir / name not in checkpoint_folders(out_dir):
        raise CheckpointError(f"{out_dir / 'best'} names no checkpoint that is there; leave "
                              "--checkpoint=newest")
    return open_checkpoint(out_dir / name)


def load_latest(out_dir: Path, *, quarantine: bool = False) -> Checkpoint | None:
    """Returns the newest checkpoint that verifies, None where there is no checkpoint at all.

    A damaged one is passed over with a warning, and the one before is taken; with `quarantine`, for
    the process that holds the run's lock, it is renamed to `.corrupt`, and one of that name that
    verifies after all gets its name back. Raises CheckpointError when none of several is intact, or
    one cannot be read or is of other code: then nothing is renamed.
    """
    folders, damaged, found = checkpoint_folders(out_dir, quarantined=True), {}, None
    for folder in folders:
        try:
            found = open_checkpoint(folder)
            break
        except DamagedCheckpoint as error:
            if folder.exists() and CORRUPT not in folder.name:  # not removed by its trainer
                damaged[folder] = error
    for folder, error in damaged.items():
        renamed = f"renamed to {_set_aside(folder, CORRUPT).name}, " if quarantine else ""
        print(f"warning: {error}; {renamed}trying the one before", file=sys.stderr, flush=True)
    if found is not None and CORRUPT in found.folder.name:
        print(f"note: {found.folder} is intact after all and is taken again", file=sys.stderr,
              flush=True)
        if quarantine:
            plain = found.folder.with_name(found.folder.name.partition(CORRUPT)[0])
            found = found._replace(folder=found.folder.rename(plain))
    if found is not None:
        return found
    if folders:
        names = ", ".join(folder.name for folder in folders)
        raise CheckpointError(f"no checkpoint in {out_dir} is intact ({names}); start again with "
                              "another --out_dir")
    return None


def open_checkpoint(folder: Path) -> Checkpoint:
    """Verifies every file of a checkpoint folder.

    Raises DamagedCheckpoint where one was read and is not what was written, or is not there;
    CheckpointError where one cannot be read, or state.json is as it was written and not known here.
    """
    try:
        manifest = read(folder / MANIFEST, Manifest)
        stray = {p.name for p in folder.glob("*.safetensors")} - manifest.keys()
        of_shards = any("shard" in name for name in manifest)
        needed = {STATE} if of_shards else {STATE, MODEL, OPTIMIZER}
        if lacking := stray | (needed - manifest.keys()):
            raise DamagedCheckpoint(f"{folder / MANIFEST} does not name "
                                    f"{', '.join(sorted(lacking))}")
        for name, recorded in manifest.items():
            entry = (folder / name).lstat()
            if not stat.S_ISREG(entry.st_mode):
                raise CheckpointError(f"{folder / name} is a link or no file; put the file there")
            if entry.st_size != recorded["size"] or file_digest(folder / name) != recorded:
                raise DamagedCheckpoint(f"{folder / name} does not match its checksum")
        return Checkpoint(folder, _read_state(folder))
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {error.filename} is missing") \
            from error
    except OSError as error:
        raise _unreadable(error, folder) from error
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise DamagedCheckpoint(f"checkpoint {folder} is damaged: {error}") from error


def _read_state(folder: Path) -> State:
    """Returns state.json, whose checksum is right: what is wrong in it was written so."""
    try:
        state = read(folder / STATE, State)
        if _NAME.fullmatch(folder.name) and f"step_{state['step']:08d}" not in folder.name:
            raise ValueError(f"it is of step {state['step']}")
        return state
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE} was written by other code or by hand: {error}; "
                              "use the code that wrote it, or move the folder away") from error


def _unreadable(error: OSError, path: Path) -> CheckpointError:
    return CheckpointError(f"{error.filename or path} cannot be read: {reason(error)}; nothing "
                           "was changed: mend that and run the same command again")


def run_state(*, step: int, config: dict, model: dict, tokenizer: str, num_classes: int,
              val_loss: float | None = None, counters: dict | None = None,
              guard: dict | None = None, data: dict | None = None, world_size: int = 1,
              optimizer: dict | None = None, loss_scale: dict | None = None) -> dict:
    """Returns what state.json holds: all that a run needs beside its tensors to go on alike.

    `config` holds all settings and `model` those of the model; `data` is the data's fingerprint,
    `num_classes` the number of real classes among the logits, `optimizer` what of the optimizer's
    state are no tensors.
    """
    return dict(
        format=FORMAT, step=step, val_loss=val_loss,
        tally=counters or dict(steps=0, clipped=0.0),
        guard=guard or dict(in_a_row=[0, 0], refused=0), config=config, model=model,
        data=data or {}, tokenizer=tokenizer, num_classes=num_classes, world_size=world_size,
        **(dict(optimizer=optimizer) if optimizer else {}),
        **(dict(loss_scale=loss_scale) if loss_scale else {}),
        versions=dict(python=platform.python_version(), torch=torch.__version__,
                      numpy=numpy.__version__))


def read_metadata(folder: Path) -> dict:
    """Returns the shape and precision of each tensor in a checkpoint, by name."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader
    return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def _read_shards(folder: Path, tensors: dict[str, Tensor], *, no_dist: bool) -> None:
    """Reads tensors, whole or sharded, in place; `no_dist`: without the other ranks."""
    import torch.distributed.checkpoint as dcp
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(folder)),
                     no_dist=no_dist)
        except dcp.api.CheckpointException as error:
            raise ValueError(str(next(iter(error.failures.values()))[0])) from error


def file_digest(path: Path) -> dict:
    """Returns the size and sha256 of a file."""
    with open_file(path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return dict(size=path.stat().st_size, sha256=digest)


def _set_aside(folder: Path, suffix: str) -> Path:
    aside, n = folder.with_name(folder.name + suffix), 1
    while aside.exists():
        aside, n = folder.with_name(f"{folder.name}{suffix}{n}"), n + 1
    try:
        return folder.rename(aside)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be renamed: {reason(error)}") from error
