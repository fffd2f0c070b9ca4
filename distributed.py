"""Rank facts, wrapping for several ranks, the gradient-sync switch, reductions.

Ranks come from torchrun's environment; without it there is one. The engine is torch's own
DistributedDataParallel, over nccl on CUDA and gloo elsewhere. Knows no loss, data or config file.
"""

import os
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.distributed.nn  # first imported while a group exists, it keeps the group alive
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel


class DeviceError(ValueError):
    """The device asked for is not there."""


@dataclass(frozen=True)
class Ranks:
    """Who this process is among how many, and on which device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this rank prints and writes."""
        return self.rank == 0

    def share(self, total: int) -> tuple[int, int]:
        """First and last + 1 of this rank's contiguous share of `total` rows."""
        return total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size


def world_size() -> int:
    """Number of ranks that torchrun started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_ranks(device: str) -> Ranks:
    """Joins the process group, if there are several ranks, and takes this rank's device.

    `device` is auto, cpu, cuda, cuda:N or mps. Raises DeviceError when it is not there.
    """
    if world_size() > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise DeviceError(f"WORLD_SIZE is {world_size()} but RANK, LOCAL_RANK or MASTER_ADDR is "
                          "not set; start several ranks with torchrun")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    place = _find_device(device, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
    if world_size() > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo",
                                device_id=place if place.type == "cuda" else None)
    return Ranks(int(os.environ.get("RANK", "0")), world_size(), place)


def _find_device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else
                "mps" if torch.backends.mps.is_available() and world_size() == 1 else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DeviceError(f"device = {name!r} is not a device; use auto, cpu, cuda, cuda:N or "
                          "mps") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        index = device.index if device.index is not None else local_rank
        if world_size() > 1 and device.index is not None:
            raise DeviceError(f"device = {name}: with several ranks write cuda; each takes its own")
        if index >= count:
            raise DeviceError(f"device = {name}: number {index} is asked for, {count} CUDA devices "
                              "are there; use --device=cpu or fewer ranks")
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device = mps is not available here; use --device=cpu")
    if device.type not in ("cpu", "mps"):
        raise DeviceError(f"device = {name} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def stop_ranks() -> None:
    """Leaves the process group, if there is one, and ends its threads.

    A gloo thread that outlives the interpreter aborts the process now and then
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, ranks: Ranks) -> nn.Module:
    """The model whose backward averages gradients over ranks; itself when there is one rank."""
    if ranks.world_size == 1:
        return model
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def gradient_sync(model: nn.Module, on: bool):
    """Context in which backward averages gradients over ranks (the last micro-batch) or not."""
    return nullcontext() if on or not isinstance(model, DistributedDataParallel) else \
        model.no_sync()


def sum_over_ranks(tensors: list[Tensor]) -> None:
    """Sums each tensor over ranks, in place."""
    if dist.is_initialized():
        for work in [dist.all_reduce(t, async_op=True) for t in tensors]:
            work.wait()


def on_main(ranks: Ranks, action: Callable[[], object], *errors: type[Exception]):
    """What `action` returns on rank 0, the only one to run it, on every rank.

    When it raises one of `errors` (made of a message alone), every rank raises the same.
    """
    value, error = None, None
    if ranks.is_main:
        try:
            value = action()
        except errors as raised:
            error = raised
    if dist.is_initialized():
        box = [(value, error and (type(error), str(error)))]
        dist.broadcast_object_list(box, src=0)
        value, described = box[0]
        if described and error is None:
            error = described[0](described[1])
    if error is not None:
        raise error
    return value
