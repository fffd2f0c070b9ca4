"""Times train.py's own step, and optimizer steps, as ratios within one run.

    python bench.py config/train_gpt2_30m_sophiag.py --json=FILE
    python bench.py CONFIG --compare="optimizer=adamw; optimizer=sophiag; optimizer=sophiag,\
        hessian_chunks=12,hessian_batch_size=48" --profile=trace.json
    python bench.py CONFIG --what=optimizers

A training contender is a list of settings laid over the config; the first is what the others are
compared with. Each runs one whole Hessian cycle in turn, round after round, on random tokens (or on
--dataset with --real_data); a ratio is taken within a round, and the median over rounds is shown
with the smallest and largest. On the CPU ratios count processor time, on CUDA synchronised wall
time; tokens per second are of wall time.
"""

import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch

import train
from configurator import Config, ConfigError, exit_with, knob, load
from dataloader import DataError, Dataset, open_dataset
from distributed import DeviceError, start_ranks, world_size
from metrics import peak_flops
from model import GPT, GPTConfig
from optimizers import OPTIMIZERS, Lion, check, parameter_groups, with_own_defaults
from sophia import Sophia
from train import MODEL_KEYS

BASELINE = "AdamW, torch fused"


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Config):
    """train.py's settings and what this command adds."""

    what: Literal["training", "optimizers"] = knob(
        "training", "train.py's step, or optimizers alone", section="benchmark")
    compare: str = knob("optimizer=adamw; optimizer=sophiag; optimizer=sophiah",
                        "contenders: settings, comma-separated, contenders by semicolons")
    repeats: int = knob(9, "rounds that are timed", low=3)
    real_data: bool = knob(False, "read --dataset instead of random tokens")
    profile: str = knob("", "file for a trace of one cycle of the last contender; empty = none")
    json: str = knob("", "file that receives the table; empty = none")


def main(argv: list[str]) -> None:
    """The command; exits with 2 and one line after a user's mistake."""
    try:
        settings, sources = load(BenchSettings, argv, "bench.py [config/FILE.py] [--key=value]")
        if settings.what == "optimizers":
            report = bench_optimizers(settings)
            print(table(report))
        else:
            report = bench_training(settings, sources)
            print(training_table(report))
        if settings.json:
            Path(settings.json).parent.mkdir(parents=True, exist_ok=True)
            Path(settings.json).write_text(json.dumps(report, indent=1) + "\n")
    except (ConfigError, DataError, DeviceError) as error:
        exit_with(error)
    except OSError as error:
        exit_with(ConfigError(f"--json={settings.json} cannot be written: {error.strerror}"))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def bench_training(settings: BenchSettings, sources: dict[str, str]) -> dict:
    """Times of each contender's cycles of hessian_interval steps, ratios to the first's."""
    ranks = start_ranks(settings.device)
    contenders = {text: _contender(settings, sources, text) for text in
                  (part.strip() for part in settings.compare.split(";")) if text}
    if not contenders:
        raise ConfigError("compare names no contender; give settings such as optimizer=adamw",
                          "compare")
    steps = max(config.hessian_interval for config in contenders.values())
    clock, rounds, rows = _both_clocks(ranks.device), [], {}
    runs = {}
    for name, config in contenders.items():
        data = open_dataset(config.dataset, config.block_size) if settings.real_data else \
            _random_data(config)
        config = train.settled(config, ranks, data)
        if ranks.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(ranks.device)
        runs[name] = run = train.build_run(config, ranks, data)
        first = clock(lambda run=run: train.train_step(run, 0))[1]
        clock(lambda run=run: _cycle(run, 1, steps - 1))
        rows[name] = dict(first_step_s=first, peak_bytes=_peak_bytes(ranks.device))
    for number in range(1, settings.repeats + 1):
        rounds.append({name: _timed_cycle(run, number * steps, steps, clock)
                       for name, run in runs.items()})
    baseline = next(iter(contenders))
    for name, run in runs.items():
        found = [r[name] for r in rounds]
        ratios = sorted(r[name]["cycle"] / r[baseline]["cycle"] for r in rounds)
        seconds = statistics.median(f["wall"] for f in found)
        tokens = steps * run.config.tokens_per_step
        device = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else ""
        peak = peak_flops(device)
        rows[name] |= dict(
            step_ms=1e3 * statistics.median(f["step"] for f in found),
            hessian_ms=1e3 * statistics.median(f["estimate"] for f in found)
            if run.estimator else 0.0,
            ratio=statistics.median(ratios), least=ratios[0], most=ratios[-1],
            tokens_per_second=tokens / seconds,
            mfu=tokens / seconds * run.model.flops_per_token() / peak if peak else None,
            data_wait=statistics.median(f["waited"] / f["wall"] for f in found))
    if settings.profile:
        _profile(next(reversed(runs.values())), steps, settings.profile)
    any_run = next(iter(runs.values()))
    return dict(rows=rows, repeats=len(rounds), cycle=steps, **_environment(ranks.device),
                parameters=any_run.model.num_params(non_embedding=False),
                tokens_per_step=any_run.config.tokens_per_step, dtype=any_run.config.dtype)


def _contender(settings: BenchSettings, sources: dict[str, str], text: str) -> Config:
    """train.py's config of one contender: flags, then its own settings, then its defaults."""
    flags = [f"--{part.strip()}" for part in text.split(",")]
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
    classes = min(config.vocab_size or 50257, 50257)
    size = (config.total_batch_size + 1) * config.block_size + 1
    tokens = np.random.default_rng(0).integers(0, classes, size, dtype=np.uint16)
    return Dataset(Path("random"), tokens, tokens, classes, "gpt2", {}, "")


def _cycle(run: train.Run, first: int, steps: int) -> None:
    for step in range(first, first + steps):
        train.train_step(run, step)


def _timed_cycle(run: train.Run, first: int, steps: int, clock) -> dict[str, float]:
    """Seconds of one cycle from a step with an estimate on, its plain step and its estimate."""
    run.batches.seconds_waited = 0.0
    times = [clock(lambda step=step: train.train_step(run, step))
             for step in range(first, first + steps)]
    plain = statistics.median(t for t, _ in times[1:]) if steps > 1 else times[0][0]
    return dict(cycle=sum(t for t, _ in times), wall=sum(w for _, w in times), step=plain,
                estimate=max(0.0, times[0][0] - plain), waited=run.batches.seconds_waited)


def _both_clocks(device: torch.device):
    """A function that gives (seconds to compare, seconds of wall time) of its argument."""
    timed = _clock(device)

    def clock(action) -> tuple[float, float]:
        began = time.perf_counter()
        compared = timed(action) / 1e3
        return compared, time.perf_counter() - began

    return clock


def _peak_bytes(device: torch.device) -> int:
    """Most device memory since the last reset; on the CPU most of the process so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _profile(run: train.Run, steps: int, path: str) -> None:
    """Writes a trace of one cycle, for chrome://tracing, and prints its ten dearest operations."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    order = "self_cpu_time_total"
    if run.ranks.device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        order = "self_cuda_time_total"
    with torch.profiler.profile(activities=activities) as profiler:
        _cycle(run, 0, steps)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(path)
    print(profiler.key_averages().table(sort_by=order, row_limit=10, max_name_column_width=40))


def training_table(report: dict) -> str:
    """The report as a Markdown table."""
    lines = [f"{report['parameters'] / 1e6:.1f}M parameters, {report['tokens_per_step']:,} tokens "
             f"per step, cycles of {report['cycle']} steps, {report['dtype']}, "
             f"{report['device']} ({report['device_name']}), {report['threads']} threads, torch "
             f"{report['torch']}, {report['repeats']} rounds", "",
             "| contender | T(step), ms | T(Hessian), ms | x the first | least-most | tokens/s | "
             "MFU | data wait | first step, s | peak MiB |", "|---" * 10 + "|"]
    for name, row in report["rows"].items():
        mfu = f"{row['mfu']:.1%}" if row["mfu"] else "-"
        lines.append(
            f"| {name} | {row['step_ms']:.1f} | {row['hessian_ms']:.1f} | {row['ratio']:.3f} | "
            f"{row['least']:.3f}-{row['most']:.3f} | {row['tokens_per_second']:,.0f} | {mfu} | "
            f"{row['data_wait']:.1%} | {row['first_step_s']:.1f} | {row['peak_bytes'] >> 20:,} |")
    return "\n".join(lines)


def _environment(device: torch.device) -> dict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return dict(device=str(device), device_name=name or platform.machine(),
                threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version())


def bench_optimizers(settings: BenchSettings) -> dict:
    """Milliseconds and ratios of each contender's step; compile time in seconds; environment."""
    device = start_ranks(settings.device).device
    shape = {key: getattr(settings, key) for key in MODEL_KEYS}
    shape["vocab_size"] = shape["vocab_size"] or 50304
    model = GPT(GPTConfig(**shape)).to(device)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    contenders = _contenders(settings, model)
    clock = _clock(device)
    first_ms = {name: _wall_ms(step) for name, step in contenders.items()}
    for step in contenders.values():
        clock(step)
    rounds = [{name: clock(step) for name, step in contenders.items()}
              for _ in range(settings.repeats)]
    rows = {}
    for name in contenders:
        ratios = sorted(r[name] / r[BASELINE] for r in rounds)
        rows[name] = dict(ms=statistics.median(r[name] for r in rounds),
                          ratio=statistics.median(ratios), least=ratios[0], most=ratios[-1],
                          first_ms=first_ms[name])
    return dict(rows=rows, parameters=model.num_params(non_embedding=False), repeats=len(rounds),
                **_environment(device))


def _contenders(settings: BenchSettings, model: GPT) -> dict[str, Callable[[], object]]:
    def groups(**extra):
        return [group | extra for group in parameter_groups(model, settings)]

    def sophia(**extra):
        optimizer = Sophia(groups(**extra))
        optimizer.update_hessian([torch.rand_like(p) for p in optimizer.parameters()])
        return optimizer

    def refreshing(optimizer: Sophia):
        def step():  # as the step after an estimate does
            optimizer._estimated = True
            optimizer.step()
        return step

    eager, compiled = sophia(), sophia(compiled=True)
    controlled = dict(compiled=True, gamma_target=0.9)
    tensors, rows = sophia(**controlled), sophia(**controlled)
    for group in rows.param_groups:
        group["gamma_rows"] = group["kind"] == "embedding"
    # The estimate that update_hessian is handed may be any tensors of the right shapes.
    estimates = [p.detach() for p in eager.parameters()]
    on = dict(fused=True) if model.transformer.wte.weight.device.type in ("cpu", "cuda") else {}
    return {
        BASELINE: torch.optim.AdamW(groups(), **on).step,
        "AdamW, torch foreach": torch.optim.AdamW(groups(), foreach=True).step,
        "Lion": Lion(groups()).step,
        "Sophia, eager": eager.step,
        "Sophia, compiled": compiled.step,
        "Sophia, compiled, gamma per tensor, no refresh": tensors.step,
        "Sophia, compiled, gamma per tensor, refresh": refreshing(tensors),
        "Sophia, compiled, embedding by rows, no refresh": rows.step,
        "Sophia, compiled, embedding by rows, refresh": refreshing(rows),
        "Sophia, update_hessian": lambda: eager.update_hessian(estimates),
    }


def _wall_ms(action: Callable) -> float:
    """With compilation, which works in other processes too."""
    start = time.perf_counter()
    action()
    return 1e3 * (time.perf_counter() - start)


def _clock(device: torch.device) -> Callable[[Callable], float]:
    """A function that gives the milliseconds that its argument takes."""
    def cpu(action) -> float:
        start = time.process_time()
        action()
        return 1e3 * (time.process_time() - start)

    def cuda(action) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        action()
        torch.cuda.synchronize(device)
        return 1e3 * (time.perf_counter() - start)

    return cuda if device.type == "cuda" else cpu


def table(report: dict) -> str:
    """The report as a Markdown table."""
    lines = [f"{report['parameters'] / 1e6:.1f}M parameters, {report['device']} "
             f"({report['device_name']}), {report['threads']} threads, torch {report['torch']}, "
             f"{report['repeats']} rounds", "",
             "| optimizer step | ms | x fused AdamW | least-most | first call, ms |",
             "|---|---|---|---|---|"]
    for name, row in report["rows"].items():
        lines.append(f"| {name} | {row['ms']:.1f} | {row['ratio']:.2f} | {row['least']:.2f}-"
                     f"{row['most']:.2f} | {row['first_ms']:.0f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(sys.argv[1:])
