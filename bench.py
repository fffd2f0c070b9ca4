"""Times optimizer steps on a config's parameters, as ratios to torch's fused AdamW.

    python bench.py config/train_gpt2_30m_sophiag.py --json=results/optimizer_steps_30m.json

Every contender steps in turn, round after round, on the same parameters and gradients; a ratio is
taken within a round, and the median over rounds is shown with the smallest and largest. On the CPU
the clock counts processor time, on CUDA synchronised wall time. Needs no data.
"""

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import Config, ConfigError, exit_with, knob, load
from distributed import DeviceError, start_ranks
from model import GPT, GPTConfig
from optimizers import Lion, parameter_groups
from sophia import Sophia
from train import MODEL_KEYS

BASELINE = "AdamW, torch fused"


@dataclass(frozen=True, kw_only=True)
class BenchSettings(Config):
    """train.py's settings and what this command adds."""

    repeats: int = knob(9, "rounds that are timed", low=3, section="benchmark")
    json: str = knob("", "file that receives the table; empty = none")


def main(argv: list[str]) -> None:
    """The command; exits with 2 and one line after a user's mistake."""
    try:
        settings, _ = load(BenchSettings, argv, "bench.py [config/FILE.py] [--key=value]")
        report = bench_optimizers(settings)
        print(table(report))
        if settings.json:
            Path(settings.json).parent.mkdir(parents=True, exist_ok=True)
            Path(settings.json).write_text(json.dumps(report, indent=1) + "\n")
    except (ConfigError, DeviceError) as error:
        exit_with(error)
    except OSError as error:
        exit_with(ConfigError(f"--json={settings.json} cannot be written: {error.strerror}"))
    except KeyboardInterrupt:
        raise SystemExit(130) from None


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
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return dict(rows=rows, parameters=model.num_params(non_embedding=False), repeats=len(rounds),
                device=str(device), device_name=name or platform.machine(),
                threads=torch.get_num_threads(), torch=torch.__version__,
                python=platform.python_version())


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
