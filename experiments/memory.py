"""Compares the memory that --dry_run counts with what torch allocates in a step.

    python -m experiments.memory [--device=cuda] [--json=FILE]

A step with an estimate is made after one that makes the optimizer's state. On the CPU the storages
that operations make are counted while they live, on CUDA the allocator says its peak.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import sys
from dataclasses import dataclass

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from bench import build_run, publish, random_data
from experiments.archive import measured
from experiments.exactness import device_name
from model import cross_entropy
from nanosophia import dry_run
from nanosophia.command import command
from nanosophia.configurator import Settings, load, option
from nanosophia.distributed import start_ranks
from nanosophia.optimizer_state import flatten_state
from nanosophia.optimizers import with_own_defaults
from nanosophia.options import Config

MODEL = ("--n_layer=6", "--n_head=4", "--n_embd=256", "--block_size=256", "--vocab_size=8192",
         "--total_batch_size=8", "--batch_size=4", "--hessian_interval=1", "--dtype=bfloat16")
CASES = {
    "AdamW": ("--optimizer=adamw",),
    "AdamW, loss in chunks of 256": ("--optimizer=adamw", "--loss_chunk=256"),
    "AdamW, activation checkpointing": ("--optimizer=adamw", "--activation_checkpointing"),
    "Sophia-G": ("--optimizer=sophiag", "--hessian_batch_size=4"),
    "Sophia-G, two chunks": ("--optimizer=sophiag", "--hessian_batch_size=8", "--hessian_chunks=2"),
    "Sophia-H": ("--optimizer=sophiah", "--hessian_batch_size=4"),
    "Muon": ("--optimizer=muon",), "metric Muon": ("--optimizer=metric_muon",)}


@dataclass(frozen=True, kw_only=True)
class MemorySettings(Settings):
    """Settings of `python -m experiments.memory`."""

    device: str = option("cpu", "cpu, cuda or cuda:N", section="memory")
    json: str = option("", "file that receives the figures; empty = none")


class Allocated(TorchDispatchMode):
    """Storages of at least `smallest` bytes that operations make within it, while they live."""

    def __init__(self, smallest: int = 0):
        super().__init__()
        self.smallest, self.made, self.most = smallest, {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        there = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs))
                 if isinstance(x, torch.Tensor)}
        found = func(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            if (isinstance(x, torch.Tensor) and x.untyped_storage().nbytes() >= self.smallest
                    and x.untyped_storage()._cdata not in there):  # no view, not in place
                reference = StorageWeakRef(x.untyped_storage())
                self.made[reference.cdata] = (reference, x.untyped_storage().nbytes())
        self.most = max(self.most, self.alive())
        return found

    def alive(self) -> int:
        """Bytes at this moment; `most` is the largest it has been."""
        self.made = {k: v for k, v in self.made.items() if not v[0].expired()}
        return sum(size for _, size in self.made.values())


def measure(flags: list[str]) -> dict:
    """Returns the bytes that are said and those that are allocated at the peak of a step."""
    config, sources = load(Config, flags, "")
    config, ranks = with_own_defaults(config, sources), start_ranks(config.device)
    run = build_run(config, ranks, random_data(config))
    if not config.loss_chunk:  # nor where the CPU would take one
        run.model.loss_fn = cross_entropy
    said = dry_run.memory(dry_run.plan(run.config), 1).peak
    train.train_step(run, 0)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
        train.train_step(run, 1)
        return dict(said=said, allocated=torch.cuda.max_memory_allocated(ranks.device))
    kept = [*run.model.parameters(), *flatten_state(run.optimizer, run.beginning)[0].values()]
    before = sum({x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}.values())
    with Allocated() as allocated:
        train.train_step(run, 1)
    return dict(said=said, allocated=before + allocated.most)


def table(report: dict) -> str:
    """Returns the report as a Markdown table."""
    lines = [f"{report['device_name']}, torch {report['torch']}; {' '.join(MODEL)}", "",
             "| | said by --dry_run, MiB | allocated, MiB | said / allocated |", "|---" * 4 + "|"]
    for name, row in report["rows"].items():
        lines.append(f"| {name} | {row['said'] / 2**20:.1f} | {row['allocated'] / 2**20:.1f} | "
                     f"{row['said'] / row['allocated']:.3f} |")
    return "\n".join(lines)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(MemorySettings, argv, "python -m experiments.memory [--key=value]")
    rows = {}
    for name, flags in CASES.items():
        own = [f for f in MODEL if not (f.startswith("--hessian") and "sophia" not in flags[0])]
        rows[name] = measure([*own, *flags, f"--device={settings.device}"])
    report = dict(rows=rows, torch=torch.__version__,
                  device_name=device_name(start_ranks(settings.device).device))
    publish(report | measured("memory", argv), table(report), settings.json)


if __name__ == "__main__":
    main(sys.argv[1:])
