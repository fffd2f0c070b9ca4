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
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from model import GPT
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load
from nanosophia.dataloader import DataError, open_dataset
from nanosophia.distributed import Ranks
from nanosophia.estimators import Estimator
from nanosophia.metrics import peak_flops
from nanosophia.optimizers import build, check, with_own_defaults
from nanosophia.options import Config, padded_vocab_size
from nanosophia.tokenizer import GPT2_CLASSES

GPUS = (1, 8, 10, 64, 256)  # 10: the paper's machines of A5000s
GIB = 2**30
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
    data_tokens: int | None
    num_classes: int
    is_prepared: bool


class Memory(NamedTuple):
    """Bytes on each rank at the peak of a step."""

    parameters: int
    gradients: int
    state: int
    estimate: int
    activations: int


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
    optimizer, estimator = build(config, model, num_classes=vocab_size)
    for p in model.parameters():
        p.grad = torch.empty_like(p)
    if estimator is not None:
        optimizer.update_hessian([p.grad for p in optimizer.parameters()])
    optimizer.step()
    state = sum(x.nbytes for values in optimizer.state.values() for x in values.values()
                if isinstance(x, torch.Tensor))
    share = estimate_share(config, estimator)
    return Plan(config, model.num_params(non_embedding=False),
                sum(p.numel() for p in model.transformer.h[0].parameters()), state,
                model.flops_per_token(), share, estimator is not None, tokens, vocab_size,
                is_prepared)


def estimate_share(config: Config, estimator: Estimator | None) -> float:
    """Returns what the curvature estimates of an average step compute, over its training FLOPs.

    A row costs one gradient pass, in Hutchinson's estimate three: forward, backward, and the
    backward of both, which is twice as much as they (torch's flop counter says 3.00 too).
    """
    if estimator is None:
        return 0.0
    passes = 3 if estimator.second_derivatives else 1
    return passes * config.hessian_batch_size / config.total_batch_size / config.hessian_interval


def rows_per_rank(config: Config, gpus: int) -> int:
    """Returns the sequences of the largest micro-batch on each of so many GPUs."""
    last = Ranks(gpus - 1, gpus, torch.device("meta"))  # whose share is none of the smaller ones
    return max((part.stop - part.start for part in last.micro_batches(
        config.total_batch_size, config.batch_size)), default=1)


def memory(plan: Plan, gpus: int) -> Memory:
    """Returns bytes per rank: float32 parameters, gradients, state; bfloat16 copies to compute."""
    config, N, B = plan.config, plan.parameters, plan.block_parameters
    rows = rows_per_rank(config, gpus)
    estimate = 4 * N if plan.estimates else 0
    activations = activation_bytes(config) * rows + _chunk_bytes(config)
    if config.parallel == "fsdp" and gpus > 1:
        gathered = 2 * (N - config.n_layer * B + 2 * B)  # the root's, this block's and the next's
        return Memory(4 * N // gpus + gathered, 4 * N // gpus + gathered,
                      plan.state_bytes // gpus, estimate // gpus, activations)
    return Memory(4 * N + 2 * N, 4 * N, plan.state_bytes, estimate, activations)


def activation_bytes(config: Config) -> int:
    """Returns the bytes that the backward pass needs of one sequence under bfloat16 autocast.

    Per token and block, in units of n_embd: two float32 inputs of layer norms (8), their outputs
    (4), q, k, v (6) and the attention's output (2), both sides of the GELU (16), all in bfloat16
    but the first; and 4 bytes per head. Checkpointing keeps a block's float32 input and one block.
    The head: its input twice (6), logits in bfloat16 and float32, their softmax in float32; with
    `loss_chunk` these are not each sequence's.
    """
    c = config
    block = c.block_size * (36 * c.n_embd + 4 * c.n_head + 16)
    blocks = c.n_layer * 4 * c.block_size * c.n_embd + block if c.activation_checkpointing else \
        c.n_layer * block
    logits = 0 if c.loss_chunk else 2 + 4 + 4
    return blocks + c.block_size * (6 * c.n_embd + logits * c.vocab_size)


def _chunk_bytes(config: Config) -> int:
    """Returns the bytes of a loss in chunks: logits, probabilities, gradients of both factors."""
    c = config
    if not c.loss_chunk:
        return 0
    return c.vocab_size * (c.loss_chunk * (2 + 4 + 2) + 4 * c.n_embd)


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
    lines += ["", f"GiB per rank under --parallel={c.parallel}, and days on {c.dry_run_gpu}s at "
                  f"{c.dry_run_mfu:.0%} of their peak:", "",
              f"{'GPUs':>5} {'rows':>5} {'param.':>7} {'grad.':>7} {'state':>7} {'estim.':>7} "
              f"{'activ.':>7} {'total':>7} {'days':>9}"]
    for gpus in GPUS:
        if reason := refusal(c, gpus):
            lines.append(f"{gpus:>5} refused: {reason}")
            continue
        m = memory(p, gpus)
        cells = " ".join(f"{x / GIB:7.3g}" for x in (*m, sum(m)))
        lines.append(f"{gpus:>5} {rows_per_rank(c, gpus):>5} {cells} {days(p, gpus):9.3g}")
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
        room = ", ".join("-" if refusal(c, g) else f"{sum(memory(p, g)) / GIB:.3g}" for g in GPUS)
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
