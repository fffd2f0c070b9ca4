"""Finds Sophia's gamma and the peak learning rate of any optimizer by short runs.

    python -m experiments.gamma --config=config/train_gpt2_30m_sophiag.py --steps=500
    python -m experiments.gamma --config="config/quickstart_adamw.py" --find=rate --steps=200

Gamma (the paper's rule): between 10 and 50 % of the coordinates shall be unclipped, on average over
the second half of a run. From a run below or above that range gamma moves by factors of ten until
the range has been passed over, then it is halved in the logarithm.
The rate descends by `factor` until the lowest one is more than a hundredth worse than the best,
then climbs until a run blows up, which is when it diverges; when its training loss, averaged over
five records, is after the warm-up more than 1.25 times what it had been before; or when it ends at
more than 1.25 times the ladder's lowest loss.
Both print the lines to paste into a config. A short run has the config's schedule, compressed, and
h corrected for its bias: without that, h would be a fraction of what it is in the config's own,
longer run, and gamma too large for it. Results of runs are kept in --out_dir and used again.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from experiments.compare import contender_flags
from experiments.runs import Result, RunSettings, RunSpec, mean, scaled_flags
from nanosophia.configurator import ConfigError, command, knob, load
from nanosophia.optimizers import OPTIMIZERS

RANGE = (0.1, 0.5)  # of unclipped coordinates, the paper's section 3.1
BLOW_UP, AVERAGED = 1.25, 5
WORSE = 1.01  # than the best: below it, seeds and rounding decide


@dataclass(frozen=True, kw_only=True)
class GammaSettings(RunSettings):
    """The settings of this command."""

    config: str = knob("", "config file, then settings after commas", section="search")
    find: Literal["gamma", "rate", "both"] = knob("both", "what is looked for; both: gamma first")
    steps: int = knob(500, "of a short run", low=20)
    factor: float = knob(2.0, "between rates", above=1)
    most: int = knob(12, "runs of each search at most", low=2)

    def check(self) -> None:
        super().check()
        if not self.config:
            raise ConfigError("config is not given; give a file, e.g. "
                              "--config=config/quickstart.py", "config")


class Ladder(NamedTuple):
    """What a climb found: rates, and the loss at the best one."""

    least: float  # that was tried
    largest: float  # that is stable
    best: float  # the one with the lowest final loss
    best_loss: float
    blown: float | None  # the next one tried, which blew up; None: none did


def blew_up(result: Result) -> bool:
    """Whether the run diverged, or its loss rose to BLOW_UP times what it had been.

    Losses are averaged over AVERAGED records, so that one batch that is easy or hard decides
    nothing.
    """
    if result.diverged:
        return True
    records = [r for r in result.records if "train/loss" in r]
    lowest = math.inf
    for last in range(AVERAGED, len(records) + 1):
        part = records[last - AVERAGED:last]
        loss = mean([math.inf if r["train/loss"] is None else r["train/loss"] for r in part])
        if part[0]["step"] >= result.config.warmup_iters and loss > BLOW_UP * lowest:
            return True
        lowest = min(lowest, loss)
    return False


def next_rate(losses: dict[float, float], start: float, factor: float, below: bool,
              ) -> float | None:
    """The rate to try after these, whose final losses are known, infinite after a blow-up.

    Downwards while none is stable, and where `below` is asked for, until the lowest is clearly
    worse than the best; then upwards until one is not stable. None: the ladder has ended.
    """
    if not losses:
        return start
    good = stable(losses)
    lowest, highest = min(losses), max(losses)
    if not good or (below and losses[lowest] <= WORSE * min(good.values())):
        return lowest / factor
    return highest * factor if highest in good else None


def stable(losses: dict[float, float]) -> dict[float, float]:
    """The rates whose final loss is at most BLOW_UP times the ladder's lowest."""
    limit = BLOW_UP * min(losses.values())
    return {rate: loss for rate, loss in losses.items() if loss <= limit < math.inf}


def sweep_lr(settings: RunSettings,
             ladders: Mapping[str, tuple[Callable[[float], RunSpec], float]], *,
             factor: float = 2.0, most: int = 12, below: bool = False) -> dict[str, Ladder]:
    """Climbs ladders of (spec at a rate, first rate) side by side, a rung of each at a time.

    Raises ConfigError when all of `most` rates of one blow up.
    """
    losses: dict[str, dict[float, float]] = {name: {} for name in ladders}
    for _ in range(most):
        rates = {name: rate for name, (_, start) in ladders.items()
                 if (rate := next_rate(losses[name], start, factor, below)) is not None}
        if not rates:
            break
        found = settings.run_all([ladders[name][0](rate) for name, rate in rates.items()])
        for (name, rate), result in zip(rates.items(), found, strict=True):
            losses[name][rate] = math.inf if blew_up(result) else result.loss
    return {name: ladder(name, found) for name, found in losses.items()}


def ladder(name: str, losses: dict[float, float]) -> Ladder:
    """What these losses by rate say; raises ConfigError where no rate is stable."""
    good = stable(losses)
    if not good:
        raise ConfigError(f"{name}: all of {len(losses)} learning rates from {max(losses):g} "
                          "downwards blew up; the cause is another setting")
    best = min(good, key=good.get)
    return Ladder(min(losses), max(good), best, good[best],
                  min((rate for rate in losses if rate > max(good)), default=None))


def find_gamma(settings: GammaSettings, make: Callable[[float], RunSpec], start: float,
               say=print) -> float:
    """A gamma whose unclipped share is in RANGE; raises ConfigError when there is none."""
    low = high = None  # gammas with too small and too large a share
    gamma, diverged = start, 0
    for _ in range(settings.most):
        result = settings.run_all([make(gamma)])[0]
        share = 0.0 if result.diverged else result.mean("unclipped_fraction", 0.5)
        diverged += result.diverged
        if math.isnan(share):
            raise ConfigError(f"{settings.config} records no unclipped fraction: its optimizer "
                              "has no gamma; use --find=rate", "config")
        say(f"gamma {gamma:.4g}: {share:.1%} unclipped, loss {result.loss:.4f}")
        if RANGE[0] <= share <= RANGE[1]:
            return gamma
        if share < RANGE[0]:
            low = gamma
        else:
            high = gamma
        if low is None or high is None:
            gamma *= 10 if share < RANGE[0] else 0.1
        else:
            gamma = math.sqrt(low * high)
    if diverged == settings.most:
        raise ConfigError(f"all of {diverged} runs diverged, whatever gamma; lower the learning "
                          "rate", "config")
    raise ConfigError(f"none of {settings.most} gammas gave {RANGE[0]:.0%} to {RANGE[1]:.0%} "
                      "unclipped coordinates; raise --most or --steps", "most")


def search(settings: GammaSettings) -> dict[str, float]:
    """The settings found, by their keys."""
    given = (*contender_flags(settings.config), *settings.extra)
    config = RunSpec("", given).config()
    every = max(1, settings.steps // 50)
    common = dict(log_interval=every, eval_interval=settings.steps)
    known = OPTIMIZERS.get(config.optimizer)
    if known is not None and known.is_sophia and not config.gamma_target \
            and settings.steps < config.max_iters:
        common["hessian_bias_correction"] = True
    found: dict[str, float] = {}
    if settings.find in ("gamma", "both"):
        if config.gamma_target:
            raise ConfigError(f"{settings.config} controls gamma itself (gamma_target = "
                              f"{config.gamma_target}); use --find=rate, or gamma_target=0",
                              "config")

        def with_gamma(gamma: float) -> RunSpec:
            return RunSpec(f"gamma_{gamma:.4g}",
                        scaled_flags(given, settings.steps, gamma=f"{gamma:.6g}", **common))

        found["gamma"] = float(f"{find_gamma(settings, with_gamma, config.gamma):.3g}")
    if settings.find in ("rate", "both"):
        fixed = common | {key: f"{value:.6g}" for key, value in found.items()}

        def with_rate(rate: float) -> RunSpec:
            text = "_".join(["rate", f"{rate:.4g}", *(f"{k}{v}" for k, v in found.items())])
            return RunSpec(text, scaled_flags(given, settings.steps,
                                              learning_rate=f"{rate:.6g}", **fixed))

        rates = sweep_lr(settings, {settings.config: (with_rate, config.learning_rate)},
                         factor=settings.factor, most=settings.most, below=True)[settings.config]
        found["learning_rate"] = float(f"{rates.best:.3g}")
        blown = f"blew up at {rates.blown:.3g}" if rates.blown else "none blew up: raise --most"
        print(f"learning rates: largest stable {rates.largest:.3g}, {blown}, lowest loss "
              f"{rates.best_loss:.4f} at {rates.best:.3g}"
              + ", the lowest that was tried: raise --most" * (rates.best == rates.least))
    return found


@command()
def main(argv: list[str]) -> None:
    """The command; exits with 2 and one line after a user's mistake."""
    settings, _ = load(GammaSettings, argv, "python -m experiments.gamma --config=CONFIG")
    for key, value in search(settings).items():
        print(f"{key} = {value:g}")


if __name__ == "__main__":
    main(sys.argv[1:])
