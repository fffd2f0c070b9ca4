"""Tunes several optimizers alike and says how many steps of the baseline each is worth.

    python -m experiments.leaderboard --baseline="adamw: config/quickstart_adamw.py" \
        --candidates="muon: config/quickstart_adamw.py, optimizer=muon, muon_momentum=0.9|0.95" \
        --max_iters=300,600,1200 --longer=2 --seeds=3 --budget=12

A contender is `NAME: FILE, key=value, ...`; several are separated by semicolons. A key may have
alternatives, `key=a|b`: an option of its own that is tuned, the first value first.
`learning_rate=a|b|c` is its ladder, by default half, once and twice its config's.

Each contender is tuned at the length --tune_at, the longest by default, where verdicts are given,
by the same number of runs, --budget, with the first seed: the ladder, which goes on beyond an end
that is best, twice at most; warm-ups (--warmups, as shares of the run); its options, one after the
other; a ladder anew with the warm-up and options that were best, since a rate that is too large
with one beta1 may not be with another; then rates between. At its best each runs with every seed at
every length T, the baseline also at `longer` times the longest. With --trunk one run with a
constant rate serves all lengths: the shorter ones branch off it where their cooldown begins, with
the losses that they would have had alone.

Reported at each T: the mean final loss and its standard error; the difference to the baseline with
the same seeds and its 95 % interval by Student's t; the speed-up: the T at which the baseline has
that loss, interpolated in log T, over T. Its 95 % interval and p-values are by a bootstrap over
seeds (`experiments.judge`); a verdict is given where Holm's correction over the contenders leaves
p < 0.025 that the speed-up is at most 1, or 2, or that it is at least 1. The first seed is also the
one that settings were chosen by, which favours every contender's first cell at --tune_at a little.
In --out_dir: leaderboard.md and .json, from which experiments.report makes the tables again.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import math
import sys
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from experiments import judge
from experiments.archive import Remembering, Replaying, archive, command_line
from experiments.compare import SHARED_KEYS, contender_flags, parse_numbers
from experiments.runs import Result, RunSettings, RunSpec, mean
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, option
from nanosophia.files import write_text

RECORDS = 20  # of a run, of its training loss and times


@dataclass(frozen=True, kw_only=True)
class LeaderboardSettings(RunSettings):
    """Settings of `python -m experiments.leaderboard`."""

    baseline: str = option("", "NAME: config file, then settings after commas",
                           section="comparison")
    candidates: str = option("", "the same of each contender, separated by semicolons")
    max_iters: str = option("", "lengths T, comma-separated")
    longer: str = option("", "multiples of the longest T that the baseline alone is run for")
    tune_at: int = option(0, "length at which all are tuned; 0 = the longest of max_iters", low=0)
    budget: int = option(12, "runs that tune each contender", low=3)
    warmups: str = option("0.05,0.15", "warm-ups, as shares of the run, the first one first")
    trunk: bool = option(
        False, "schedule = wsd, and the shorter lengths branch their cooldowns off the longest run")
    seeds: int = option(3, "runs of each cell, with seeds 0, 1, ...", low=1)

    def check(self) -> None:
        super().check()
        for key in ("baseline", "candidates"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is not given; write NAME: config/FILE.py, key=value", key)
        if any(x != int(x) for x in parse_numbers(self, "max_iters")):
            raise ConfigError(f"max_iters = {self.max_iters!r} are not whole numbers", "max_iters")
        if any(x <= 1 for x in parse_numbers(self, "longer", may_be_empty=True)):
            raise ConfigError(f"longer = {self.longer!r} are multiples above 1", "longer")
        if any(x >= 1 for x in parse_numbers(self, "warmups")):
            raise ConfigError(f"warmups = {self.warmups!r} are shares below 1", "warmups")
        if len(self.baseline_lengths) < 2:
            raise ConfigError("one length of the baseline gives no curve to read speed-ups from; "
                              "give more max_iters, or --longer=2", "max_iters", "longer")
        if len(self.contenders) < 2 or len({c.name for c in self.contenders}) < \
                len(self.contenders):
            raise ConfigError("contenders need a name each; two have the same, or there is one "
                              "alone", "candidates")
        for c in self.contenders:
            needed = len(c.rates) + len(parse_numbers(self, "warmups")) - 1 + sum(
                len(values) - 1 for values in c.options.values())
            if self.budget < needed:
                raise ConfigError(f"budget = {self.budget} is less than the {needed} runs that "
                                  f"{c.name} takes to try its rates, warm-ups and options once; "
                                  "raise it", "budget")

    @property
    def lengths(self) -> list[int]:
        """Returns the lengths of every contender, shortest first."""
        return sorted(int(x) for x in parse_numbers(self, "max_iters"))

    @property
    def baseline_lengths(self) -> list[int]:
        """Returns the lengths of the baseline, shortest first."""
        more = parse_numbers(self, "longer", may_be_empty=True)
        return sorted({*self.lengths, *(round(self.lengths[-1] * x) for x in more)})

    @property
    def tuning_length(self) -> int:
        """Returns the length at which contenders are tuned."""
        return self.tune_at or self.lengths[-1]

    @cached_property
    def contenders(self) -> list["Contender"]:
        """Returns the baseline and the candidates; raises ConfigError."""
        return [Contender.parse(text, self.extra)
                for text in (self.baseline, *self.candidates.split(";")) if text.strip()]


@dataclass(frozen=True)
class Contender:
    """An optimizer with its config, the ladder of its rates, and options with alternatives."""

    name: str
    flags: tuple[str, ...]
    rates: tuple[float, ...]
    options: dict[str, tuple[str, ...]]

    @classmethod
    def parse(cls, text: str, extra: tuple[str, ...] = ()) -> "Contender":
        """Returns the contender that a text describes, beside flags for all; raises ConfigError."""
        name, colon, rest = text.partition(":")
        if not colon or not name.strip() or not rest.strip() or "/" in name:
            raise ConfigError(f"{text.strip()!r} is no contender; write NAME: config/FILE.py, "
                              "key=value, without a / in NAME", "candidates")
        alternatives, flags = {}, []
        for flag in contender_flags(rest):
            key, _, value = flag.partition("=")
            if "|" in value:
                alternatives[key.removeprefix("--")] = tuple(value.split("|"))
            else:
                flags.append(flag)
        rates = alternatives.pop("learning_rate", ())
        if repeated := [key for key, v in alternatives.items() if len(set(v)) < len(v)]:
            raise ConfigError(f"{name.strip()}: an alternative of {repeated[0]} is given twice; "
                              "leave one out", "candidates")
        keys = {flag.partition("=")[0].removeprefix("--") for flag in flags} | alternatives.keys()
        if own := keys & {"warmup_iters", "max_iters", "seed", "eval_interval", "log_interval"}:
            raise ConfigError(f"{name.strip()} sets {min(own)}, which the leaderboard sets itself; "
                              "leave it out", "candidates")
        try:
            rates = sorted({float(x) for x in rates})
        except ValueError:
            raise ConfigError(f"{name.strip()}: learning_rate = {'|'.join(rates)} are no numbers",
                              "candidates") from None
        if not rates:
            rate = RunSpec("", (*extra, *flags)).config().learning_rate
            rates = [rate / 2, rate, rate * 2]
        return cls(name.strip(), tuple(flags), tuple(rates), alternatives)


@dataclass(frozen=True)
class Setting:
    """What is tuned of a contender."""

    rate: float
    warmup: float  # share of the run
    options: tuple[str, ...]  # the values of its contender's


def spec_of(settings: LeaderboardSettings, contender: Contender, setting: Setting, steps: int,
            seed: int) -> RunSpec:
    """Returns the spec of a contender's run; the same cell always has the same name."""
    values = dict(zip(contender.options, setting.options, strict=True)) | dict(
        learning_rate=f"{setting.rate:.5g}", warmup_iters=round(setting.warmup * steps),
        max_iters=steps, seed=seed, eval_interval=steps, checkpoint_interval=steps,
        log_interval=max(1, steps // RECORDS))
    if settings.trunk:
        values["schedule"] = "wsd"
    name = "_".join([contender.name, f"T{steps}", f"lr{setting.rate:.5g}", f"w{setting.warmup:g}",
                     *setting.options, f"s{seed}"])
    return RunSpec(name, (*settings.extra, *contender.flags,
                          *(f"--{key}={value}" for key, value in values.items())))


def trunk_and_branches(settings: LeaderboardSettings, contender: Contender, setting: Setting,
                       lengths: list[int], seed: int) -> dict[int, RunSpec]:
    """Returns by length the longest run, which saves where cooldowns begin, and its branches.

    All warm up as the shortest does. Raises ConfigError where no few saves hit all beginnings.
    """
    specs = {T: spec_of(settings, contender, setting, T, seed) for T in lengths}
    share = specs[lengths[0]].config().cooldown_fraction
    begins = {T: round((1 - share) * T) for T in lengths[:-1]}
    interval = math.gcd(*begins.values()) if begins else lengths[-1]
    if interval * 100 < lengths[-1]:
        raise ConfigError(f"cooldowns of max_iters = {settings.max_iters} begin at "
                          f"{', '.join(map(str, begins.values()))}, which have no large common "
                          "divisor; choose lengths that are multiples of one another", "max_iters")
    more = (f"--warmup_iters={round(setting.warmup * lengths[0])}",)
    saves = (f"--checkpoint_interval={interval}", "--keep_best=False",
             f"--keep_checkpoints={lengths[-1] // interval + 2}")
    longest = specs[lengths[-1]]
    trunk = RunSpec(f"{longest.name}_trunk", (*longest.flags, *more, *saves))
    return {T: RunSpec(f"{spec.name}_branch", (*spec.flags, *more), (trunk.name, begins[T]))
            if T in begins else trunk for T, spec in specs.items()}


Tuning = Generator[list[Setting], dict[Setting, float], Setting]


def tune(contender: Contender, warmups: list[float], budget: int) -> Tuning:
    """Yields the settings to try next, takes the losses of all tried so far, returns the best."""
    tried: dict[Setting, float] = {}
    first = Setting(contender.rates[len(contender.rates) // 2], warmups[0],
                    tuple(values[0] for values in contender.options.values()))

    def best() -> Setting:
        # Where every run diverged, the smallest rate, beyond which the search goes on.
        return min(tried, key=lambda s: (tried[s], s.rate)) if tried else first

    tried = yield [replace(first, rate=rate) for rate in contender.rates]
    others = len(warmups) - 1 + sum(len(values) - 1 for values in contender.options.values())
    while len(tried) < min(budget - others, len(contender.rates) + 2) and (
            rate := beyond(tried, best())):
        tried = yield [replace(best(), rate=rate)]
    for i in range(-1, len(contender.options)):
        if i < 0:
            new = [replace(best(), warmup=x) for x in warmups]
        else:
            now = best().options
            new = [replace(best(), options=(*now[:i], x, *now[i + 1:]))
                   for x in list(contender.options.values())[i]]
        if new := [x for x in new if x not in tried]:
            tried = yield new
    while len(tried) < budget:
        tried = yield [replace(best(), rate=beyond(tried, best()) or between(tried, best()))]
    return best()


def rates_beside(tried: dict[Setting, float], best: Setting) -> list[float]:
    """Returns the rates that were tried with the best setting's warm-up and options."""
    return sorted(setting.rate for setting in tried
                  if replace(setting, rate=best.rate) == best)


def beyond(tried: dict[Setting, float], best: Setting) -> float | None:
    """Returns a rate beyond the end of those beside the best one, if it is there: twice or half."""
    rates = rates_beside(tried, best)
    return best.rate * 2 if best.rate == rates[-1] else \
        best.rate / 2 if best.rate == rates[0] else None


def between(tried: dict[Setting, float], best: Setting) -> float:
    """Returns the geometric mean of the best rate and its neighbour that is farther away."""
    rates = rates_beside(tried, best)
    i = rates.index(best.rate)
    low, high = rates[i - 1], rates[i + 1]
    return math.sqrt(best.rate * (high if high / best.rate >= best.rate / low else low))


@dataclass(frozen=True)
class Outcome:
    """A contender at its best: how it was tuned, and its runs by length, a list by seed."""

    contender: Contender
    setting: Setting
    tried: dict[Setting, float]
    runs: dict[int, list[Result]]

    @property
    def at_an_end(self) -> bool:
        """Returns whether the best rate is the largest or smallest that was tried beside it."""
        return beyond(self.tried, self.setting) is not None

    def losses(self) -> dict[int, list[float]]:
        """Returns the final losses by length, by seed."""
        return {T: [run.loss for run in runs] for T, runs in self.runs.items()}

    @cached_property
    def processor_seconds(self) -> float:
        """Returns the processor time of a step, the median over runs."""
        found = sorted(run.processor_seconds for runs in self.runs.values() for run in runs)
        return found[len(found) // 2]

    @cached_property
    def flops(self) -> float:
        """Returns the FLOPs of a step and its share of estimates, without the optimizer's own."""
        run = next(iter(self.runs.values()))[0]
        return run.flops / run.steps if run.steps else math.nan

    @cached_property
    def state_bytes(self) -> float:
        """Returns the bytes of the optimizer's state per parameter."""
        plan = next(iter(self.runs.values()))[0].plan
        return plan.state_bytes / plan.parameters

    def describe(self) -> str:
        """Returns its best setting in words."""
        own = "".join(f", {key} {value}" for key, value in
                      zip(self.contender.options, self.setting.options, strict=True))
        end = " (at an end)" if self.at_an_end else ""
        return f"lr {self.setting.rate:.3g}{end}, warm-up {self.setting.warmup:.0%}{own}"


def run_leaderboard(settings: LeaderboardSettings) -> list[Outcome]:
    """Makes the runs that are missing; returns the outcomes, the baseline's first.

    Raises ConfigError, before the first run, where contenders cannot be compared.
    """
    contenders = settings.contenders
    check_shared(settings)
    tuned, specs = tune_all(settings), {}
    for c in contenders:
        lengths = settings.baseline_lengths if c is contenders[0] else settings.lengths
        best, _ = tuned[c.name]
        for seed in range(settings.seeds):
            found = trunk_and_branches(settings, c, best, lengths, seed) if settings.trunk else {
                T: spec_of(settings, c, best, T, seed) for T in lengths}
            specs |= {(c.name, T, seed): spec for T, spec in found.items()}
    # Trunks before their branches, and longest first, so that no long run is left over at the end.
    order = sorted(specs, key=lambda cell: -cell[1])
    results: dict[tuple, Result] = {}
    for branches in (False, True):
        cells = [cell for cell in order if bool(specs[cell].branch) is branches]
        results |= zip(cells, settings.run_all([specs[cell] for cell in cells]), strict=True)
    return [Outcome(c, *tuned[c.name], {
        T: [results[c.name, T, seed] for seed in range(settings.seeds)]
        for T in sorted({T for name, T, _ in specs if name == c.name})}) for c in contenders]


def tune_all(settings: LeaderboardSettings) -> dict[str, tuple[Setting, dict[Setting, float]]]:
    """Returns each contender's best setting and all that were tried; they are tuned in turns."""
    warmups = parse_numbers(settings, "warmups")
    contenders = {c.name: c for c in settings.contenders}
    tunings = {name: tune(c, warmups, settings.budget) for name, c in contenders.items()}
    wanted, done = {name: next(tuning) for name, tuning in tunings.items()}, {}
    tried: dict[str, dict[Setting, float]] = {name: {} for name in tunings}
    while wanted:
        pairs = [(name, setting) for name, new in wanted.items() for setting in new]
        specs = [spec_of(settings, contenders[name], x, settings.tuning_length, 0)
                 for name, x in pairs]
        for (name, x), result in zip(pairs, settings.run_all(specs), strict=True):
            tried[name][x] = result.loss
        for name in list(wanted):
            try:
                wanted[name] = tunings[name].send(tried[name])
            except StopIteration as stopped:
                done[name] = stopped.value, tried[name]
                del wanted[name]
    return done


def check_shared(settings: LeaderboardSettings) -> None:
    """Raises ConfigError where losses or steps would not measure the same thing."""
    first, *others = settings.contenders
    if settings.trunk:
        setting = Setting(first.rates[0], parse_numbers(settings, "warmups")[0],
                          tuple(values[0] for values in first.options.values()))
        for lengths in (settings.lengths, settings.baseline_lengths):
            trunk_and_branches(settings, first, setting, lengths, 0)
    base = RunSpec("", (*settings.extra, *first.flags)).config()
    for contender in settings.contenders:
        for i in range(max(map(len, contender.options.values()), default=1)):
            tried = Setting(contender.rates[0], parse_numbers(settings, "warmups")[0],
                            tuple(v[min(i, len(v) - 1)] for v in contender.options.values()))
            settings.check_specs([spec_of(settings, contender, tried, settings.lengths[0], 0)])
    for contender in others:
        config = RunSpec("", (*settings.extra, *contender.flags)).config()
        for key in (*SHARED_KEYS, "total_batch_size", "n_layer", "n_head", "n_embd", "vocab_size"):
            if getattr(config, key) != getattr(base, key):
                raise ConfigError(f"{contender.name} has {key} = {getattr(config, key)!r}, "
                                  f"{first.name} {getattr(base, key)!r}: give both the same",
                                  "baseline", "candidates")


def markdown(settings: LeaderboardSettings, outcomes: list[Outcome]) -> str:
    """Returns how the contenders were tuned, a table for each length, and the verdicts."""
    base, *others = outcomes
    first = base.runs[settings.lengths[0]][0]
    lines = [f"{first.plan.parameters / 1e6:.2f}M parameters, {first.config.tokens_per_step:,} "
             f"tokens per step, validation on {first.config.eval_windows:,} windows; "
             f"{settings.budget} runs tuned each contender at T = {settings.tuning_length:,}; "
             f"{settings.seeds} seeds", ""]
    verdicts = []
    for T in reversed(settings.lengths):
        rows = judge.compare(base.losses(), {o.contender.name: o.losses() for o in others}, T)
        lines += [f"T = {T:,}:", "", "| | at its best | loss (standard error) | difference to "
                  f"{base.contender.name} (95 %) | speed-up in steps (95 %) | in processor time | "
                  "in FLOPs | bytes of state per parameter |", "|---" * 8 + "|"]
        table = [(mean(base.losses()[T]), _row(base, base, T, None))]
        for outcome in others:
            row = rows[outcome.contender.name]
            table.append((row.mean, _row(outcome, base, T, row)))
            if settings.lengths[-1] == T:
                verdicts.append((row.mean, f"- {outcome.contender.name}: {row.verdict()}"))
        lines += [text for _, text in sorted(table, key=lambda pair: pair[0])] + [""]
    lines += [f"At T = {settings.lengths[-1]:,}, after Holm's correction over "
              f"{len(others)} contenders:", ""]
    return "\n".join(lines + [text for _, text in sorted(verdicts, key=lambda pair: pair[0])])


def _row(outcome: Outcome, base: Outcome, T: int, row: "judge.Row | None") -> str:
    losses = [run.loss for run in outcome.runs[T]]
    loss = "diverged" if math.inf in losses else \
        f"{mean(losses):.4f}" + (
            f" ({judge.standard_error(losses):.4f})" if len(losses) > 1 else "")
    cells = [outcome.contender.name, outcome.describe(), loss]
    if row is None:
        cells += ["", "1", "1", "1"]
    else:
        time = base.processor_seconds / outcome.processor_seconds
        cells += [row.difference_text(), row.speed_up.text(1.0), row.speed_up.text(time),
                  row.speed_up.text(base.flops / outcome.flops)]
    return f"| {' | '.join([*cells, f'{outcome.state_bytes:.1f}'])} |"


def remake(data: dict) -> str:
    """Returns what `markdown` does of stored runs; raises ConfigError."""
    settings = LeaderboardSettings(**data["settings"])
    return markdown(settings, run_leaderboard(Replaying(settings, data, "all")))


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(LeaderboardSettings, argv, "python -m experiments.leaderboard "
                                                  "--baseline=... --candidates=... [--key=value]")
    judge.require_scipy()
    runs, out = Remembering(settings), Path(settings.out_dir)
    outcomes = run_leaderboard(runs)
    kept = {key: value for key, value in vars(settings).items()
            if key not in ("out_dir", "jobs", "contenders")}
    data = archive(command_line("experiments.leaderboard", argv), {"all": runs.results.values()},
                   experiment="leaderboard", settings=kept)
    write_text(out / "leaderboard.json", json.dumps(data) + "\n")
    text = markdown(settings, outcomes)
    write_text(out / "leaderboard.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
