"""Starts ranks, wraps models in DDP or FSDP2, reduces tensors, and shares stop signals.

Ranks come from torchrun's environment; without it there is one. The engines are torch's own
DistributedDataParallel and fully_shard (FSDP2), over nccl on CUDA and gloo elsewhere. Depends on
no loss, data or config file.
"""

import ctypes
import os
import re
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import pairwise

import torch
import torch.distributed as dist
import torch.nn as nn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from nanosophia.configurator import UserError

BUCKET = 1 << 22  # numbers that one all-reduce takes together


class DeviceError(UserError):
    """The device asked for is not available."""


@dataclass(frozen=True)
class Ranks:
    """This process among all of them, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Returns whether this rank prints and writes."""
        return self.rank == 0

    def share(self, total: int) -> tuple[int, int]:
        """Returns start and stop of this rank's contiguous share of `total` rows."""
        return total * self.rank // self.world_size, total * (self.rank + 1) // self.world_size

    def micro_batches(self, total: int, largest: int) -> list[slice]:
        """Returns this rank's share of `total` rows in parts of at most `largest` rows.

        The parts are alike where that takes less than twice as many of them, and otherwise differ
        by a row. Every rank has as many, but that a rank with fewer rows than parts has no empty
        ones.
        """
        rows = -(-total // self.world_size)  # of the largest share
        least = -(-rows // largest)
        alike = (n for n in range(least, 2 * least) if total % (self.world_size * n) == 0)
        return _split(*self.share(total), next(alike, least))

    def chunks(self, total: int, count: int, largest: int, *, shared: bool = False,
               ) -> list[list[slice]]:
        """Returns this rank's rows of `count` equal chunks of `total` rows, in micro-batches.

        Each rank takes its share of the chunks, or, with `shared` and where there is but one, its
        share of the rows of each.
        """
        size, shared = total // count, shared or count == 1
        members = self if shared else Ranks(0, 1, self.device)  # who work on a chunk
        parts = members.micro_batches(size, largest)
        return [[slice(c * size + part.start, c * size + part.stop) for part in parts]
                for c in range(*((0, count) if shared else self.share(count)))]


def _split(start: int, stop: int, parts: int) -> list[slice]:
    ends = [start + (stop - start) * i // parts for i in range(parts + 1)]
    return [slice(a, b) for a, b in pairwise(ends) if a < b]


def world_size() -> int:
    """Returns the number of ranks that torchrun started, 1 without it."""
    return _from_environment("WORLD_SIZE", 1)


def _from_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch(r"[0-9]{1,6}", text) or (name == "WORLD_SIZE" and int(text) == 0):
        raise DeviceError(f"the environment has {name} = {text[:80]!r}, which is none; unset it, "
                          "or start several ranks with torchrun")
    return int(text)


def start_ranks(device: str) -> Ranks:
    """Joins the process group, if there are several ranks, and takes this rank's device.

    `device` is auto, cpu, cuda, cuda:N or mps. Raises DeviceError when it is not available.
    """
    if world_size() > 1 and not {"RANK", "LOCAL_RANK", "MASTER_ADDR"} <= os.environ.keys():
        raise DeviceError(f"WORLD_SIZE is {world_size()} but RANK, LOCAL_RANK or MASTER_ADDR is "
                          "not set; start several ranks with torchrun")
    rank, local_rank = (_from_environment(name, 0) for name in ("RANK", "LOCAL_RANK"))
    if rank >= world_size():
        raise DeviceError(f"the environment has RANK = {rank} and WORLD_SIZE = {world_size()}; "
                          "unset them, or start several ranks with torchrun")
    if world_size() > 1:
        _from_environment("MASTER_PORT", -1)
    place = _find_device(device, local_rank)
    if place.type == "cuda":
        try:
            torch.cuda.set_device(place)  # begins to use the driver
        except RuntimeError as error:  # one that is too old, a card that is taken
            raise DeviceError(f"device = {device}: {' '.join(str(error).split())}; use "
                              "--device=cpu, or a torch built for this driver") from None
    if place.type == "cpu":
        _keep_freed_memory()
    if world_size() > 1 and not dist.is_initialized():
        import_module("torch.distributed.nn")  # imported later, it would keep the group alive
        dist.init_process_group("nccl" if place.type == "cuda" else "gloo",
                                store=_attempt_store(rank), rank=rank, world_size=world_size(),
                                device_id=place if place.type == "cuda" else None)
    return Ranks(rank, world_size(), place)


def _attempt_store(rank: int) -> dist.Store:
    """Returns a store without keys of earlier attempts, for the ranks that run now.

    torchrun keeps one store over all restarts, and torch gives the keys of each attempt the same
    names, so restarted ranks would read the addresses of killed ones and connect to those. Here
    rank 0 draws a prefix, and another rank takes it once this rank 0, not a killed one, has
    answered. TORCHELASTIC_RESTART_COUNT is no such prefix: each machine counts its own failures.
    """
    store, _, _ = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    own = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", own)
        for other in range(1, world_size()):
            store.set(store.get(f"{own}/{other}").decode(), "answered")  # get waits for the key
        return dist.PrefixStore(own, store)
    while not store.check([own]):
        attempt = store.get("attempt").decode()
        store.set(f"{attempt}/{rank}", own)
        time.sleep(0.05)
    return dist.PrefixStore(attempt, store)


def _keep_freed_memory() -> None:
    """Makes glibc's malloc keep up to 512 MiB of freed tensors, of up to 32 MiB each.

    It otherwise returns them to the system, and page faults for the next ones cost up to as much
    as the arithmetic on them. Larger tensors still go back at once: kept, they leave holes, and
    memory grows from one evaluation to the next.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:  # Linux
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt(M_MMAP_THRESHOLD, 32 << 20)
        mallopt(M_TRIM_THRESHOLD, 512 << 20)


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
    if device.type not in ("cpu", "mps") or device.index is not None:
        raise DeviceError(f"device = {name} is not supported; use auto, cpu, cuda, cuda:N or mps")
    return device


def stop_ranks() -> None:
    """Leaves the process group, if there is one, and ends its threads.

    A gloo thread that outlives the interpreter aborts the process now and then
    (https://github.com/pytorch/pytorch/pull/179291).
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def wrap(model: nn.Module, ranks: Ranks, *, shards: int = 1,
         blocks: Sequence[nn.Module] = (), precision: torch.dtype | None = None) -> nn.Module:
    """Returns the model whose backward averages gradients over ranks; of one rank the model.

    Two `shards` or more split parameters, gradients and with them the optimizer's state over as
    many neighbouring ranks (FSDP2), in place; where there are more ranks, each such group has a
    copy. Each of `blocks` is gathered when it runs, in `precision` if it is given, and its
    gradients are reduced in the parameters' own.
    """
    if ranks.world_size == 1:
        return model.to(ranks.device)
    if shards > 1:
        # Imported where it is needed, like the rest of FSDP2: it takes half a second.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
        dtypes = {p.dtype for p in model.parameters()}
        policy = MixedPrecisionPolicy(param_dtype=precision, reduce_dtype=dtypes.pop()) \
            if precision else MixedPrecisionPolicy()
        copies = ranks.world_size // shards
        mesh = init_device_mesh(ranks.device.type, (shards,)) if copies == 1 else init_device_mesh(
            ranks.device.type, (copies, shards), mesh_dim_names=("copies", "shards"))
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy)
        # Ids, and the uniform numbers that labels are drawn by, reach the model as they are.
        fully_shard(model, mesh=mesh, mp_policy=replace(policy, cast_forward_inputs=False))
        return model
    model.to(ranks.device)
    ids = [ranks.device.index] if ranks.device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)


def gradient_sync(model: nn.Module, on: bool):
    """Returns a context in which backward averages gradients over ranks, or does not."""
    if hasattr(model, "set_requires_gradient_sync"):  # of FSDP2
        model.set_requires_gradient_sync(on)
    return model.no_sync() if isinstance(model, DistributedDataParallel) and not on else \
        nullcontext()


def sharded_gradient(model: nn.Module, ranks: Ranks) -> Callable:
    """Returns what stands in for `sophia.summed_gradient` where `wrap` has split the parameters.

    The gradient of the sum of all losses, summed over ranks, each rank its shard, and the number of
    this rank's labels. `.grad` must be None before, and is None again afterwards.
    """
    def summed_gradient(losses, params: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
        losses, count = list(losses), 0
        for i, loss_fn in enumerate(losses):
            with gradient_sync(model, on=i == len(losses) - 1):
                with torch.enable_grad():
                    loss, n = loss_fn()
                loss.backward()
            count = count + n
        gradient = [torch.zeros_like(p) if p.grad is None else p.grad.mul_(ranks.world_size)
                    for p in params]  # the reduction took the mean
        for p in model.parameters():
            p.grad = None
        return gradient, count

    return summed_gradient


def reshard(model: nn.Module) -> None:
    """Frees what a sharded model gathered in a forward pass that no backward follows."""
    if hasattr(model, "reshard"):  # of FSDP2
        model.reshard()


def is_sharded(x: Tensor) -> bool:
    """Returns whether each rank holds its part of the tensor, which then is a DTensor."""
    return hasattr(x, "to_local")


def to_local(x):
    """Returns this rank's part of a sharded tensor, and anything else as it is."""
    return x.to_local() if is_sharded(x) else x


def full_tensor(x: Tensor) -> Tensor:
    """Returns a sharded tensor gathered on every rank, and any other as it is."""
    return x.full_tensor() if is_sharded(x) else x


def shard_like(whole: Tensor, p: Tensor) -> Tensor:
    """Returns a tensor that every rank has whole, split as `p` is."""
    if not is_sharded(p):
        return whole
    from torch.distributed.tensor import DTensor, Replicate
    return DTensor.from_local(whole, p.device_mesh, [Replicate()] * p.device_mesh.ndim,
                              run_check=False).redistribute(placements=p.placements)


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Sums each tensor over ranks, in place; small ones are sent together."""
    if not dist.is_initialized():
        return
    sent = []
    for bucket in _buckets(tensors):
        flat = bucket[0] if len(bucket) == 1 else torch.cat([t.flatten() for t in bucket])
        sent.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in sent:
        work.wait()
        if len(bucket) > 1:
            for t, total in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                t.copy_(total.view_as(t))


def _buckets(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
    """Returns the tensors in groups of one type and at most BUCKET numbers, but for larger ones."""
    found: list[list[Tensor]] = []
    for t in sorted(tensors, key=lambda t: str(t.dtype)):
        last = found[-1] if found else []
        if last and last[0].dtype == t.dtype and sum(x.numel() for x in (*last, t)) <= BUCKET:
            last.append(t)
        else:
            found.append([t])
    return found


def on_main(ranks: Ranks, action: Callable[[], object], *errors: type[Exception], group=None):
    """Runs `action` on rank 0 alone and returns its value on every rank.

    When it raises one of `errors` (made of a message alone), every rank raises the same. `group` is
    the process group to communicate in, by default the first.
    """
    value, error = None, None
    if ranks.is_main:
        try:
            value = action()
        except errors as raised:
            error = raised
    if ranks.world_size > 1:
        message = [(value, error and (type(error), str(error)))]
        dist.broadcast_object_list(message, src=0, group=group)
        value, raised_there = message[0]
        if raised_there and error is None:
            error = raised_there[0](raised_there[1])
            error.everywhere = True
    if error is not None:
        raise error
    return value


def new_gloo_group():
    """Returns a new gloo process group of all ranks, for another thread to communicate in."""
    return dist.new_group(backend="gloo")


def widest_float(device: torch.device) -> torch.dtype:
    """Returns the widest floating-point type of a device: float64, which MPS lacks."""
    return torch.float32 if device.type == "mps" else torch.float64


def host_copy(tensors: dict[str, Tensor], buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns copies in host memory, shards still as shards; `buffers` is reused and extended."""
    for name, x in tensors.items():
        x, kept = to_local(x).detach(), buffers.get(name)
        if kept is None or (kept.shape, kept.dtype) != (x.shape, x.dtype):
            buffers[name] = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        buffers[name].copy_(x, non_blocking=x.is_cuda)  # MPS would go on, and nothing wait for it
    if torch.cuda.is_available():
        torch.cuda.synchronize()

    def as_it_was(name: str, x: Tensor) -> Tensor:
        if not is_sharded(x):
            return buffers[name]
        from torch.distributed.tensor import DTensor
        mesh = _host_mesh(tuple(x.device_mesh.shape), x.device_mesh.mesh_dim_names)
        return DTensor.from_local(buffers[name], mesh, x.placements, run_check=False,
                                  shape=x.shape, stride=x.stride())

    return {name: as_it_was(name, x) for name, x in tensors.items()}


@cache
def _host_mesh(shape: tuple[int, ...], names: tuple[str, ...] | None):
    """Returns a mesh of all ranks in host memory; kept, since several dimensions make groups."""
    from torch.distributed.device_mesh import init_device_mesh
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def zeros_like_shards(p: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Returns zeros of a full shape, split as `p` is if they have as many rows."""
    if is_sharded(p) and shape and shape[0] == p.shape[0] and len(shape) == p.dim():
        from torch.distributed.tensor import zeros
        return zeros(shape, dtype=dtype, device_mesh=p.device_mesh, placements=p.placements)
    return torch.zeros(shape, dtype=dtype, device=p.device if shape else "cpu")


class StopSignals:
    """Turns SIGTERM, SIGUSR1 and SIGINT into a stop request that all ranks honour at one step.

    A context. Each step calls `start_poll` when it begins and `poll` when it ends. A second signal,
    2 seconds or more after the first, ends the process at once (nearer ones are echoes: torchrun
    passes on what the terminal has sent already).
    """

    NUMBERS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self, ranks: Ranks):
        self._signal, self._since = 0, 0.0
        self._group = new_gloo_group() if ranks.world_size > 1 else None
        self._buffer, self._pending = torch.zeros(1, dtype=torch.int32), None

    def __enter__(self) -> "StopSignals":
        main_thread = threading.current_thread() is threading.main_thread()
        self._before = {n: signal.signal(n, self._receive) for n in self.NUMBERS} \
            if main_thread else {}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: object) -> None:
        if not self._signal:
            self._signal, self._since = number, time.monotonic()
        elif time.monotonic() - self._since >= 2:
            os._exit(128 + number)

    def start_poll(self) -> None:
        """Tells the other ranks which signal this one has received, without waiting for them."""
        self._buffer.fill_(self._signal)
        if self._group is not None:
            self._pending = dist.all_reduce(self._buffer, dist.ReduceOp.MAX, group=self._group,
                                            async_op=True)

    def poll(self) -> int:
        """Returns the signal that some rank told in `start_poll`, or 0; the same on every rank."""
        if self._group is None:
            return self._signal
        self._pending.wait()
        return int(self._buffer.item())
