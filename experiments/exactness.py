"""Compares training on a device with training on the CPU, and its faster forms with the plain one.

    python -m experiments.exactness --device=cuda --json=exactness.json

A small model trains for some steps on a made-up sequence, from the same weights, on the same rows
and sampled labels. Compared are the losses of all steps: in float32 on the device and on the CPU
(without TF32), in bfloat16 and float16 and in float32, compiled and not. A run that was stopped and
resumed on the device must end with the same bits. Exits with 1 where something differs by more than
its tolerance.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import train
from bench import build_run, publish
from experiments.archive import measured
from nanosophia.characters import BYTES, CHARACTERS, write_characters
from nanosophia.checkpoint import load_latest
from nanosophia.command import command
from nanosophia.configurator import Settings, load, option
from nanosophia.dataloader import open_dataset
from nanosophia.distributed import start_ranks
from nanosophia.optimizers import with_own_defaults
from nanosophia.options import Config

MODEL = ("--n_layer=4", "--n_head=4", "--n_embd=128", "--block_size=128", "--total_batch_size=16",
         "--batch_size=8", "--hessian_batch_size=8", "--hessian_interval=5", "--warmup_iters=5",
         "--max_iters=20", "--learning_rate=2e-3", "--gamma=1", "--beta1=0.9", "--compile=off",
         "--compile_optimizer=off")
MATRICES = ("muon", "metric_muon")  # which have no gamma
# Tolerances in nats: float32 sums in another order; 8 and 11 bits of mantissa.
AS_ON_CPU, BFLOAT16, FLOAT16, COMPILED = 2e-3, 5e-2, 1e-2, 2e-3


@dataclass(frozen=True, kw_only=True)
class ExactnessSettings(Settings):
    """Settings of `python -m experiments.exactness`."""

    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps", section="exactness")
    steps: int = option(20, "steps that are compared", low=2)
    optimizers: str = option("adamw,sophiag,sophiah,muon,metric_muon", "of these, comma-separated")
    compiled: bool = option(True, "compare compiled runs too; on a CPU they need a C++ compiler")
    json: str = option("", "file that receives the figures; empty = none")


def write_sequence(folder: Path) -> None:
    """Writes a sequence that a model can learn: each byte is near the one before it."""
    steps = np.random.default_rng(0).integers(-3, 4, 200_000)
    tokens = (np.cumsum(steps) % 256).astype(np.uint16)
    tokens[:180_000].tofile(folder / "train.bin")
    tokens[180_000:].tofile(folder / "val.bin")
    write_characters(folder / CHARACTERS, BYTES)


def run_flags(optimizer: str, data: Path, *more: str) -> list[str]:
    """Returns train.py's flags of a run."""
    own = [flag for flag in MODEL if not (
        flag.startswith("--gamma") and not optimizer.startswith("sophia"))]
    if optimizer in MATRICES:
        own.remove("--beta1=0.9")
    if optimizer == "sophiah":
        own = [flag.replace("--gamma=1", "--gamma=0.1") for flag in own]
    return [*own, f"--optimizer={optimizer}", f"--dataset={data}", *more]


def losses(flags: list[str], steps: int) -> list[float]:
    """Returns the losses of the first steps of a run."""
    config, sources = load(Config, flags, "")
    ranks = start_ranks(config.device)
    run = build_run(with_own_defaults(config, sources), ranks,
                    open_dataset(config.dataset, config.block_size))
    torch.set_float32_matmul_precision("highest")  # no TF32
    return [train.train_step(run, step)[0].item() for step in range(steps)]


def compare_losses(settings: ExactnessSettings, data: Path) -> dict[str, dict]:
    """Returns by name the largest difference of each comparison and its tolerance."""
    rows = {}
    for optimizer in settings.optimizers.split(","):
        def run(device: str, *more: str, optimizer: str = optimizer) -> list[float]:
            return losses(run_flags(optimizer, data, f"--device={device}", *more), settings.steps)

        plain = run(settings.device, "--dtype=float32")
        forms = {"bfloat16 and float32": (["--dtype=bfloat16"], BFLOAT16),
                 "float16 and float32": (["--dtype=float16"], FLOAT16)}
        if settings.compiled:
            switches = ["--compile=on"] + ["--compile_optimizer=on"] * (optimizer != "adamw")
            forms["compiled and not"] = ["--dtype=float32", *switches], COMPILED
        found = {name: (run(settings.device, *more), tolerance)
                 for name, (more, tolerance) in forms.items()}
        if optimizer != "sophiah":  # whose probe is drawn on the device
            found = {"the device and the CPU": (run("cpu", "--dtype=float32"), AS_ON_CPU)} | found
        for name, (others, tolerance) in found.items():
            difference = max(abs(a - b) for a, b in zip(plain, others, strict=True))
            rows[f"{optimizer}: {name}"] = dict(
                difference=difference, tolerance=tolerance, fell=plain[0] - plain[-1],
                ok=difference <= tolerance)  # also false of NaN
    return rows


def compare_resumed(settings: ExactnessSettings, data: Path, folder: Path) -> dict[str, dict]:
    """Returns by optimizer how many tensors of a resumed run differ from an uninterrupted one's."""
    rows = {}
    for optimizer in settings.optimizers.split(","):
        whole, cut = folder / f"{optimizer}_whole", folder / f"{optimizer}_cut"
        flags = run_flags(optimizer, data, f"--device={settings.device}", "--max_iters=12",
                          "--checkpoint_interval=7", "--keep_best=False", "--eval_windows=4")
        train.main([*flags, f"--out_dir={whole}"])
        shutil.copytree(whole, cut, ignore=shutil.ignore_patterns("step_00000012", "lock"))
        train.main([*flags, f"--out_dir={cut}", "--init_from=resume"])
        tensors = [load_latest(out).model_tensors() for out in (whole, cut)]
        differing = sum(not torch.equal(x, tensors[1][name]) for name, x in tensors[0].items())
        rows[f"{optimizer}: resumed after 7 of 12 steps, tensors that differ"] = dict(
            difference=differing, tolerance=0, ok=not differing)
    return rows


def table(report: dict) -> str:
    """Returns the report as a Markdown table."""
    lines = [f"{report['device_name']}, torch {report['torch']}, {report['steps']} steps; largest "
             "difference of a step's loss, in nats", "",
             "| compared | largest difference | tolerance | |", "|---|---|---|---|"]
    for name, row in report["rows"].items():
        lines.append(f"| {name} | {row['difference']:.3g} | {row['tolerance']:g} | "
                     f"{'' if row['ok'] else 'DIFFERS'} |")
    return "\n".join(lines)


def device_name(device: torch.device) -> str:
    """Returns what torch calls a device."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(ExactnessSettings, argv, "python -m experiments.exactness [--key=value]")
    name = device_name(start_ranks(settings.device).device)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data"
        data.mkdir()
        write_sequence(data)
        rows = compare_losses(settings, data) | compare_resumed(settings, data, Path(folder))
    report = dict(rows=rows, steps=settings.steps, device_name=name, torch=torch.__version__)
    publish(report | measured("exactness", argv), table(report), settings.json)
    if not all(row["ok"] for row in rows.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
