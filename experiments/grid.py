"""Tunes an optimizer as the paper's appendix C.1 does, on a small model by many runs.

    python -m experiments.grid --config=config/train_gpt2_30m_adamw.py --nproc_per_node=8
    python -m experiments.grid --config=config/train_gpt2_30m_sophiag.py,gamma=0.01 --dry_run

One search after the other, each with what the searches before it found: both betas in all
combinations (the paper's Sophia has gamma .01 in these); the weight decay; for Sophia gamma, of
those that leave 10 to 50 % of the coordinates unclipped over the second half of a run; and the
peak learning rate by a ladder with a factor of 1.25: the largest that does not blow up
(experiments.gamma says when a run does), beside the one with the lowest loss. Otherwise the lowest
final loss wins. The paper's runs are of 30M parameters and 50,000 steps; the defaults are its
grids. Prints a table of every search and lines to paste into a config. Finished runs in --out_dir
are used again.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product

from experiments.compare import contender_flags, parse_numbers
from experiments.gamma import RANGE, has_gamma, print_transfer, short_runs, sweep_lr
from experiments.runs import Result, RunSettings, RunSpec
from nanosophia import dry_run
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, option


@dataclass(frozen=True, kw_only=True)
class GridSettings(RunSettings):
    """Settings of `python -m experiments.grid`."""

    config: str = option("", "config file, then settings after commas", section="grid")
    steps: int = option(50_000, "length of a run", unit="steps", low=20)
    beta1: str = option("0.8,0.9,0.95,0.96,0.99", "values of beta1, comma-separated")
    beta2: str = option("0.9,0.95,0.98,0.99,0.995", "values of beta2, comma-separated")
    weight_decay: str = option("0.05,0.1,0.2,0.5", "weight decays, comma-separated")
    gamma: str = option("0.005,0.01,0.02,0.05,0.1,0.2", "values of gamma, comma-separated")
    factor: float = option(1.25, "ratio of neighbouring learning rates", above=1)
    most: int = option(20, "largest number of learning rates", low=2)
    dry_run: bool = option(False, "count the runs and their days on nproc_per_node GPUs instead")

    def check(self) -> None:
        super().check()
        if not self.config:
            raise ConfigError("config is not given; give a file, e.g. "
                              "--config=config/train_gpt2_30m_adamw.py", "config")
        for key in ("beta1", "beta2", "weight_decay", "gamma"):
            parse_numbers(self, key)


def search(settings: GridSettings) -> dict[str, float]:
    """Makes the runs; returns the settings found by their keys. Raises ConfigError."""
    flags = (*contender_flags(settings.config), *settings.extra)
    config = RunSpec("", flags).config()
    spec, found = short_runs(flags, settings.steps), {}
    best = try_all(settings, spec, ("beta1", "beta2"), found)
    found |= dict(beta1=best.config.beta1, beta2=best.config.beta2)
    found["weight_decay"] = try_all(settings, spec, ("weight_decay",), found).config.weight_decay
    if has_gamma(config):
        found["gamma"] = try_all(settings, spec, ("gamma",), found, unclipped).config.gamma
    sweep = sweep_lr(settings, {"rate": (
        lambda rate: spec(name({"learning_rate": rate} | found), **found,
                          learning_rate=f"{rate:.6g}"), config.learning_rate)},
        factor=settings.factor, most=settings.most)["rate"]
    end = f"{sweep.blew_up_at:.3g} blew up" if sweep.blew_up_at else "none blew up: raise --most"
    print(f"learning rates: the largest that does not blow up is {sweep.largest_stable:.3g} "
          f"({end}); lowest loss {sweep.best_loss:.4f} at {sweep.best:.3g}")
    print_transfer(config.optimizer, sweep.largest_stable)
    return found | dict(learning_rate=float(f"{sweep.largest_stable:.3g}"))


def name(values: dict[str, float]) -> str:
    """Returns the name of a run."""
    return "_".join(f"{key}{value:.6g}" for key, value in values.items())


def in_grid(settings: GridSettings, keys: tuple[str, ...]) -> Iterable[dict[str, float]]:
    """Returns all combinations of the values of some settings."""
    for values in product(*(parse_numbers(settings, key) for key in keys)):
        yield dict(zip(keys, values, strict=True))


def unclipped(result: Result) -> bool:
    """Returns whether the share of unclipped coordinates is in the paper's range."""
    return RANGE[0] <= result.mean("unclipped_fraction", 0.5) <= RANGE[1]


def try_all(settings: GridSettings, spec: Callable[..., RunSpec], keys: tuple[str, ...],
            found: dict[str, float], may_win: Callable[[Result], bool] = lambda result: True,
            ) -> Result:
    """Makes a run for every combination under what was found; prints them; returns the best.

    Raises ConfigError where all diverged, or none may win.
    """
    grid = list(in_grid(settings, keys))
    results = settings.run_all([spec(name(values | found), **found | values) for values in grid])
    print(f"| {' | '.join(keys)} | loss | unclipped |\n{'|---' * (len(keys) + 2)}|")
    for values, r in zip(grid, results, strict=True):
        share = r.mean("unclipped_fraction", 0.5)
        print(f"| {' | '.join(f'{value:g}' for value in values.values())} | {r.loss:.4f} | "
              f"{'' if math.isnan(share) else f'{share:.0%}'} |")
    print()
    if not (good := [r for r in results if not r.diverged and may_win(r)]):
        raise ConfigError(f"none of {len(grid)} runs over {' and '.join(keys)} can be taken: all "
                          "diverged, or left too many or too few coordinates unclipped; give "
                          f"other values of {keys[0]}", *keys)
    return min(good, key=lambda r: r.loss)


def count(settings: GridSettings) -> str:
    """Returns how many runs the searches make and what they take."""
    flags = (*contender_flags(settings.config), *settings.extra)
    config = short_runs(flags, settings.steps)("").config()
    searches = [("beta1", "beta2"), ("weight_decay",)]
    if has_gamma(config):
        searches.append(("gamma",))
    sizes = [len(list(in_grid(settings, keys))) for keys in searches]
    days = dry_run.days(dry_run.plan(config), settings.nproc_per_node)
    return (f"{' + '.join(map(str, sizes))} runs over {'; '.join(map(' x '.join, searches))}, and "
            f"up to {settings.most} learning rates, of {settings.steps:,} steps: {days:.3g} days "
            f"each on {settings.nproc_per_node} x {config.dry_run_gpu}, {sum(sizes) * days:.3g} to "
            f"{(sum(sizes) + settings.most) * days:.3g} together")


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(GridSettings, argv,
                       "python -m experiments.grid --config=CONFIG [--key=value]")
    if settings.dry_run:
        print(count(settings))
        return
    for key, value in search(settings).items():
        print(f"{key} = {value:g}")


if __name__ == "__main__":
    main(sys.argv[1:])
