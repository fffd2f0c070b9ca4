"""Trains every optimizer for 200 steps of the quickstart's model: a smoke test with numbers.

    python data/stdlib/prepare.py
    python -m experiments.every_optimizer --jobs=2

Each has one setting, a guess from its tuning elsewhere: this compares nothing (experiments.study
does), and shows that each learns. In --out_dir: optimizers_200_steps.md and .json.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from experiments.archive import Remembering, Replaying, archive, command_line
from experiments.runs import RunSettings, RunSpec
from nanosophia.command import command
from nanosophia.configurator import load
from nanosophia.files import write_text

MODEL = ("--n_layer=3", "--n_head=4", "--n_embd=64", "--block_size=64", "--dataset=stdlib",
         "--batch_size=32", "--total_batch_size=32", "--max_iters=200", "--warmup_iters=30",
         "--eval_interval=200", "--eval_windows=2000", "--log_interval=20",
         "--checkpoint_interval=200")
SETTINGS = {  # train.py's flags, by optimizer
    "sophiag": ("--learning_rate=6e-3", "--gamma=2", "--beta1=0.8", "--hessian_batch_size=32"),
    "sophiag, controlled gamma": ("--learning_rate=2e-2", "--gamma_target=0.9", "--beta1=0.8",
                                  "--gamma_rows=embedding", "--hessian_batch_size=32"),
    "sophiah": ("--learning_rate=6e-3", "--gamma=2", "--beta1=0.8", "--hessian_batch_size=4"),
    "adamw": ("--learning_rate=8e-3", "--beta2=0.99"),
    "lion": ("--learning_rate=1e-3",),
    "adahessian": ("--learning_rate=2e-2", "--hessian_batch_size=32"),
    "muon": ("--learning_rate=2e-2",),
    "metric_muon": ("--learning_rate=2e-2",),
    "metric_muon_gnb": ("--learning_rate=2e-2", "--hessian_batch_size=32"),
    "soap": ("--learning_rate=1e-2",),
    "kron": ("--learning_rate=1e-2",),
    "ademamix": ("--learning_rate=8e-3", "--beta2=0.99", "--slow_beta=0.99", "--slow_weight=2"),
    "mars": ("--learning_rate=8e-3",),
    "schedule_free": ("--learning_rate=1e-2",),
    "clip": ("--learning_rate=2e-3",),
    "normalize": ("--learning_rate=6e-3", "--beta1=0.8"),
    "ef_clip": ("--learning_rate=6e-3", "--gamma=2", "--beta1=0.8", "--hessian_batch_size=32"),
    "ah_clip": ("--learning_rate=6e-3", "--gamma=0.5", "--beta1=0.8", "--hessian_batch_size=4"),
    "gnb_unclipped": ("--learning_rate=6e-3", "--gamma=2", "--eps=1e-2", "--beta1=0.8",
                      "--hessian_batch_size=32")}


@dataclass(frozen=True, kw_only=True)
class EverySettings(RunSettings):
    """Settings of `python -m experiments.every_optimizer`."""


def specs(settings: EverySettings) -> list[RunSpec]:
    """Returns a spec for each setting."""
    return [RunSpec(name, (*MODEL, *settings.extra, f"--optimizer={name.partition(',')[0]}",
                           *flags)) for name, flags in SETTINGS.items()]


def markdown(settings: EverySettings) -> str:
    """Makes the runs that are missing; returns the table, the lowest loss first."""
    results = settings.run_all(specs(settings))
    config = results[0].config
    lines = [f"{results[0].plan.parameters / 1e6:.2f}M parameters, {config.tokens_per_step:,} "
             f"tokens per step, validation on {config.eval_windows:,} windows, seed {config.seed}",
             "", "| optimizer | flags | validation loss, nats per token |", "|---|---|---|"]
    for r in sorted(results, key=lambda r: r.loss):
        lines.append(f"| {r.name} | {' '.join(SETTINGS[r.name])} | "
                     f"{'diverged' if r.diverged else f'{r.loss:.3f}'} |")
    return "\n".join(lines)


def remake(data: dict) -> str:
    """Returns what `markdown` does of stored runs; raises ConfigError."""
    return markdown(Replaying(EverySettings(**data["settings"]), data, "all"))


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(EverySettings, argv, "python -m experiments.every_optimizer [--key=value]")
    runs = Remembering(settings)
    text, out = markdown(runs), Path(settings.out_dir)
    data = archive(command_line("experiments.every_optimizer", argv),
                   {"all": runs.results.values()}, experiment="every_optimizer",
                   settings=dict(flags=settings.flags))
    write_text(out / "optimizers_200_steps.md", text + "\n")
    write_text(out / "optimizers_200_steps.json", json.dumps(data) + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
