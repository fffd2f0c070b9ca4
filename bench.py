"""Times train.py's own training step under several settings, as ratios within one run.

    python bench.py config/train_gpt2_30m_sophiag.py --json=FILE
    python bench.py CONFIG --compare="plain; optimizer=adamw; optimizer=sophiag; optimizer=sophiag,\
        hessian_chunks=12,hessian_batch_size=48" --profile=trace.json
    python bench.py --baseline=FILE

A contender is a list of settings laid over the config, or `plain`: a nanoGPT-shaped loop on the
same model. The contenders take turns, one whole Hessian cycle each, round after round, on random
tokens (or on --dataset with --real_data). The ratio of a contender's time to that of the first one
is taken within each round; the table shows the median over the rounds with the smallest and the
largest. Ratios are of processor time on the CPU and of synchronised wall time on CUDA; tokens per
second are always of wall time. --baseline repeats the command that wrote a --json file and exits
with 1 where a ratio has grown.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import math
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend

import train
from model import cross_entropy
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, option
from nanosophia.dataloader import Dataset, open_dataset
from nanosophia.distributed import Ranks, start_ranks, world_size
from nanosophia.dry_run import estimate_share
from nanosophia.files import create, read_bytes, reason, write_bytes, write_text
from nanosophia.metrics import peak_flops
from nanosophia.optimizers import check, spec, with_own_defaults
from nanosophia.options import Config
from nanosophia.resume import resolve_fresh
from nanosophia.tokenizer import GPT2_CLASSES

PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Config):
    """train.py's settings and what this command adds."""

    compare: str = option("optimizer=adamw; optimizer=sophiag; optimizer=sophiah",
                          "contenders, separated by semicolons: plain, or settings with commas",
                          section="benchmark")
    baseline: str = option("", "file that --json wrote: repeat its command and compare the ratios; "
                               "empty = none")
    tolerance: float = option(0.1, "relative growth of a ratio that --baseline accepts", low=0)
    repeats: int = option(9, "rounds that are timed", low=3)
    real_data: bool = option(False, "read --dataset instead of random tokens")
    profile: str = option("", "file for a trace of one cycle of the last contender; empty = none")
    json: str = option("", "file that receives the measurements; empty = none")

    @property
    def contenders(self) -> list[str]:
        """Returns the contenders that `compare` lists."""
        return [text.strip() for text in self.compare.split(";") if text.strip()]


class Elapsed(NamedTuple):
    """Seconds of one call."""

    compared: float  # what ratios are of: processor time on the CPU, wall time on CUDA
    wall: float


@dataclass
class Contender:
    """A run, its step, and its measurements so far."""

    name: str
    run: train.Run
    step: Callable[[int], object]
    first_step_s: float = 0.0  # wall time, with an estimate and all compilation
    peak_bytes: int = 0
    # The time of every step of each cycle, whose first step makes an estimate; seconds per cycle
    # spent waiting for batches.
    cycles: list[list[Elapsed]] = field(default_factory=list)
    data_waits: list[float] = field(default_factory=list)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, sources = load(BenchSettings, argv, "bench.py [config/FILE.py] [--key=value]")
    baseline = None
    if settings.baseline:
        baseline = read_report(settings.baseline)
        writes = ("--profile", "--json")  # a file must not say where others are written
        argv = [*(flag for flag in baseline["command"] if not flag.startswith(writes)), *argv]
        settings, sources = load(BenchSettings, argv, "")
        if settings.contenders != list(baseline["rows"]):
            raise ConfigError(f"--baseline={settings.baseline} compares "
                              f"{'; '.join(baseline['rows'])}; leave --compare out", "compare")
    for key in ("profile", "json"):
        if getattr(settings, key):
            check_place(key, Path(getattr(settings, key)))
    report = measure(settings, sources)
    report["command"] = [flag for flag in argv
                         if not flag.startswith(("--json=", "--baseline=", "--tolerance="))]
    publish(report, table(report), settings.json)
    if baseline and print_regressions(baseline, report, settings.tolerance):
        raise SystemExit(1)


def publish(report: dict, text: str, file: str) -> None:
    """Prints a report as text and, where a file is named, writes it there as JSON."""
    print(text)
    if file:
        write_text(Path(file), json.dumps(report, indent=1) + "\n")


def check_place(key: str, path: Path) -> None:
    """Raises ConfigError where a file could not be written, before anything is measured."""
    trial = path.with_name(path.name + ".partial")
    try:
        if path.exists() and not path.is_file():
            raise ConfigError(f"--{key}={path} is no file; give another", key)
        path.parent.mkdir(parents=True, exist_ok=True)
        create(trial).close()
        trial.unlink()
    except OSError as error:
        raise ConfigError(f"--{key}={path} cannot be written: {reason(error)}; give another",
                          key) from None


def measure(settings: BenchSettings, sources: dict[str, str]) -> dict:
    """Times all contenders and returns the report."""
    ranks = start_ranks(settings.device)
    configs = {text: contender_config(settings, sources, text) for text in settings.contenders}
    if not configs:
        raise ConfigError("compare names no contender; give settings such as optimizer=adamw",
                          "compare")
    cycle_steps = max(config.hessian_interval for config in configs.values())
    contenders = [warm_up(name, config, ranks, cycle_steps, real_data=settings.real_data)
                  for name, config in configs.items()]
    for number in range(1, settings.repeats + 1):
        for contender in contenders:
            time_cycle(contender, number * cycle_steps, cycle_steps)
    first, last, facts = contenders[0], contenders[-1], environment(ranks.device)
    peak = peak_flops(facts["device_name"])
    rows = {c.name: summarize(c, first, peak) for c in contenders}
    if settings.profile:
        write_profile(last, cycle_steps, Path(settings.profile))
    return dict(rows=rows, repeats=settings.repeats, cycle=cycle_steps, **facts,
                attention=attention_kernel(first.run), peak_flops=peak,
                parameters=last.run.model.num_params(non_embedding=False),
                flops_per_token=last.run.model.flops_per_token(),
                tokens_per_step=last.run.config.tokens_per_step, dtype=last.run.config.dtype)


def contender_config(settings: BenchSettings, sources: dict[str, str], text: str) -> Config:
    """Returns train.py's config of one contender; raises ConfigError.

    The contender's own settings win over the command's, which win over the optimizer's defaults.
    """
    flags = [f"--{part.strip()}"
             for part in ("optimizer=adamw" if text == PLAIN else text).split(",")]
    own, own_sources = load(Config, flags, "")
    values = {f.name: getattr(settings, f.name) for f in fields(Config)}
    values |= {key: getattr(own, key) for key in own_sources}
    if "optimizer" in own_sources and own.optimizer != settings.optimizer:
        # A config file sets betas or gamma for its own optimizer; a flag is meant for all of them.
        known = spec(own.optimizer) or spec("adamw")
        sources = {key: source for key, source in sources.items()
                   if key not in known.defaults or source.startswith("flag")}
    config = with_own_defaults(Config(**values), sources | own_sources)
    config.check_world(world_size())
    check(config, world_size())
    return config


def warm_up(name: str, config: Config, ranks: Ranks, cycle_steps: int, *, real_data: bool,
            ) -> Contender:
    """Builds a contender and runs one cycle of it, so that no timed step compiles or allocates."""
    data = open_dataset(config.dataset, config.block_size, config.bare_tokens) if real_data \
        else random_data(config)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(ranks.device)
    run = build_run(config, ranks, data)
    step = plain_step(run, data.train) if name == PLAIN else \
        lambda number: train.train_step(run, number)
    contender = Contender(name, run, step)
    contender.first_step_s = time_action(lambda: step(0), ranks.device).wall
    for number in range(1, cycle_steps):
        step(number)
    contender.peak_bytes = peak_memory(ranks.device)
    return contender


def build_run(config: Config, ranks: Ranks, data: Dataset) -> train.Run:
    """Returns a fresh run of train.py."""
    return train.build_run(resolve_fresh(config, ranks, data), ranks, data)


def random_data(config: Config) -> Dataset:
    """Returns uniform tokens, enough for one batch, from GPT-2's classes without the padding."""
    num_classes = min(config.vocab_size or GPT2_CLASSES, GPT2_CLASSES)
    size = (config.total_batch_size + 1) * config.block_size + 1
    tokens = np.random.default_rng(0).integers(0, num_classes, size, dtype=np.uint16)
    return Dataset(Path("random"), tokens, tokens, num_classes, "gpt2", {}, "")


def plain_step(run: train.Run, tokens: np.ndarray) -> Callable[[int], None]:
    """Returns the step of a nanoGPT-shaped loop: rows are copied one by one for each micro-batch,
    all logits are computed at once, and the optimizer is torch's fused AdamW."""
    config, device = run.config, run.ranks.device
    run.model.loss_fn = cross_entropy
    generator = np.random.default_rng(config.seed)

    def rows(offsets: np.ndarray) -> torch.Tensor:
        ids = torch.stack([torch.from_numpy(tokens[i:i + config.block_size].astype(np.int64))
                           for i in offsets])  # (rows, block_size)
        if device.type == "cuda":
            return ids.pin_memory().to(device, non_blocking=True)
        return ids.to(device)

    def step(number: int) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = train.learning_rate(config, number)
        for part in run.micro_batches:
            offsets = generator.integers(len(tokens) - config.block_size,
                                         size=part.stop - part.start)
            idx, targets = rows(offsets), rows(offsets + 1)
            with run.autocast():
                loss = run.model(idx, targets) * (len(idx) / config.total_batch_size)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)

    return step


def time_cycle(contender: Contender, first: int, steps: int) -> None:
    """Runs one cycle from step `first` on, which has an estimate, and times every step."""
    run = contender.run
    run.batches.seconds_waited = 0.0
    contender.cycles.append([
        time_action(lambda number=number: contender.step(number), run.ranks.device)
        for number in range(first, first + steps)])
    contender.data_waits.append(run.batches.seconds_waited)


def time_action(action: Callable[[], object], device: torch.device) -> Elapsed:
    """Calls `action` and returns how long it took; synchronises with a CUDA device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, processor = time.perf_counter(), time.process_time()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    return Elapsed(wall if device.type == "cuda" else processor, wall)


def summarize(contender: Contender, first: Contender, peak: float | None) -> dict:
    """Returns the contender's row: medians over the rounds, ratios to the first contender."""
    run, cycles = contender.run, contender.cycles
    ratios = [sum(t.compared for t in cycle) / sum(t.compared for t in theirs)
              for cycle, theirs in zip(cycles, first.cycles, strict=True)]
    walls = [sum(t.wall for t in cycle) for cycle in cycles]
    steps = [median(t.compared for t in cycle[1:] or cycle) for cycle in cycles]
    estimates = [max(0.0, cycle[0].compared - s) for cycle, s in zip(cycles, steps, strict=True)]
    tokens_per_second = len(cycles[0]) * run.config.tokens_per_step / median(walls)
    optimizer_s, optimizer_ratio = time_optimizer(run, len(cycles))
    return dict(
        first_step_s=contender.first_step_s, peak_bytes=contender.peak_bytes,
        step_ms=1e3 * median(steps), hessian_ms=1e3 * median(estimates) if run.estimator else 0.0,
        ratio=median(ratios), least=min(ratios), most=max(ratios),
        tokens_per_second=tokens_per_second,
        tflop=run.model.flops_per_token() * run.config.tokens_per_step
        * (1 + estimate_share(run.config, run.estimator, run.model.flops_per_token())) / 1e12,
        mfu=tokens_per_second * run.model.flops_per_token() / peak if peak else None,
        data_wait=median(s / wall for s, wall in zip(contender.data_waits, walls, strict=True)),
        # The very first step and the first of a cycle both have an estimate; one also compiles.
        compile_s=max(0.0, contender.first_step_s - median(cycle[0].wall for cycle in cycles)),
        optimizer_ms=1e3 * optimizer_s, optimizer_ratio=optimizer_ratio)


def time_optimizer(run: train.Run, repeats: int) -> tuple[float, float]:
    """Returns the median seconds of the optimizer's step and its ratio to torch's fused AdamW."""
    device = run.ranks.device
    params = [p for group in run.optimizer.param_groups for p in group["params"]]
    fused = dict(fused=True) if device.type in ("cpu", "cuda") else {}
    adamw = torch.optim.AdamW([p.detach().clone() for p in params], **fused)
    for p, copy in zip(params, adamw.param_groups[0]["params"], strict=True):
        p.grad = copy.grad = torch.randn_like(p)
    run.optimizer.step()  # both make their state at the first step
    adamw.step()
    pairs = [(time_action(run.optimizer.step, device).compared,
              time_action(adamw.step, device).compared) for _ in range(repeats)]
    run.optimizer.zero_grad(set_to_none=True)
    return median(ours for ours, _ in pairs), median(ours / theirs for ours, theirs in pairs)


def environment(device: torch.device) -> dict:
    """Returns the device, the threads and the versions, on which all times depend."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    versions = dict(torch=torch.__version__, python=platform.python_version())
    if device.type == "cuda":
        versions |= dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    return dict(device=str(device), device_name=name or platform.machine(),
                threads=torch.get_num_threads(), **versions)


def peak_memory(device: torch.device) -> int:
    """Returns the peak bytes of the device since its reset, on the CPU of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # it is in KiB


def attention_kernel(run: train.Run) -> str:
    """Returns the kernel that scaled_dot_product_attention takes for the run's shapes and dtype."""
    c = run.config
    dtype = getattr(torch, c.dtype)
    q = torch.empty(c.batch_size, c.n_head, c.block_size, c.n_embd // c.n_head, dtype=dtype,
                    device=run.ranks.device, requires_grad=True)
    backend = SDPBackend(torch._fused_sdp_choice(q, q, q, None, c.dropout, True))
    return backend.name.lower().removesuffix("_attention")


def write_profile(contender: Contender, steps: int, path: Path) -> None:
    """Writes a trace of one cycle for chrome://tracing; prints the most expensive operations."""
    activities, order = [torch.profiler.ProfilerActivity.CPU], "self_cpu_time_total"
    if contender.run.ranks.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        for number in range(steps):
            contender.step(number)
    with tempfile.TemporaryDirectory() as folder:  # torch would follow a link at `path`
        trace = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(trace))
        write_bytes(path, trace.read_bytes())
    print(profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=40))


def table(report: dict) -> str:
    """Returns the report as a Markdown table."""
    peak = f" of {report['peak_flops'] / 1e12:.0f} TFLOP/s" if report["peak_flops"] else ""
    lines = [f"{report['parameters'] / 1e6:.1f}M parameters, "
             f"{report['flops_per_token'] / 1e6:,.1f} MFLOP per token, "
             f"{report['tokens_per_step']:,} tokens per step, cycles of {report['cycle']} steps, "
             f"{report['dtype']}, attention {report['attention']}, "
             f"{report['device']} ({report['device_name']}{peak}), {report['threads']} threads, "
             f"torch {report['torch']}, {report['repeats']} rounds", "",
             "| contender | T(step), ms | T(Hessian), ms | TFLOP | x the first | least-most | "
             "tokens/s | MFU | optimizer, ms | x fused AdamW | data wait | compile, s | "
             "first step, s | peak MiB |", "|---" * 14 + "|"]
    first = next(iter(report["rows"].values()))["tflop"]
    for name, row in report["rows"].items():
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        lines.append(
            f"| {name} | {row['step_ms']:.1f} | {row['hessian_ms']:.1f} | "
            f"{row['tflop']:,.4g} ({row['tflop'] / first - 1:+.1%}) | {row['ratio']:.3f} | "
            f"{row['least']:.3f}-{row['most']:.3f} | {row['tokens_per_second']:,.0f} | {mfu} | "
            f"{row['optimizer_ms']:.1f} | {row['optimizer_ratio']:.2f} | "
            f"{row['data_wait']:.1%} | {row['compile_s']:.1f} | {row['first_step_s']:.1f} | "
            f"{row['peak_bytes'] >> 20:,} |")
    return "\n".join(lines)


def read_report(path: str) -> dict:
    """Reads a file that --json wrote; raises ConfigError where it is not one."""
    try:
        report = json.loads(read_bytes(Path(path)))
        if not all(type(flag) is str for flag in report["command"]):
            raise TypeError("its command is not a list of flags")
        report["device_name"], report["torch"]
        for row in report["rows"].values():
            row["ratio"], row["least"], row["most"]
        return report
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"--baseline={path} is not a file that bench.py --json wrote: {error}; "
                          "write one with --json=FILE") from None


def print_regressions(baseline: dict, report: dict, tolerance: float) -> bool:
    """Prints each contender's ratio in both reports; returns whether one grew beyond tolerance."""
    regressed = False
    print(f"\nratios to {next(iter(baseline['rows']))} in the baseline "
          f"({baseline['device_name']}, torch {baseline['torch']}) and now:")
    for name, old in baseline["rows"].items():
        ratio = report["rows"][name]["ratio"]
        slower = ratio > old["ratio"] * (1 + tolerance)
        regressed |= slower
        print(f"  {name}: {old['ratio']:.3f} ({old['least']:.3f}-{old['most']:.3f}), {ratio:.3f}"
              f"{'  SLOWER' if slower else ''}")
    return regressed


if __name__ == "__main__":
    main(sys.argv[1:])
