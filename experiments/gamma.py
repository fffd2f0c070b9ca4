"""Finds Sophia's gamma, and beta1 and the peak learning rate of any optimizer, by short runs.

    python -m experiments.gamma --config=config/train_gpt2_30m_sophiag.py --steps=500
    python -m experiments.gamma --config="config/quickstart_adamw.py" --find=rate --steps=200

By default first gamma, where the config has one, then beta1, then gamma once more if beta1 changed,
then the rate.

Gamma follows the paper's rule: 10 to 50 % of the coordinates are unclipped, on average over the
second half of a run. While all gammas tried lie on one side of that range, the next one is ten
times larger or smaller; afterwards it is the geometric mean of the closest ones on both sides.

Of beta1 0.8, 0.9, 0.96 and the config's own the one with the lowest loss is taken, and the config's
where no other is better by 1 %. The paper's 0.96 is for 491,520 tokens per step.

The learning rate first falls by `factor` until the lowest one tried is more than 1 % worse than the
best, then rises until a run blows up. A run blows up when it diverges; when its training loss,
averaged over five records, rises after the warm-up to more than 1.25 times its lowest value before;
or when it ends at more than 1.25 times the lowest final loss of all rates.

All searches print lines to paste into a config. A short run has the config's schedule, compressed,
and corrects h for its bias: otherwise h would be smaller than in the config's own, longer run, and
gamma too large for that. Finished runs in --out_dir are used again.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from experiments.compare import contender_flags
from experiments.runs import Result, RunSettings, RunSpec, mean, scaled_flags
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, option
from nanosophia.optimizers import spec
from nanosophia.options import Config
from nanosophia.packages import is_of_package

RANGE = (0.1, 0.5)  # of unclipped coordinates, the paper's section 3.1
BLOW_UP = 1.25  # times the lowest loss
RECORDS = 50  # of a short run
AVERAGED = 5  # records, so that one easy or hard batch decides nothing
BETAS = (0.8, 0.9, 0.96)
WORSE = 1.01  # times the best loss; smaller differences are noise of seeds and rounding


@dataclass(frozen=True, kw_only=True)
class GammaSettings(RunSettings):
    """Settings of `python -m experiments.gamma`."""

    config: str = option("", "config file, then settings after commas", section="search")
    find: Literal["all", "gamma", "beta1", "rate"] = option("all", "what to search for")
    steps: int = option(500, "length of a short run", unit="steps", low=20)
    factor: float = option(2.0, "ratio of neighbouring learning rates", above=1)
    most: int = option(12, "largest number of runs of each search", low=2)

    def check(self) -> None:
        super().check()
        if not self.config:
            raise ConfigError("config is not given; give a file, e.g. "
                              "--config=config/quickstart.py", "config")


SOPHIAS_RATE = dict(adamw=(0.8,), lion=(3, 5))  # over these optimizers' (section 3.1 of the paper)


@dataclass(frozen=True)
class RateSweep:
    """What a sweep over learning rates found."""

    lowest: float  # that was tried
    largest_stable: float
    best: float  # the stable rate with the lowest final loss
    best_loss: float
    blew_up_at: float | None  # the lowest rate above the stable ones; None: no rate blew up


def search(settings: GammaSettings) -> dict[str, float]:
    """Makes the runs; returns the settings found by their keys. Raises ConfigError."""
    flags = (*contender_flags(settings.config), *settings.extra)
    config, wanted = RunSpec("", flags).config(), settings.find
    short_run = short_runs(flags, config, settings.steps)
    found: dict[str, float] = {}
    searches_gamma = wanted == "gamma" or (wanted == "all" and has_gamma(config))
    if searches_gamma:
        found["gamma"] = find_gamma(settings, config, short_run)
    if wanted == "beta1" or (wanted == "all" and not is_of_package(config.optimizer)):
        found["beta1"] = find_beta1(settings, replace(config, **found), short_run)
        if searches_gamma and found["beta1"] != config.beta1:
            found["gamma"] = find_gamma(settings, replace(config, **found), short_run)
    if wanted in ("rate", "all"):
        found["learning_rate"] = find_rate(settings, replace(config, **found), short_run)
    return found


def short_runs(flags: tuple[str, ...], config: Config, steps: int) -> Callable[[Config], RunSpec]:
    """Returns what makes a spec of so many steps with a config's gamma, beta1 and rate; the same
    ones always have the same name. Raises ConfigError."""
    common = dict(log_interval=max(1, steps // RECORDS), eval_interval=steps)
    if has_gamma(config) and steps < config.max_iters:
        common["hessian_bias_correction"] = True
    keys = ["gamma"] * has_gamma(config) + ["beta1"] * (not is_of_package(config.optimizer))

    def short_run(config: Config) -> RunSpec:
        values = {key: getattr(config, key) for key in (*keys, "learning_rate")}
        return RunSpec("_".join(f"{key}{value:.5g}" for key, value in values.items()), scaled_flags(
            flags, steps, **common, **{key: f"{value:.6g}" for key, value in values.items()}))

    return short_run


def has_gamma(config: Config) -> bool:
    """Returns whether the optimizer has one gamma, that its user sets."""
    entry = spec(config.optimizer)
    return entry is not None and entry.is_sophia and not config.gamma_target


def find_gamma(settings: GammaSettings, config: Config, short_run: Callable[[Config], RunSpec],
               ) -> float:
    """Returns a gamma whose unclipped share is in RANGE; raises ConfigError where none is found."""
    if config.gamma_target:
        raise ConfigError(f"{settings.config} controls gamma itself (gamma_target = "
                          f"{config.gamma_target}); use --find=rate, or gamma_target=0", "config")
    too_small = too_large = None  # the gammas nearest to the range on either side
    gamma, diverged = config.gamma, 0
    for _ in range(settings.most):
        result, = settings.run_all([short_run(replace(config, gamma=gamma))])
        # A run that diverged needs smaller steps, hence a larger gamma, as if all were clipped.
        share = 0.0 if result.diverged else result.mean("unclipped_fraction", 0.5)
        diverged += result.diverged
        if math.isnan(share):
            raise ConfigError(f"{settings.config} records no unclipped fraction: its optimizer "
                              "has no gamma; use --find=rate", "config")
        print(f"gamma {gamma:.4g}: {share:.1%} unclipped, loss {result.loss:.4f}")
        if RANGE[0] <= share <= RANGE[1]:
            return float(f"{gamma:.3g}")
        if share < RANGE[0]:
            too_small = gamma
        else:
            too_large = gamma
        if too_large is None:
            gamma *= 10
        elif too_small is None:
            gamma *= 0.1
        else:
            gamma = math.sqrt(too_small * too_large)
    if diverged == settings.most:
        raise ConfigError(f"all of {diverged} runs diverged, whatever gamma; lower the learning "
                          "rate", "config")
    raise ConfigError(f"none of {settings.most} gammas gave {RANGE[0]:.0%} to {RANGE[1]:.0%} "
                      "unclipped coordinates; raise --most or --steps", "most")


def find_beta1(settings: GammaSettings, config: Config, short_run: Callable[[Config], RunSpec],
               ) -> float:
    """Returns the beta1 with the lowest loss; raises ConfigError where every run diverged, or the
    optimizer has no beta1."""
    if is_of_package(config.optimizer):
        raise ConfigError(f"beta1 has no effect on optimizer = {config.optimizer}; use --find=rate",
                          "config")
    betas = sorted({*BETAS, config.beta1})
    results = settings.run_all([short_run(replace(config, beta1=beta1)) for beta1 in betas])
    losses = {beta1: result.loss for beta1, result in zip(betas, results, strict=True)}
    for beta1, loss in losses.items():
        print(f"beta1 {beta1:g}: loss {loss:.4f}")
    best = min(losses, key=losses.get)
    if losses[best] == math.inf:
        raise ConfigError(f"the runs with beta1 = {', '.join(f'{b:g}' for b in betas)} all "
                          "diverged; lower the learning rate", "config")
    return config.beta1 if losses[config.beta1] <= WORSE * losses[best] else best


def find_rate(settings: GammaSettings, config: Config, short_run: Callable[[Config], RunSpec],
              ) -> float:
    """Returns the learning rate with the lowest final loss."""
    def rate_spec(rate: float) -> RunSpec:
        return short_run(replace(config, learning_rate=rate))

    sweep = sweep_lr(settings, {settings.config: (rate_spec, config.learning_rate)},
                     factor=settings.factor, most=settings.most,
                     bracket_below=True)[settings.config]
    end = f"blew up at {sweep.blew_up_at:.3g}" if sweep.blew_up_at else \
        "none blew up: raise --most"
    at_end = ", the lowest that was tried: raise --most" if sweep.best == sweep.lowest else ""
    print(f"learning rates: largest stable {sweep.largest_stable:.3g}, {end}, lowest loss "
          f"{sweep.best_loss:.4f} at {sweep.best:.3g}{at_end}")
    print_transfer(config.optimizer, sweep.best)
    return float(f"{sweep.best:.3g}")


def print_transfer(optimizer: str, rate: float) -> None:
    """Prints Sophia's rate by the paper's rule, where there is one for this optimizer's."""
    if factors := SOPHIAS_RATE.get(optimizer):
        rates = " to ".join(f"{factor * rate:.3g}" for factor in factors)
        print(f"by the paper's rule Sophia's rate is {' to '.join(map(str, factors))} times "
              f"{optimizer}'s: {rates}")


def sweep_lr(settings: RunSettings,
             sweeps: Mapping[str, tuple[Callable[[float], RunSpec], float]], *,
             factor: float = 2.0, most: int = 12, bracket_below: bool = False,
             ) -> dict[str, RateSweep]:
    """Sweeps the learning rate of each (spec at a rate, first rate), one rate of each at a time.

    The runs of a round may go side by side (--jobs). Raises ConfigError where all of `most` rates
    of a sweep blow up.
    """
    losses: dict[str, dict[float, float]] = {name: {} for name in sweeps}
    for _ in range(most):
        rates = {name: rate for name, (_, start) in sweeps.items()
                 if (rate := next_rate(losses[name], start, factor, bracket_below)) is not None}
        if not rates:
            break
        results = settings.run_all([sweeps[name][0](rate) for name, rate in rates.items()])
        for (name, rate), result in zip(rates.items(), results, strict=True):
            losses[name][rate] = math.inf if blew_up(result) else result.loss
    return {name: summarize(name, by_rate) for name, by_rate in losses.items()}


def next_rate(losses: dict[float, float], start: float, factor: float, bracket_below: bool,
              ) -> float | None:
    """Returns the rate to try after those of `losses`; None: the sweep has ended.

    `losses` holds the final loss at each rate, infinite after a blow-up. Rates fall while none is
    stable and, with `bracket_below`, until the lowest is clearly worse than the best; then they
    rise until one is not stable.
    """
    if not losses:
        return start
    good = stable(losses)
    lowest, highest = min(losses), max(losses)
    if not good or (bracket_below and losses[lowest] <= WORSE * min(good.values())):
        return lowest / factor
    return highest * factor if highest in good else None


def stable(losses: dict[float, float]) -> dict[float, float]:
    """Returns the rates whose final loss is at most BLOW_UP times the lowest of all."""
    limit = BLOW_UP * min(losses.values())
    return {rate: loss for rate, loss in losses.items() if loss <= limit < math.inf}


def blew_up(result: Result) -> bool:
    """Returns whether the run diverged, or its averaged training loss rose after the warm-up to
    BLOW_UP times its lowest value before."""
    if result.diverged:
        return True
    records = [r for r in result.records if "train/loss" in r]
    lowest = math.inf
    for end in range(AVERAGED, len(records) + 1):
        window = records[end - AVERAGED:end]
        loss = mean([math.inf if r["train/loss"] is None else r["train/loss"] for r in window])
        if window[0]["step"] >= result.config.warmup_iters and loss > BLOW_UP * lowest:
            return True
        lowest = min(lowest, loss)
    return False


def summarize(name: str, losses: dict[float, float]) -> RateSweep:
    """Returns what the final losses by rate show; raises ConfigError where no rate is stable."""
    good = stable(losses)
    if not good:
        raise ConfigError(f"{name}: all of {len(losses)} learning rates from {max(losses):g} "
                          "downwards blew up; the cause is another setting")
    best, largest = min(good, key=good.get), max(good)
    return RateSweep(lowest=min(losses), largest_stable=largest, best=best, best_loss=good[best],
                     blew_up_at=min((rate for rate in losses if rate > largest), default=None))


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(GammaSettings, argv,
                       "python -m experiments.gamma --config=CONFIG [--key=value]")
    for key, value in search(settings).items():
        print(f"{key} = {value:g}")


if __name__ == "__main__":
    main(sys.argv[1:])
