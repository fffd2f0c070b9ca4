"""Command that estimates a run before it starts: parameters, FLOPs, memory per rank, days.

    python train.py CONFIG --dry_run
    python -m nanosophia.dry_run config/train_*.py    one line per config, as a Markdown table

The model and the optimizer are built on torch's meta device, where tensors have shapes and no
memory: counts of parameters and optimizer state are those of the real ones. Activations and days
are computed; what the allocator, the kernels' workspaces and the process itself add is not in them.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch

from model import GPT
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load
from nanosophia.dataloader import DataError, open_dataset
from nanosophia.distributed import Ranks, on_main
from nanosophia.estimators import Estimator
from nanosophia.memory import estimate_bytes, largest_estimate_rows, step_bytes
from nanosophia.metrics import peak_flops
from nanosophia.optimizer_state import flatten_state
from nanosophia.optimizers import build, check, with_own_defaults
from nanosophia.options import Config, padded_vocab_size
from nanosophia.packages import OptimizerError
from nanosophia.tokenizer import GPT2_CLASSES

GPUS = (1, 8, 10, 64, 256)  # 10: the paper's machines of A5000s
GIB = 2**30
HOST_ROWS = 15  # of a micro-batch where there is no GPU
MOST = 0.9  # of a device's memory; the rest is for what is not counted here
# Tokens of training data where it is not prepared here: nanoGPT's README; Biderman et al. 2023,
# arXiv:2304.01373, section 2.1.
PUBLISHED_TOKENS = {"openwebtext": 9_035_582_198, "pile": 300_000_000_000}
PUBLISHED_CLASSES = {"openwebtext": GPT2_CLASSES, "pile": 50277}  # GPT-NeoX's tokenizer


class Plan(NamedTuple):
    """Counts that do not depend on the number of GPUs."""

    config: Config
    parameters: int
    block_parameters: int  # of one block
    state_bytes: int  # of the optimizer, per copy of the model
    flops_per_token: int
    estimate_share: float  # of the training FLOPs, that estimates add
    estimates: bool
    second_derivatives: bool
    data_tokens: int | None
    num_classes: int
    is_prepared: bool


class Memory(NamedTuple):
    """Bytes on each rank at the peak of a step, which is that of training or of the estimate."""

    parameters: int
    state: int
    training: int  # gradients and activations
    estimate: int  # tensors per parameter and activations

    @property
    def peak(self) -> int:
        """Returns the bytes at the worst moment."""
        return self.parameters + self.state + max(self.training, self.estimate)


def plan(config: Config) -> Plan:
    """Returns the counts of a config; nothing is allocated and no data is needed."""
    tokens = PUBLISHED_TOKENS.get(config.dataset)
    vocab_size, is_prepared = PUBLISHED_CLASSES.get(config.dataset, GPT2_CLASSES), False
    try:
        data = open_dataset(config.dataset, config.block_size, config.bare_tokens)
        tokens, vocab_size, is_prepared = len(data.train), data.vocab_size, True
    except DataError:
        pass
    config = replace(config, compile_optimizer="off", vocab_size=config.vocab_size or
                     padded_vocab_size(vocab_size))
    with torch.device("meta"):
        model = GPT(config.model)
    optimizer, estimator, _ = build(config, model, num_classes=vocab_size)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    if estimator is not None:
        optimizer.update_hessian([p.grad for p in optimizer.parameters()])
    try:
        optimizer.step()
        state = sum(x.nbytes for x in flatten_state(optimizer)[0].values())
    except OptimizerError:  # of a package, that needs numbers to step: as large as AdamW's
        state = 8 * model.num_params(non_embedding=False)
    share = estimate_share(config, estimator, model.flops_per_token())
    return Plan(config, model.num_params(non_embedding=False),
                sum(p.numel() for p in model.transformer.h[0].parameters()), state,
                model.flops_per_token(), share, estimator is not None,
                estimator is not None and estimator.second_derivatives, tokens, vocab_size,
                is_prepared)


def estimate_share(config: Config, estimator: Estimator | None, flops_per_token: int) -> float:
    """Returns what the curvature estimates of an average step compute, over its training FLOPs.

    A row costs one gradient pass, in Hutchinson's estimate three: forward, backward, and the
    backward of both, which is twice as much as they. In it attention, 12 L d T per token of the
    training FLOPs, is computed anew, which costs it two passes more (torch's flop counter agrees).
    """
    if estimator is None:
        return 0.0
    c, passes = config, 1.0
    if estimator.second_derivatives:
        attention = 12 * c.n_layer * c.n_embd * c.block_size / flops_per_token
        passes = 3 + (0 if c.dropout else 2 * attention)
    return passes * c.hessian_batch_size / c.total_batch_size / c.hessian_interval


def training_rows(config: Config, gpus: int) -> int:
    """Returns the sequences of the largest micro-batch on each of so many GPUs."""
    return _largest(_last(gpus).micro_batches(config.total_batch_size, config.batch_size))


def estimate_chunks(plan: Plan, gpus: int) -> list[list[slice]]:
    """Returns a GPU's chunks of an estimate, in micro-batches."""
    c = plan.config
    rows = largest_estimate_rows(c, plan.parameters, plan.second_derivatives)
    return _last(gpus).chunks(c.hessian_batch_size, c.hessian_chunks, rows,
                              shared=c.shards(gpus) > 1)


def estimate_rows(plan: Plan, gpus: int) -> int:
    """Returns the sequences of the largest micro-batch of an estimate, 0 without estimates."""
    return _largest(chain(*estimate_chunks(plan, gpus))) if plan.estimates else 0


def usable(config: Config, device_bytes: float) -> float:
    """Returns the bytes that a peak as `memory` counts it may have on a device.

    It counts for bfloat16; in float32 all is taken for twice as large, in float64 for four times.
    """
    return MOST * device_bytes / dict(float32=2, float64=4).get(config.dtype, 1)


def fitted(plan: Plan, gpus: int, room: float = 0) -> Plan:
    """Returns the plan with a batch_size where it has none: the largest that so many ranks may have
    and whose peak is at most `room` bytes, by default nine tenths of dry_run_memory.

    Where not even one sequence fits, it is 1.
    """
    c = plan.config
    if c.batch_size:
        return plan
    room = room or usable(c, c.dry_run_memory * GIB)
    for rows in range(-(-c.total_batch_size // gpus), 0, -1):
        plan = plan._replace(config=replace(c, batch_size=rows))
        if not refusal(plan.config, gpus) and memory(plan, gpus).peak <= room:
            break
    return plan


def choose_batch_size(config: Config, ranks: Ranks) -> tuple[Config, list[str]]:
    """Chooses batch_size where it is 0, on a GPU by its free memory; returns a note as well.

    In float32 all is taken for twice as large as in bfloat16.
    """
    if config.batch_size:
        return config, []
    free = on_main(ranks, lambda: free_bytes(ranks.device))
    if free is None:
        rows = min(HOST_ROWS, -(-config.total_batch_size // ranks.world_size))
        return replace(config, batch_size=rows), []
    rows = fitted(plan(config), ranks.world_size, usable(config, free)).config.batch_size
    return replace(config, batch_size=rows), [
        f"batch_size = {rows} is the largest that fits the {free / GIB:.1f} GiB which are free, by "
        "the count of --dry_run; where memory runs out, give a lower one, or --loss_chunk=1024"]


def free_bytes(device: torch.device) -> int | None:
    """Returns the free memory of a CUDA device, None of others, where memory is the host's."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _last(gpus: int) -> Ranks:
    """Returns the last of so many ranks, whose share of rows is none of the smaller ones."""
    return Ranks(gpus - 1, gpus, torch.device("meta"))


def _largest(parts: Iterable[slice]) -> int:
    return max((part.stop - part.start for part in parts), default=1)


def memory(plan: Plan, gpus: int) -> Memory:
    """Returns bytes per rank: float32 parameters, gradients, state; bfloat16 copies to compute."""
    config, N, B = plan.config, plan.parameters, plan.block_parameters
    shards = config.shards(gpus)
    copies = 2 * N if shards == 1 else 2 * (N - config.n_layer * B + 2 * B)  # root's, two blocks'

    def unreduced(micro_batches: list[slice]) -> int:
        """Gradients that wait to be reduced: of two blocks, or of all where they accumulate."""
        return 0 if shards == 1 else 4 * N if len(micro_batches) > 1 else copies

    rows = _last(gpus).micro_batches(config.total_batch_size, config.batch_size)
    training = step_bytes(config, N // shards, _largest(rows)) + unreduced(rows)
    estimate = estimate_bytes(config, N // shards, estimate_rows(plan, gpus),
                              plan.second_derivatives) + max(
        map(unreduced, estimate_chunks(plan, gpus)), default=0) if plan.estimates else 0
    return Memory(4 * N // shards + copies, plan.state_bytes // shards, training, estimate)


def bytes_beside_training(config: Config, gpus: int) -> int:
    """Returns what a rank needs beside parameters, gradients and the passes of a training step: the
    optimizer's state, and what an estimate takes more."""
    counted = plan(config)
    found = memory(counted, gpus)
    return found.state + max(0, found.estimate - found.training)


# What to try in turn where memory is short: the first costs nothing but shorter micro-batches, the
# last computes every block twice.
REMEDIES = (dict(), dict(loss_chunk=1024), dict(activation_checkpointing=True),
            dict(loss_chunk=1024, activation_checkpointing=True))


def remedy(plan: Plan, gpus: int) -> str:
    """Returns flags that bring the peak below dry_run_memory, or that none do; "" where it is."""
    c, room = plan.config, usable(plan.config, plan.config.dry_run_memory * GIB)
    if memory(fitted(plan, gpus), gpus).peak <= room:
        return ""
    for change in REMEDIES:
        smaller = fitted(plan._replace(config=replace(c, batch_size=0, **change)), gpus, room)
        if memory(smaller, gpus).peak <= room:
            flags = [f"--batch_size={smaller.config.batch_size}"]
            flags += ["--loss_chunk=1024"] * ("loss_chunk" in change)
            return " ".join(flags + ["--activation_checkpointing"] * (
                "activation_checkpointing" in change))
    more = "" if refusal(replace(c, parallel="fsdp"), 8) else "; --parallel=fsdp may on more GPUs"
    return f"not even --loss_chunk and --activation_checkpointing do{more}"


def days(plan: Plan, gpus: int) -> float:
    """Returns the days of training at `dry_run_mfu` of the peak of a `dry_run_gpu`.

    The others wait for the rank with the most rows.
    """
    c = plan.config
    tokens = -(-c.total_batch_size // gpus) * c.block_size
    flops = plan.flops_per_token * (1 + plan.estimate_share) * tokens * c.max_iters
    return flops / (peak_flops(c.dry_run_gpu) * c.dry_run_mfu) / 86400


def refusal(config: Config, gpus: int) -> str:
    """Returns why train.py would refuse so many ranks, nothing where it would not."""
    try:
        config.check_world(gpus)
        check(config, gpus)
    except ConfigError as error:
        return str(error)
    return ""


def report(config: Config) -> str:
    """Returns the page that --dry_run prints."""
    p = plan(config)
    c = p.config
    lines = [
        f"model   {p.parameters:,} parameters, {p.flops_per_token / 1e9:,.2f} GFLOP per token "
        "(6 N + 12 L d T, forward and backward)",
        f"step    {c.tokens_per_step:,} tokens ({c.total_batch_size} x {c.block_size}); "
        f"{c.max_iters:,} steps are {c.max_iters * c.tokens_per_step / 1e9:,.2f}B tokens",
        f"data    {c.dataset}: " + (
            f"{p.data_tokens:,} tokens, {p.data_tokens // c.tokens_per_step:,} steps per epoch"
            if p.data_tokens else "not prepared, so the steps of an epoch are not known"),
    ]
    if not p.is_prepared and not config.vocab_size:
        known = "that it has when prepared" if c.dataset in PUBLISHED_CLASSES else \
            "of GPT-2, a guess: give --vocab_size, or prepare it first"
        lines.append(f"        not prepared here: taken for the {p.num_classes:,} classes {known}")
    if p.estimates:
        lines.append(f"estimates add {p.estimate_share:.1%} to the FLOPs")
    lines += ["", f"GiB per rank under --parallel={c.parallel}: the peak is parameters, state and",
              "the larger of training and estimate; rows are those of their micro-batches. Days on",
              f"{c.dry_run_gpu}s at {c.dry_run_mfu:.0%} of their peak.", "",
              f"{'GPUs':>5} {'rows':>8} {'param.':>7} {'state':>7} {'training':>9} "
              f"{'estimate':>9} {'peak':>7} {'days':>9}"]
    for gpus in GPUS:
        if reason := refusal(c, gpus):
            lines.append(f"{gpus:>5} refused: {reason}")
            continue
        fit = fitted(p, gpus)
        m, rows = memory(fit, gpus), f"{training_rows(fit.config, gpus)}"
        if p.estimates:
            rows += f", {estimate_rows(fit, gpus)}"
        lines.append(f"{gpus:>5} {rows:>8} {m.parameters / GIB:7.3g} {m.state / GIB:7.3g} "
                     f"{m.training / GIB:9.3g} {m.estimate / GIB:9.3g} {m.peak / GIB:7.3g} "
                     f"{days(p, gpus):9.3g}")
    for gpus in GPUS:
        if not refusal(c, gpus) and (flags := remedy(p, gpus)):
            lines += ["", f"{gpus} x {c.dry_run_memory:g} GiB are too few; what fits: {flags}"]
            break
    uneven = [str(gpus) for gpus in GPUS if c.total_batch_size % gpus and not refusal(c, gpus)]
    if uneven:
        near = [g for g in range(1, GPUS[-1] + 1) if c.total_batch_size % g == 0][-6:]
        lines += ["", f"total_batch_size = {c.total_batch_size} does not divide over "
                      f"{' or '.join(uneven)} GPUs, so some wait for others there; it does over "
                      f"{', '.join(map(str, near))}"]
    return "\n".join(lines)


def table(configs: dict[str, Config]) -> str:
    """Returns a Markdown table with one line per config."""
    lines = ["| config | parameters | GFLOP / token | tokens / step | steps / epoch | "
             f"GiB per rank at {', '.join(map(str, GPUS))} GPUs | days at 8 | at 64 |",
             "|---|---|---|---|---|---|---|---|"]
    for name, config in configs.items():
        p = plan(config)
        c = p.config
        epoch = f"{p.data_tokens // c.tokens_per_step:,}" if p.data_tokens else "?"
        room = ", ".join("-" if refusal(c, g) else f"{memory(fitted(p, g), g).peak / GIB:.3g}"
                         for g in GPUS)
        eight, many = ("-" if refusal(c, g) else f"{days(p, g):,.3g}" for g in (8, 64))
        lines.append(
            f"| {name} | {p.parameters / 1e6:,.1f}M | {p.flops_per_token / 1e9:.2f} | "
            f"{c.tokens_per_step:,} | {epoch} | {room} | {eight} | {many} |")
    return "\n".join(lines)


USAGE = "python -m nanosophia.dry_run config/FILE.py... [--key=value]"


@command()
def main(argv: list[str]) -> None:
    """Runs the command: config files, and flags for all of them."""
    files, flags = ([a for a in argv if a.startswith("-") == dash] for dash in (False, True))
    if not files:
        load(Config, flags, USAGE)  # answers --help
        raise ConfigError("give config files: python -m nanosophia.dry_run config/*.py")
    configs, stems = {}, [Path(file).stem for file in files]
    for file, stem in zip(files, stems, strict=True):
        config, sources = load(Config, [file, *flags], USAGE)
        config = with_own_defaults(config, sources)
        check(config, world_size=1)
        configs[stem if stems.count(stem) == 1 else file] = config
    print(table(configs))


if __name__ == "__main__":
    main(sys.argv[1:])
