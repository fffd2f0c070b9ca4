"""Finds with which beta1, gamma and rate to begin, by the tokens of a step.

    python -m experiments.starting_values --dataset=stdlib --jobs=2

At each size of a step AdamW, Sophia-G with one gamma and Sophia-G with a controlled gamma run with
several beta1. Each of these has a ladder of rates of its own, which goes on beyond an end that is
best, as in experiments.leaderboard: --budget runs of --max_iters steps with one seed. The model is
small (2 layers of width 32, context 64), estimates are from half of the batch, as the paper's are.
In --out_dir: starting_values.md and .json; the latter belongs in results/runs as
starting_values_DATASET.json.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from experiments.archive import Remembering, Replaying, archive, command_line
from experiments.compare import parse_numbers
from experiments.leaderboard import LeaderboardSettings, Setting, beyond, tune_all
from experiments.runs import RunSettings
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, option
from nanosophia.files import write_text

CONTEXT = 64
ADAMW = "optimizer=adamw,learning_rate=4e-3|8e-3|1.6e-2,beta2=0.95"
ONE_GAMMA = "optimizer=sophiag,learning_rate=3e-3|6e-3|1.2e-2,gamma=0.5|2"
CONTROLLED = ("optimizer=sophiag,gamma_target=0.9,gamma_rows=embedding,"
              "learning_rate=1e-2|2e-2|4e-2")
METHODS = {"AdamW": (ADAMW, ("0.8", "0.9")), "Sophia-G, one gamma": (ONE_GAMMA, ("0.8", "0.96")),
           "Sophia-G, controlled gamma": (CONTROLLED, ("0.8", "0.9", "0.96"))}

Tuned = dict[str, tuple[Setting, dict[Setting, float]]]


@dataclass(frozen=True, kw_only=True)
class StartingSettings(RunSettings):
    """Settings of `python -m experiments.starting_values`."""

    dataset: str = option("stdlib", "prepared folder", section="starting values")
    tokens: str = option("2048,4096,8192,16384,32768,65536", "tokens per step, comma-separated")
    max_iters: int = option(150, "steps of a run", low=20)
    budget: int = option(5, "runs of each optimizer with each beta1", low=4)

    def check(self) -> None:
        super().check()
        if any(n % CONTEXT or n < 2 * CONTEXT for n in parse_numbers(self, "tokens")):
            raise ConfigError(f"tokens = {self.tokens!r}: each must be a multiple of {CONTEXT}, "
                              f"the context, and at least {2 * CONTEXT}", "tokens")

    @property
    def sizes(self) -> list[int]:
        """Returns the tokens per step, smallest first."""
        return sorted(int(n) for n in parse_numbers(self, "tokens"))


def board(settings: StartingSettings, tokens: int) -> LeaderboardSettings:
    """Returns how all are tuned at one size of the step, and where their runs are."""
    rows = tokens // CONTEXT
    first, *others = (f"{name} {beta1}: {flags},beta1={beta1}"
                      for name, (flags, betas) in METHODS.items() for beta1 in betas)
    return LeaderboardSettings(
        baseline=first, candidates="; ".join(others), budget=settings.budget, warmups="0.1",
        max_iters=f"{settings.max_iters // 2},{settings.max_iters}",
        seeds=1, jobs=settings.jobs, nproc_per_node=settings.nproc_per_node,
        out_dir=f"{settings.out_dir}/{Path(settings.dataset).name}/{tokens}",
        flags=f"--n_layer=2 --n_head=2 --n_embd=32 --block_size={CONTEXT} "
              f"--total_batch_size={rows} --batch_size={min(rows, 64)} "
              f"--hessian_batch_size={rows // 2} --dataset={settings.dataset} "
              f"--eval_windows=2000 {settings.flags}".strip())


def table(found: dict[int, Tuned], settings: StartingSettings) -> str:
    """Returns the lowest loss of every optimizer and beta1, with its rate, as a Markdown table."""
    columns = [f"{name} {beta1}" for name, (_, betas) in METHODS.items() for beta1 in betas]
    lines = [f"{settings.max_iters} steps, {settings.budget} runs a cell, one seed; the lowest "
             "validation loss, and its rate over the best AdamW's (* at an end of its ladder)", "",
             "| tokens per step | AdamW's rate | " + " | ".join(
                 f"{name}, beta1 {beta1}" for name, (_, betas) in METHODS.items()
                 for beta1 in betas) + " |", "|---" * (len(columns) + 2) + "|"]
    for tokens, tuned in found.items():
        adamw = min((tuned[f"AdamW {beta1}"] for beta1 in METHODS["AdamW"][1]),
                    key=lambda pair: pair[1][pair[0]])[0].rate
        lines.append(f"| {tokens:,} | {adamw:.3g} | " + " | ".join(
            cell(*tuned[column], adamw) for column in columns) + " |")
    return "\n".join(lines)


def cell(best: Setting, tried: dict[Setting, float], adamw: float) -> str:
    """Returns the lowest loss and the setting it had, in words."""
    gamma = f", gamma {best.options[0]}" if best.options else ""
    end = "*" if beyond(tried, best) else ""
    return f"{tried[best]:.3f} (x {best.rate / adamw:.2g}{end}{gamma})"


def remake(data: dict) -> str:
    """Returns the table of stored runs; raises ConfigError."""
    settings = StartingSettings(**data["settings"])
    return table({n: tune_all(Replaying(board(settings, n), data, str(n)))
                  for n in settings.sizes}, settings)


def sweep(settings: StartingSettings) -> Iterator[tuple[int, Tuned, Remembering]]:
    """Makes the runs of one size of the step after the other."""
    for tokens in settings.sizes:
        runs = Remembering(board(settings, tokens))
        yield tokens, tune_all(runs), runs


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(StartingSettings, argv,
                       "python -m experiments.starting_values [--key=value]")
    found, groups = {}, {}
    for tokens, tuned, runs in sweep(settings):
        found[tokens], groups[str(tokens)] = tuned, runs.results.values()
    kept = {key: value for key, value in vars(settings).items() if key not in ("out_dir", "jobs")}
    data = archive(command_line("experiments.starting_values", argv), groups,
                   experiment="starting_values", settings=kept)
    out, text = Path(settings.out_dir), table(found, settings)
    write_text(out / "starting_values.json", json.dumps(data) + "\n")
    write_text(out / "starting_values.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
