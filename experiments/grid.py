"""Tunes an optimizer as the paper's appendix C.1 does, on a small model by many runs.

    python -m experiments.grid --config=config/train_gpt2_30m_adamw.py --nproc_per_node=8
    python -m experiments.grid --config=config/train_gpt2_30m_sophiag.py,gamma=0.01 --dry_run

One search after the other, each with what the searches before it found: both betas in all
combinations (the paper's Sophia has gamma .01 in these); the weight decay; for Sophia gamma, of
those that leave 10 to 50 % of the coordinates unclipped over the second half of a run; and the peak
learning rate by a ladder with a factor of 1.25, which goes on until a rate blows up
(experiments.gamma says when a run does). The lowest final loss wins; with --rate=largest, the
paper's way for more than 355M parameters, the largest rate that does not blow up. The paper's runs
are of 30M parameters and 50,000 steps, 2,000 of them warm-up as in its configs; the defaults are
its grids. Prints a table of every search and lines to paste into a config. Finished runs in
--out_dir are used again.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from experiments.compare import contender_flags, parse_numbers
from experiments.gamma import RANGE, RECORDS, has_gamma, print_transfer, sweep_lr
from experiments.runs import RunSettings, RunSpec, scaled_flags
from nanosophia import dry_run
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, option
from nanosophia.options import Config

PAPERS_GAMMAS = "0.005,0.01,0.02,0.05,0.1,0.2"


@dataclass(frozen=True, kw_only=True)
class GridSettings(RunSettings):
    """Settings of `python -m experiments.grid`."""

    config: str = option("", "config file, then settings after commas", section="grid")
    steps: int = option(50_000, "length of a run", unit="steps", low=20)
    beta1: str = option("0.8,0.9,0.95,0.96,0.99", "values of beta1, comma-separated")
    beta2: str = option("0.9,0.95,0.98,0.99,0.995", "values of beta2, comma-separated")
    weight_decay: str = option("0.05,0.1,0.2,0.5", "weight decays, comma-separated")
    gamma: str = option("", "values of gamma, comma-separated; empty = the paper's, for Sophia "
                            f"with a fixed gamma: {PAPERS_GAMMAS}")
    rate: Literal["best", "largest"] = option(
        "best", "the rate with the lowest loss, or the largest that does not blow up")
    factor: float = option(1.25, "ratio of neighbouring learning rates", above=1)
    most: int = option(20, "largest number of learning rates", low=2)
    dry_run: bool = option(False, "count the runs and their days on nproc_per_node GPUs instead")

    def check(self) -> None:
        super().check()
        if not self.config.strip(" ,"):
            raise ConfigError("config is not given; give a file, e.g. "
                              "--config=config/train_gpt2_30m_adamw.py", "config")


def searches(settings: GridSettings, config: Config) -> list[dict[str, list[float]]]:
    """Returns the values to try of each search by their keys; raises ConfigError."""
    found = [{key: parse_numbers(settings, key) for key in keys}
             for keys in (("beta1", "beta2"), ("weight_decay",))]
    if has_gamma(config):
        gammas = settings if settings.gamma else replace(settings, gamma=PAPERS_GAMMAS)
        found.append(dict(gamma=parse_numbers(gammas, "gamma")))
    elif settings.gamma:
        raise ConfigError(f"gamma = {settings.gamma}: {settings.config} has no fixed gamma to "
                          "search for; leave it out", "gamma")
    return found


def spec_maker(settings: GridSettings, flags: tuple[str, ...]) -> Callable[..., RunSpec]:
    """Returns what makes a spec of a run from its settings."""
    common = dict(log_interval=max(1, settings.steps // RECORDS), eval_interval=settings.steps)
    return lambda **values: RunSpec(name(values), scaled_flags(
        flags, settings.steps, keep_warmup=True, **common, **{
            key: f"{value:.6g}" for key, value in values.items()}))


def search(settings: GridSettings) -> dict[str, float]:
    """Makes the runs; returns the settings found by their keys. Raises ConfigError."""
    flags = (*contender_flags(settings.config), *settings.extra)
    config, spec, found = RunSpec("", flags).config(), spec_maker(settings, flags), {}
    grids = searches(settings, config)
    for grid in grids:  # what train.py would refuse is refused before the first run
        settings.check_specs([spec(**values) for values in combinations(grid)])
    for grid in grids:
        found |= try_all(settings, spec, grid, found)
    sweep = sweep_lr(settings, {"rate": (
        lambda rate: spec(**found, learning_rate=rate), config.learning_rate)},
        factor=settings.factor, most=settings.most,
        bracket_below=settings.rate == "best")["rate"]
    end = f"{sweep.blew_up_at:.3g} blew up" if sweep.blew_up_at else "none blew up"
    print(f"learning rates: the largest that does not blow up is {sweep.largest_stable:.3g} "
          f"({end}); lowest loss {sweep.best_loss:.4f} at {sweep.best:.3g}")
    if settings.rate == "largest" and not sweep.blew_up_at:
        raise ConfigError(f"none of {settings.most} learning rates blew up, so the largest is not "
                          "known; raise --most", "most")
    if settings.rate == "best" and sweep.best == sweep.lowest:
        raise ConfigError(f"the lowest of {settings.most} learning rates is the best, so a lower "
                          "one may be better; raise --most, or lower the config's", "most")
    rate = sweep.best if settings.rate == "best" else sweep.largest_stable
    print_transfer(config.optimizer, rate)
    return found | dict(learning_rate=float(f"{rate:.3g}"))


def name(values: dict[str, float]) -> str:
    """Returns the name of a run."""
    return "_".join(f"{key}{value:.6g}" for key, value in values.items())


def combinations(grid: dict[str, list[float]]) -> list[dict[str, float]]:
    """Returns all combinations of the values of some settings."""
    return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]


def try_all(settings: GridSettings, spec: Callable[..., RunSpec], grid: dict[str, list[float]],
            found: dict[str, float]) -> dict[str, float]:
    """Makes a run for every combination under what was found, and prints them; returns the best.

    Of several gammas only those may win that leave a share of coordinates unclipped which is in the
    paper's range. Raises ConfigError where none may.
    """
    tried = combinations(grid)
    results = settings.run_all([spec(**found | values) for values in tried])
    shares = [r.mean("unclipped_fraction", 0.5) for r in results]
    print(f"| {' | '.join(grid)} | loss | unclipped |\n{'|---' * (len(grid) + 2)}|")
    for values, r, share in zip(tried, results, shares, strict=True):
        print(f"| {' | '.join(f'{value:g}' for value in values.values())} | {r.loss:.4f} | "
              f"{'' if math.isnan(share) else f'{share:.0%}'} |")
    print()
    good = {i: r.loss for i, r in enumerate(results) if not r.diverged and (
        "gamma" not in grid or RANGE[0] <= shares[i] <= RANGE[1])}
    if not good:
        reason = "diverged or left too many or too few coordinates unclipped" \
            if "gamma" in grid else "diverged"
        raise ConfigError(f"all of {len(tried)} runs over {' and '.join(grid)} {reason}; give "
                          f"other values of {next(iter(grid))}", *grid)
    return tried[min(good, key=good.get)]


def count(settings: GridSettings) -> str:
    """Returns how many runs the searches make and what they take; raises ConfigError."""
    flags = (*contender_flags(settings.config), *settings.extra)
    spec, grids = spec_maker(settings, flags), searches(settings, RunSpec("", flags).config())
    for grid in grids:
        settings.check_specs([spec(**values) for values in combinations(grid)])
    config, sizes = spec().config(), [len(combinations(grid)) for grid in grids]
    days = dry_run.days(dry_run.plan(config), settings.nproc_per_node)
    return (f"{' + '.join(map(str, sizes))} runs over {'; '.join(map(' x '.join, grids))}, and "
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
