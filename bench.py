"""Times train.py's own training step for several settings, as ratios within one run.

    python bench.py config/train_gpt2_30m_sophiag.py --json=FILE
    python bench.py CONFIG --compare="plain; optimizer=adamw; optimizer=sophiag; optimizer=sophiag,\
        hessian_chunks=12,hessian_batch_size=48" --profile=trace.json
    python bench.py --against=FILE

A contender is a list of settings laid over the config, or `plain`: a nanoGPT-shaped loop
on the same model. The first is what the others are compared with. Each runs one whole Hessian cycle
in turn, round after round, on random tokens (or on --dataset with --real_data); a ratio is taken
within a round, and the median over rounds is shown with the smallest and largest. On the CPU ratios
count processor time, on CUDA synchronised wall time; tokens per second are of wall time. --against
repeats the command that wrote a --json file and ends with 1 where a ratio has become larger.
"""

import json
import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.attention import SDPBackend

import train
from nanosophia.configurator import ConfigError, command, knob, load
from nanosophia.dataloader import Dataset, open_dataset
from nanosophia.distributed import start_ranks, world_size
from nanosophia.files import write_text
from nanosophia.metrics import peak_flops
from nanosophia.optimizers import (
    OPTIMIZERS,
    check,
    cosine_lr,
    with_own_defaults,
)
from nanosophia.options import Config
from nanosophia.tokenizer import GPT2_CLASSES

PLAIN = "plain"


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Config):
    """train.py's settings and what this command adds."""

    compare: str = knob("optimizer=adamw; optimizer=sophiag; optimizer=sophiah",
                        "contenders: plain, or settings, comma-separated; contenders by "
                        "semicolons", section="benchmark")
    against: str = knob("", "a file of --json: run its command again and compare the ratios")
    tolerance: float = knob(0.1, "growth of a ratio that --against lets pass", low=0)
    repeats: int = knob(9, "rounds that are timed", low=3)
    real_data: bool = knob(False, "read --dataset instead of random tokens")
    profile: str = knob("", "file for a trace of one cycle of the last contender; empty = none")
    json: str = knob("", "file that receives the table; empty = none")


@command()
def main(argv: list[str]) -> None:
    """The command; exits with 2 and one line after a user's mistake."""
    settings, sources = load(BenchSettings, argv, "bench.py [config/FILE.py] [--key=value]")
    stored = None
    if settings.against:
        stored = _stored(settings.against)
        settings, sources = load(BenchSettings, [*stored["command"], *argv], "bench.py")
        names = [part.strip() for part in settings.compare.split(";") if part.strip()]
        if names != list(stored["rows"]):
            raise ConfigError(f"--against={settings.against} compares "
                              f"{'; '.join(stored['rows'])}; leave --compare out", "compare")
    report = bench_training(settings, sources)
    given = [*stored["command"], *argv] if stored else argv
    report["command"] = [a for a in given if not a.startswith(
        ("--json=", "--against=", "--tolerance="))]
    print(training_table(report))
    if settings.json:
        write_text(Path(settings.json), json.dumps(report, indent=1) + "\n")
    if stored and not print_growth(stored, report, settings.tolerance):
        raise SystemExit(1)


def bench_training(settings: BenchSettings, sources: dict[str, str]) -> dict:
    """Times of each contender's cycles of hessian_interval steps, ratios to the first's."""
    ranks = start_ranks(settings.device)
    contenders = {text: _contender(settings, sources, text) for text in
                  (part.strip() for part in settings.compare.split(";")) if text}
    if not contenders:
        raise ConfigError("compare names no contender; give settings such as optimizer=adamw",
                          "compare")
    cycle = max(config.hessian_interval for config in contenders.values())
    rounds, rows = [], {}
    runs, steps = {}, {}
    for name, config in contenders.items():
        data = open_dataset(config.dataset, config.block_size) if settings.real_data else \
            _random_data(config)
        config = train.settled(config, ranks, data)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)
        runs[name] = run = train.build_run(config, ranks, data)
        steps[name] = _plain_loop(run, data.train) if name == PLAIN else \
            lambda step, run=run: train.train_step(run, step)
        first = time_action(lambda: steps[name](0), ranks.device).wall  # noqa: B023
        _cycle(steps[name], 1, cycle - 1)
        rows[name] = dict(first_step_s=first, peak_bytes=_peak_bytes(ranks.device))
    for number in range(1, settings.repeats + 1):
        rounds.append({name: _timed_cycle(run, steps[name], number * cycle, cycle)
                       for name, run in runs.items()})
    optimizers = _optimizer_times(runs, settings.repeats)
    baseline = next(iter(contenders))
    device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
    peak = peak_flops(device)
    for name, run in runs.items():
        found = [r[name] for r in rounds]
        seconds = statistics.median(f["wall"] for f in found)
        tokens = cycle * run.config.tokens_per_step
        rows[name] |= dict(
            step_ms=1e3 * statistics.median(f["step"] for f in found),
            hessian_ms=1e3 * statistics.median(f["estimate"] for f in found)
            if run.estimator else 0.0,
            **_ratios([r[name]["cycle"] / r[baseline]["cycle"] for r in rounds]),
            tokens_per_second=tokens / seconds,
            mfu=tokens / seconds * run.model.flops_per_token() / peak if peak else None,
            data_wait=statistics.median(f["waited"] / f["wall"] for f in found),
            # The first step has an estimate in it, and compiles what is compiled.
            compile_s=max(0.0, rows[name]["first_step_s"]
                          - statistics.median(f["first_wall"] for f in found)),
            **optimizers[name])
    if settings.profile:
        _profile(steps[name], ranks.device, cycle, settings.profile)
    return dict(rows=rows, repeats=len(rounds), cycle=cycle,
                **environment(ranks.device), attention=_attention(next(iter(runs.values()))),
                peak_flops=peak,
                parameters=run.model.num_params(non_embedding=False),
                flops_per_token=run.model.flops_per_token(),
                tokens_per_step=run.config.tokens_per_step, dtype=run.config.dtype)


def _ratios(values: list[float]) -> dict[str, float]:
    return dict(ratio=statistics.median(values), least=min(values), most=max(values))


def _plain_loop(run: train.Run, tokens: np.ndarray) -> Callable[[int], None]:
    """The step of a nanoGPT-shaped loop: rows copied one by one for each micro-batch, logits all at
    once, torch's fused AdamW."""
    config, device = run.config, run.ranks.device
    run.model.loss_chunk = 0
    parts = config.total_batch_size // config.batch_size
    generator = np.random.default_rng(config.seed)

    def batch(first: np.ndarray) -> torch.Tensor:
        rows = torch.stack([torch.from_numpy(tokens[i:i + config.block_size].astype(np.int64))
                            for i in first])
        return rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else \
            rows.to(device)

    def step(number: int) -> None:
        for group in run.optimizer.param_groups:
            group["lr"] = cosine_lr(config, number)
        for _ in range(parts):
            first = generator.integers(len(tokens) - config.block_size, size=config.batch_size)
            idx, targets = batch(first), batch(first + 1)
            with run.autocast():
                loss = run.model(idx, targets) / parts
            loss.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)

    return step


def _optimizer_times(runs: dict[str, train.Run], repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each run's optimizer step, and as a ratio to torch's fused AdamW in turn."""
    found = {}
    for name, run in runs.items():
        params = [p for group in run.optimizer.param_groups for p in group["params"]]
        fused = dict(fused=True) if run.ranks.device.type in ("cpu", "cuda") else {}
        adamw = torch.optim.AdamW([p.detach().clone() for p in params], **fused)
        for ours, theirs in zip(params, adamw.param_groups[0]["params"], strict=True):
            ours.grad = theirs.grad = torch.randn_like(ours)
        for step in (run.optimizer.step, adamw.step):
            step()
        times = [(time_action(run.optimizer.step, run.ranks.device).compared,
                  time_action(adamw.step, run.ranks.device).compared) for _ in range(repeats)]
        run.optimizer.zero_grad(set_to_none=True)
        found[name] = dict(optimizer_ms=1e3 * statistics.median(t for t, _ in times),
                           optimizer_ratio=statistics.median(t / base for t, base in times))
    return found


def _stored(path: str) -> dict:
    try:
        report = json.loads(Path(path).read_text())
        report["command"], report["rows"]  # what is needed of it
        return report
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--against={path} is no file that bench.py --json wrote: "
                          f"{error}") from None


def print_growth(stored: dict, report: dict, tolerance: float) -> bool:
    """Prints each contender's ratio then and now; whether none grew by more than the tolerance."""
    good = True
    print(f"\nratios to {next(iter(stored['rows']))}, then ({stored['device_name']}, torch "
          f"{stored['torch']}) and now:")
    for name, then in stored["rows"].items():
        now = report["rows"][name]["ratio"]
        slower = now > then["ratio"] * (1 + tolerance)
        good &= not slower
        print(f"  {name}: {then['ratio']:.3f} ({then['least']:.3f}-{then['most']:.3f}), {now:.3f}"
              f"{'  SLOWER' if slower else ''}")
    return good


def _contender(settings: BenchSettings, sources: dict[str, str], text: str) -> Config:
    """train.py's config of one contender: flags, then its own settings, then its defaults."""
    flags = [f"--{part.strip()}" for part in
             ("optimizer=adamw" if text == PLAIN else text).split(",")]
    given, own = load(Config, flags, "bench.py")
    values = {f.name: getattr(settings, f.name) for f in fields(Config)}
    explicit = set(sources)
    if "optimizer" in own and given.optimizer != settings.optimizer:
        # What a config file gives for its own optimizer is not the other's setting; a flag is.
        explicit -= {key for key in OPTIMIZERS.get(given.optimizer, OPTIMIZERS["adamw"]).defaults
                     if not sources.get(key, "").startswith("flag")}
    config = Config(**values | {key: getattr(given, key) for key in own})
    config = with_own_defaults(config, {**dict.fromkeys(explicit, ""), **own})
    check(config, world_size())
    return config


def _random_data(config: Config) -> Dataset:
    """Uniform tokens, enough for one batch; the classes are the real ones of the vocabulary."""
    classes = min(config.vocab_size or GPT2_CLASSES, GPT2_CLASSES)
    size = (config.total_batch_size + 1) * config.block_size + 1
    tokens = np.random.default_rng(0).integers(0, classes, size, dtype=np.uint16)
    return Dataset(Path("random"), tokens, tokens, classes, "gpt2", {}, "")


def _cycle(step: Callable[[int], object], first: int, steps: int) -> None:
    for number in range(first, first + steps):
        step(number)


def _timed_cycle(run: train.Run, step: Callable[[int], object], first: int, steps: int,
                 ) -> dict[str, float]:
    """Seconds of one cycle from a step with an estimate on, its plain step and its estimate."""
    run.batches.seconds_waited = 0.0
    times = [time_action(lambda number=number: step(number), run.ranks.device)
             for number in range(first, first + steps)]
    plain = statistics.median(t for t, _ in times[1:]) if steps > 1 else times[0][0]
    return dict(cycle=sum(t for t, _ in times), wall=sum(w for _, w in times), step=plain,
                first_wall=times[0][1], estimate=max(0.0, times[0][0] - plain),
                waited=run.batches.seconds_waited)


class Elapsed(NamedTuple):
    """Seconds of one call."""

    compared: float  # what ratios are of: processor time on the CPU, wall time on CUDA
    wall: float


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


def _peak_bytes(device: torch.device) -> int:
    """Most device memory since the last reset; on the CPU most of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _profile(step: Callable[[int], object], device: torch.device, steps: int, path: str) -> None:
    """Writes a trace of one cycle, for chrome://tracing, and prints its ten dearest operations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        _cycle(step, 0, steps)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(path)
    print(profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=40))


def training_table(report: dict) -> str:
    """The report as a Markdown table."""
    peak = f" of {report['peak_flops'] / 1e12:.0f} TFLOP/s" if report["peak_flops"] else ""
    lines = [f"{report['parameters'] / 1e6:.1f}M parameters, "
             f"{report['flops_per_token'] / 1e6:,.1f} MFLOP per token, "
             f"{report['tokens_per_step']:,} tokens per step, cycles of {report['cycle']} steps, "
             f"{report['dtype']}, attention {report['attention']}, "
             f"{report['device']} ({report['device_name']}{peak}), {report['threads']} threads, "
             f"torch {report['torch']}, {report['repeats']} rounds", "",
             "| contender | T(step), ms | T(Hessian), ms | x the first | least-most | tokens/s | "
             "MFU | optimizer, ms | x fused AdamW | data wait | compile, s | first step, s | "
             "peak MiB |", "|---" * 13 + "|"]
    for name, row in report["rows"].items():
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        lines.append(
            f"| {name} | {row['step_ms']:.1f} | {row['hessian_ms']:.1f} | {row['ratio']:.3f} | "
            f"{row['least']:.3f}-{row['most']:.3f} | {row['tokens_per_second']:,.0f} | {mfu} | "
            f"{row['optimizer_ms']:.1f} | {row['optimizer_ratio']:.2f} | "
            f"{row['data_wait']:.1%} | {row['compile_s']:.1f} | {row['first_step_s']:.1f} | "
            f"{row['peak_bytes'] >> 20:,} |")
    return "\n".join(lines)


def environment(device: torch.device) -> dict:
    """Returns the device, the versions and the threads that times depend on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    found = dict(device=str(device), device_name=name or platform.machine(),
                 threads=torch.get_num_threads(), torch=torch.__version__,
                 python=platform.python_version())
    if device.type == "cuda":
        found |= dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
    return found


def _attention(run: train.Run) -> str:
    """The kernel that scaled_dot_product_attention takes for the run's shapes and precision."""
    c = run.config
    wanted = dict(bfloat16=torch.bfloat16, float64=torch.float64).get(c.dtype, torch.float32)
    q = torch.empty(c.batch_size, c.n_head, c.block_size, c.n_embd // c.n_head, dtype=wanted,
                    device=run.ranks.device, requires_grad=True)
    backend = SDPBackend(torch._fused_sdp_choice(q, q, q, None, c.dropout, True))
    return backend.name.lower().removesuffix("_attention")


if __name__ == "__main__":
    main(sys.argv[1:])
