"""Finds the micro-batch with which a device trains fastest, by doubling until it is out of memory.

    python -m experiments.micro_batch config/train_gpt2_small_adamw.py --first=8 --json=FILE

Each size has a model of its own, compiled for it where --compile is on. Timed is what a step makes
per micro-batch, a forward and a backward pass on random tokens, in one process; the optimizer and
the batch sizes of a config are left aside. Of a GPU the peak memory is told: of these passes,
parameters and gradients, without the optimizer's state, whose bytes --dry_run counts.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import gc
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch

import bench
import train
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, option
from nanosophia.distributed import Ranks, start_ranks, world_size
from nanosophia.metrics import peak_flops
from nanosophia.options import Config


@dataclass(frozen=True, kw_only=True)
class MicroBatchSettings(Config):
    """train.py's settings and what this command adds."""

    first: int = option(1, "sequences of the first micro-batch", low=1, section="micro-batch")
    last: int = option(1024, "sequences of the largest that is tried", low=1)
    repeats: int = option(7, "timed passes of each size", low=3)
    json: str = option("", "file that receives the measurements; empty = none")

    def check(self) -> None:
        super().check()
        if self.first > self.last:
            raise ConfigError(f"first = {self.first} is more than last = {self.last}: no size is "
                              "left to try; lower first", "first", "last")
        if world_size() > 1:
            raise ConfigError("micro-batches are timed in one process; start it without torchrun")


def search(settings: MicroBatchSettings) -> dict:
    """Returns a row for each size, and the size that did not fit (None: all did)."""
    ranks = start_ranks(settings.device)
    facts = bench.environment(ranks.device)
    peak, rows, size = peak_flops(facts["device_name"]), [], settings.first
    while size <= settings.last:
        try:
            rows.append(time_size(settings, size, ranks, peak))
        except torch.OutOfMemoryError:
            return report(settings, facts, rows, size)
        size *= 2
    return report(settings, facts, rows, None)


def time_size(settings: MicroBatchSettings, size: int, ranks: Ranks, peak: float | None) -> dict:
    """Returns what a pass on so many sequences takes; raises torch.OutOfMemoryError."""
    if ranks.device.type == "cuda":
        torch.compiler.reset()  # what was compiled for another size
        gc.collect()  # and its model, which the compiler leaves in a cycle
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(ranks.device)
    config = replace(Config(**{key: value for key, value in vars(settings).items()
                               if key in Config.__dataclass_fields__}),
                     optimizer="adamw", batch_size=size, total_batch_size=size)
    run = bench.build_run(config, ranks, bench.random_data(config))

    def passes() -> None:
        train.differentiate_largest_micro_batch(run)
        run.model.zero_grad(set_to_none=True)

    passes()  # compiles
    seconds = median(bench.time_action(passes, ranks.device).wall
                     for _ in range(settings.repeats))
    tokens = size * config.block_size
    return dict(size=size, ms=1e3 * seconds, tokens_per_second=tokens / seconds,
                mfu=tokens * run.model.flops_per_token() / seconds / peak if peak else None,
                peak_bytes=bench.peak_memory(ranks.device) if ranks.device.type == "cuda" else None,
                dtype=run.config.dtype,
                parameters=run.model.num_params(non_embedding=False))


def report(settings: MicroBatchSettings, facts: dict, rows: list[dict], failed: int | None) -> dict:
    """Returns the measurements as data."""
    return dict(facts, rows=rows, failed=failed, block_size=settings.block_size)


def table(data: dict) -> str:
    """Returns the measurements as a Markdown table, with the fastest size in words."""
    lines, rows = [], data["rows"]
    if rows:
        best = max(rows, key=lambda row: row["tokens_per_second"])
        lines += [f"{rows[0]['parameters'] / 1e6:.1f}M parameters, sequences of "
                  f"{data['block_size']:,}, {rows[0]['dtype']}, {data['device_name']}, torch "
                  f"{data['torch']}: fastest with batch_size = {best['size']}", ""]
    lines += ["| sequences | ms | tokens/s | MFU | peak MiB |", "|---|---|---|---|---|"]
    for row in rows:
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        peak = f"{row['peak_bytes'] >> 20:,}" if row["peak_bytes"] else "-"
        lines.append(f"| {row['size']} | {row['ms']:.1f} | {row['tokens_per_second']:,.0f} | {mfu} "
                     f"| {peak} |")
    if data["failed"]:
        lines.append(f"| {data['failed']} | out of memory | | | |")
    return "\n".join(lines)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, sources = load(MicroBatchSettings, argv,
                             "python -m experiments.micro_batch [config/FILE.py] [--key=value]")
    for key in ("batch_size", "total_batch_size", "optimizer"):
        if sources.get(key, "").startswith("flag"):
            raise ConfigError(f"{key} has no effect on a micro-batch alone; leave it out, and give "
                              "the sizes as first and last", key)
    if settings.json:
        bench.check_place("json", Path(settings.json))
    found = search(settings)
    bench.publish(found, table(found), settings.json)


if __name__ == "__main__":
    main(sys.argv[1:])
