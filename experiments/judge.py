"""The statistics of experiments.leaderboard: intervals, speed-ups, and when they are a verdict.

A contender's cells are losses by length T and seed. The speed-up at T is T_A / T, where the
baseline reaches the contender's mean loss at T_A, by linear interpolation of its mean losses in
log T. Its interval is by a parametric bootstrap over seeds: the mean of every cell is drawn anew,
by Student's t with its standard error. The variance of seeds about their mean is pooled over a
contender's lengths, and over the baseline's from T on, where claims of a speed-up are decided;
seeds are taken to scatter alike there. A baseline's shorter lengths have each their own, since a
setting may be unstable in short runs alone.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.runs import mean
from nanosophia.configurator import ConfigError

DRAWS, LEVEL = 10_000, 0.95
Losses = dict[int, list[float]]  # by length, by seed


def require_scipy() -> None:
    """Raises ConfigError where scipy, which the intervals need, is missing."""
    try:
        import scipy.stats  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"the intervals need scipy ({error}); pip install scipy") from None


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean, NaN of one value."""
    return float(np.std(values, ddof=1) / math.sqrt(len(values))) if len(values) > 1 else math.nan


def t_interval(differences: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and half the width of its interval by Student's t."""
    from scipy.stats import t
    n = len(differences)
    half = standard_error(differences) * t.ppf((1 + LEVEL) / 2, n - 1) if n > 1 else math.nan
    return mean(differences), float(half)


def speed_ups(lengths: Sequence[int], baseline: np.ndarray, T: int, losses: np.ndarray,
              ) -> np.ndarray:
    """Returns T_A / T for each draw: baseline (draws, lengths), losses (draws,).

    Outside the baseline's losses it is exactly the end: the longest length over T, or the shortest.
    Runs shorter than T are taken to be no better than longer ones up to T, and lengths beyond T at
    which a baseline is no better than at a shorter one are left out.
    """
    found, at = np.empty(len(losses)), list(lengths).index(T)
    short = np.maximum.accumulate(baseline[:, at::-1], axis=1)[:, ::-1]
    baseline = np.concatenate([short, baseline[:, at + 1:]], axis=1)
    for i, (curve, loss) in enumerate(zip(baseline, losses, strict=True)):
        falls = curve < np.minimum.accumulate(np.concatenate([[math.inf], curve[:-1]]))
        kept, steps = curve[falls], np.asarray(lengths, float)[falls]
        if loss >= kept[0]:
            found[i] = lengths[0] / T
        elif loss <= kept[-1]:
            found[i] = lengths[-1] / T
        else:
            found[i] = math.exp(np.interp(-loss, -kept, np.log(steps))) / T
    return found


@dataclass(frozen=True)
class SpeedUp:
    """A speed-up, its interval, and the ends beyond which it cannot be told."""

    value: float
    low: float
    high: float
    least: float  # the baseline's shortest length over T
    most: float  # its longest

    def text(self, per_step: float) -> str:
        """Returns it in words, in units of which the baseline's step takes `per_step` times as
        many."""
        if math.isnan(self.value):
            return ""
        ends = {self.most: "at least ", self.least: "at most "}
        value, low, high = (f"{ends.get(x, '')}{x * per_step:.2f}"
                            for x in (self.value, self.low, self.high))
        return value if math.isnan(self.low) or value == low == high else \
            f"{value} ({low} to {high})"


@dataclass(frozen=True)
class Row:
    """What is said of a contender at one length."""

    mean: float  # loss
    difference: float  # to the baseline, with the same seeds
    half_width: float
    speed_up: SpeedUp
    p_one: float  # that it is at most 1, corrected
    p_two: float  # at most 2
    p_slow: float  # at least 1
    baseline_diverged: bool = False

    def difference_text(self) -> str:
        """Returns the difference and its interval in words."""
        if not math.isfinite(self.difference):
            return ""
        half = "" if math.isnan(self.half_width) else f" +- {self.half_width:.4f}"
        return f"{self.difference:+.4f}{half}"

    def verdict(self) -> str:
        """Returns a sentence: a claim only where the interval excludes 1, or 2."""
        if self.baseline_diverged or not math.isfinite(self.mean):
            return "no verdict: the baseline diverged" if self.baseline_diverged else "it diverged"
        s, limit = self.speed_up, (1 - LEVEL) / 2
        where = f"{s.text(1.0)} times as fast in steps"
        if math.isnan(s.low):
            return f"{where}; one seed, so no verdict"
        if s.low >= 2 and self.p_two < limit:
            return f"{where}: at least twice as fast"
        if s.low > 1 and self.p_one < limit:
            return f"{where}: faster"
        if s.high < 1 and self.p_slow < limit:
            return f"{where}: slower"
        return f"{where}: no verdict"


def compare(baseline: Losses, others: dict[str, Losses], T: int) -> dict[str, Row]:
    """Returns what is said of each contender at T, corrected for their number."""
    lengths = sorted(T for T, x in baseline.items() if np.isfinite(x).all())
    rng = np.random.Generator(np.random.Philox(key=0))
    curve = _means(baseline, lengths, rng, first=T)
    found, p_values = {}, {}
    for name, losses in others.items():
        if not np.isfinite([*losses[T], *baseline[T]]).all():
            found[name] = (mean(losses[T]), math.inf, math.nan, SpeedUp(*[math.nan] * 5))
            p_values[name] = (1.0, 1.0, 1.0)
            continue
        drawn = _means(losses, [T], rng)[:, 0]
        value, *draws = speed_ups(lengths, curve, T, drawn)
        draws, least, most = np.asarray(draws), lengths[0] / T, lengths[-1] / T
        low, high = np.quantile(draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)) \
            if len(losses[T]) > 1 else (math.nan, math.nan)
        difference, half = t_interval([a - b for a, b in zip(losses[T], baseline[T], strict=True)])
        found[name] = (mean(losses[T]), difference, half, SpeedUp(
            float(value), float(low), float(high), least, most))
        # What is beyond an end may be anything there: it speaks for no bound but the end's own. One
        # more draw speaks against each claim, so that no p is 0.
        against = (~((draws > 1) | ((draws == most) & (most >= 1))),
                   ~((draws > 2) | ((draws == most) & (most >= 2))),
                   ~((draws < 1) | ((draws == least) & (least < 1))))
        p_values[name] = tuple((1 + int(x.sum())) / (1 + len(draws)) for x in against)
    corrected = [holm({name: p[i] for name, p in p_values.items()}) for i in range(3)]
    diverged = not np.isfinite(baseline[T]).all()
    return {name: Row(*values, *(p[name] for p in corrected), diverged)
            for name, values in found.items()}


def _means(losses: Losses, lengths: Sequence[int], rng: np.random.Generator, first: int = 0,
           ) -> np.ndarray:
    """Returns mean losses (1 + DRAWS, lengths): as they are, then drawn by the bootstrap.

    The variance is pooled over the lengths from `first` on.
    """
    centre = np.asarray([mean(losses[T]) for T in lengths])
    seeds = len(losses[lengths[0]])
    if seeds < 2:
        return np.tile(centre, (1 + DRAWS, 1))
    pooled = [np.var(x, ddof=1) for length, x in losses.items()
              if length >= first and np.isfinite(x).all()]
    noise = np.empty((DRAWS, len(lengths)))
    for i, length in enumerate(lengths):
        variances = pooled if length >= first else [np.var(losses[length], ddof=1)]
        free = len(variances) * (seeds - 1)
        noise[:, i] = rng.standard_t(free, size=DRAWS) * math.sqrt(np.mean(variances) / seeds)
    return np.concatenate([centre[None], centre + noise])


def holm(p_values: dict[str, float]) -> dict[str, float]:
    """Returns the p-values after Holm's step-down correction (Holm 1979)."""
    corrected, so_far = {}, 0.0
    for i, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        so_far = max(so_far, min(1.0, p * (len(p_values) - i)))
        corrected[name] = so_far
    return corrected
