"""Compares two settings by the paper's T against T/2 protocol (its section 3.2).

    python -m experiments.compare --baseline=config/train_gpt2_small_adamw.py \
        --candidate=config/train_gpt2_small_sophiag.py --max_iters=100000,200000 --warmup=steps
    python -m experiments.compare --baseline="config/quickstart_adamw.py" --rates=0.5,1,2 \
        --candidate="config/quickstart.py,gamma_target=0.95" --max_iters=600 --ratios=0.5,0.7,1

"S is twice as fast as A" means: S with a schedule of T/2 steps ends at or below the loss at which A
ends with a schedule of T steps at its best learning rate. So for each T the baseline runs with the
first seed at every learning rate of its ladder, then with the other seeds at the best of them; the
candidate runs with every seed for each of `ratios` times T. Finished runs are not repeated.
A contender is a config file and settings after commas. Both must train on the same dataset and
context and be evaluated on the same windows. A config's warm-up keeps its share of the run when the
length changes; the paper's is 2000 steps at every length, which --warmup=steps keeps. Losses in the
middle of a schedule decide nothing: they are drawn, and the table shows the step at which a run
first reached the baseline's final loss. The results in --out_dir are comparison.md, .json, .svg and
.png.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import math
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from experiments.archive import Remembering, Replaying, archive, command_line
from experiments.plot import COLOURS, clear_frame, pyplot, save_figure
from experiments.runs import Result, RunSettings, RunSpec, by_name, mean, scaled_flags
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, option
from nanosophia.files import write_text
from nanosophia.options import Config

# Settings that both contenders must share, or their losses do not measure the same thing.
SHARED_KEYS = ("dataset", "block_size", "eval_windows")


@dataclass(frozen=True, kw_only=True)
class CompareSettings(RunSettings):
    """Settings of `python -m experiments.compare`."""

    baseline: str = option("", "config file, then settings after commas", section="comparison")
    candidate: str = option("", "config file, then settings after commas")
    max_iters: str = option("", "the baseline's lengths T, comma-separated; empty = its config's")
    ratios: str = option("0.5", "the candidate's lengths over T, comma-separated")
    rates: str = option("1", "the baseline's ladder: multiples of its rate, comma-separated")
    seeds: int = option(1, "runs of each setting, with seeds 0, 1, ...", low=1)
    warmup: Literal["share", "steps"] = option(
        "share", "what a config's warm-up keeps at another length: its share of the run or its "
                 "steps")

    def check(self) -> None:
        super().check()
        for key in ("baseline", "candidate"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is not given; give a config file, e.g. --{key}="
                                  "config/quickstart.py", key)
        for key in ("ratios", "rates"):
            parse_numbers(self, key)
        if any(x != int(x) for x in parse_numbers(self, "max_iters", may_be_empty=True)):
            raise ConfigError(f"max_iters = {self.max_iters!r} are not whole numbers; write them "
                              "like --max_iters=600,1200", "max_iters")

    def lengths(self) -> list[int]:
        """Returns the baseline's lengths T."""
        given = [int(x) for x in parse_numbers(self, "max_iters", may_be_empty=True)]
        return given or [self.config(self.baseline).max_iters]

    def flags_of(self, contender: str) -> tuple[str, ...]:
        """Returns train.py's flags of a contender, with those for every run."""
        return (*contender_flags(contender), *self.extra)

    def config(self, contender: str) -> Config:
        """Returns a contender's resolved settings; raises ConfigError."""
        return RunSpec("", self.flags_of(contender)).config()


@dataclass(frozen=True)
class LengthResults:
    """The results at one length of the baseline; lists have an entry per seed."""

    T: int
    sweep: dict[float, Result]  # the baseline with the first seed, by learning rate
    baseline: list[Result]  # at the best of these learning rates
    candidates: dict[float, list[Result]]  # by ratio of the candidate's length to T

    @property
    def best_rate(self) -> float:
        """Returns the baseline's best learning rate."""
        return self.baseline[0].config.learning_rate

    @property
    def target(self) -> float:
        """Returns the baseline's final loss, the mean over seeds: what a candidate must reach."""
        return mean([result.loss for result in self.baseline])


@dataclass(frozen=True)
class TableRow:
    """A setting in the table and in the JSON file; None stands for the loss of a diverged run."""

    name: str
    learning_rate: float
    steps: int
    tokens: int
    flops: float
    seconds: float
    losses: list[float | None]  # by seed, as `met`
    mean: float | None
    met: list[int | None]  # the step that first reached the baseline's final loss; None: never


def parse_numbers(settings: CompareSettings, key: str, *, may_be_empty: bool = False,
                  ) -> list[float]:
    """Returns the positive numbers of a comma-separated setting, each once; raises ConfigError."""
    text = getattr(settings, key)
    try:
        numbers = list(dict.fromkeys(float(x) for x in text.split(",") if x.strip()))
    except ValueError:
        numbers = [math.nan]  # refused below
    if not (numbers or may_be_empty) or not all(0 < x <= 2**53 for x in numbers):
        raise ConfigError(f"{key} = {text!r} is not a list of positive numbers; separate them by "
                          "commas", key)
    return numbers


def contender_flags(contender: str) -> tuple[str, ...]:
    """Returns train.py's flags for a config file and settings after commas.

    Commas within brackets or quotes belong to a value; the quotes are taken off.
    """
    parts, depth, quote = [""], 0, ""
    for c in contender:
        if quote or c in "'\"":
            quote = "" if c == quote else quote or c
        depth += (c in "([{") - (c in ")]}") if not quote else 0
        if c == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += c
    parts = [re.sub(r"=(['\"])(.*)\1$", r"=\2", part.strip()) for part in parts if part.strip()]
    return tuple(part if part.endswith(".py") else f"--{part}" for part in parts)


def contender_spec(settings: CompareSettings, name: str, contender: str, steps: int, seed: int,
                   **more) -> RunSpec:
    """Returns the spec of a contender at a length; it is evaluated at least ten times."""
    eval_interval = min(settings.config(contender).eval_interval, max(1, steps // 10))
    return RunSpec(f"{name}_s{seed}", scaled_flags(
        settings.flags_of(contender), steps, seed=seed, eval_interval=eval_interval,
        keep_warmup=settings.warmup == "steps", **more))


def run_comparison(settings: CompareSettings) -> list[LengthResults]:
    """Makes the runs that are missing; returns the results of each length.

    Raises ConfigError, before the first run, where a run would be refused or where the contenders
    cannot be compared.
    """
    check_shared_keys(settings)
    base_rate = settings.config(settings.baseline).learning_rate
    rates = [base_rate * x for x in parse_numbers(settings, "rates")]
    lengths, ratios = settings.lengths(), parse_numbers(settings, "ratios")
    seeds = range(settings.seeds)

    def baseline(T: int, rate: float, seed: int) -> RunSpec:
        return contender_spec(settings, f"baseline_T{T}_lr{rate:.6g}", settings.baseline, T, seed,
                              learning_rate=rate)

    def candidate(T: int, ratio: float, seed: int) -> RunSpec:
        steps = round(ratio * T)
        return contender_spec(settings, f"candidate_T{steps}", settings.candidate, steps, seed)

    sweep_specs = [baseline(T, rate, 0) for T in lengths for rate in rates]
    # Half of one T may be another T: that cell is run once.
    candidate_specs = list(dict.fromkeys(
        candidate(T, ratio, s) for T in lengths for ratio in ratios for s in seeds))
    settings.check_specs([*sweep_specs, *candidate_specs])
    swept = by_name(settings.run_all(sweep_specs))
    sweeps = {T: {rate: swept[baseline(T, rate, 0).name] for rate in rates} for T in lengths}
    best = {T: min(rates, key=lambda rate, T=T: sweeps[T][rate].loss) for T in lengths}
    results = by_name(settings.run_all(
        [baseline(T, best[T], s) for T in lengths for s in seeds] + candidate_specs))
    return [LengthResults(
        T, sweeps[T], [results[baseline(T, best[T], s).name] for s in seeds],
        {ratio: [results[candidate(T, ratio, s).name] for s in seeds] for ratio in ratios})
        for T in lengths]


def check_shared_keys(settings: CompareSettings) -> None:
    """Raises ConfigError where the contenders' losses would not measure the same thing."""
    first, second = settings.config(settings.baseline), settings.config(settings.candidate)
    for key in SHARED_KEYS:
        if getattr(first, key) != getattr(second, key):
            raise ConfigError(f"the baseline has {key} = {getattr(first, key)!r}, the candidate "
                              f"{getattr(second, key)!r}: their losses cannot be compared; give "
                              "both the same", "baseline", "candidate")


def verdicts(lengths: list[LengthResults]) -> list[str]:
    """Returns what the runs show: a sentence per T and ratio, and what limits the comparison."""
    sentences = []
    first = lengths[0].baseline[0].config
    second = next(iter(lengths[0].candidates.values()))[0].config
    if first.tokens_per_step != second.tokens_per_step:
        sentences.append(f"a step of the baseline sees {first.tokens_per_step:,} tokens, one of "
                         f"the candidate {second.tokens_per_step:,}: equal steps are not equal "
                         "data")
    for length in lengths:
        rates = list(length.sweep)
        if len(rates) > 1 and length.best_rate in (min(rates), max(rates)):
            sentences.append(f"T = {length.T:,}: the baseline's best learning rate, "
                             f"{length.best_rate:g}, is at the end of its ladder, so it may not be "
                             "tuned: widen --rates")
        sentences += [verdict(length, ratio) for ratio in length.candidates]
    return sentences


def verdict(length: LengthResults, ratio: float) -> str:
    """Returns the sentence on one length of the candidate: whether it reaches the baseline."""
    T, target, candidates = length.T, length.target, length.candidates[ratio]
    diverged = [r for r in (*candidates, *length.baseline) if r.diverged]
    if diverged:
        return (f"T = {T:,}: no verdict on {ratio:g} T, {len(diverged)} of "
                f"{len(candidates) + len(length.baseline)} runs diverged")
    losses = [r.loss for r in candidates]
    noise = "one seed each"
    if len(losses) > 1:
        spread = max(max(x) - min(x) for x in (losses, [r.loss for r in length.baseline]))
        noise = f"seeds differ by up to {spread:.4f}"
    verb = "reaches" if mean(losses) <= target else "does not reach"
    return (f"T = {T:,}: the candidate in {ratio:g} T = {round(ratio * T):,} steps {verb} the "
            f"baseline: {mean(losses):.4f} against {target:.4f} ({mean(losses) - target:+.4f}, "
            f"{noise})")


def table_rows(lengths: list[LengthResults]) -> list[TableRow]:
    """Returns a row per setting: at each T the baseline, its other rates, the candidates."""
    rows = []
    for length in lengths:
        T = length.T
        settings = [(f"baseline, T = {T:,}", length.baseline)]
        settings += [(f"baseline, T = {T:,}, ladder", [result])
                     for rate, result in length.sweep.items() if rate != length.best_rate]
        settings += [(f"candidate, {ratio:g} x {T:,}", results)
                     for ratio, results in length.candidates.items()]
        rows += [table_row(name, results, length.target) for name, results in settings]
    return rows


def table_row(name: str, results: list[Result], target: float) -> TableRow:
    """Returns the row of one setting, whose results differ in the seed alone."""
    first, losses = results[0], [None if r.diverged else r.loss for r in results]
    return TableRow(
        name=name, learning_rate=first.config.learning_rate, steps=first.config.max_iters,
        tokens=first.tokens, flops=first.flops, seconds=mean([r.seconds for r in results]),
        losses=losses, mean=None if None in losses else mean(losses),
        met=[r.steps_to(target) for r in results])


def markdown(lengths: list[LengthResults]) -> str:
    """Returns the verdicts and the table."""
    def text(loss: float | None) -> str:
        return "diverged" if loss is None else f"{loss:.4f}"

    lines = [*[f"- {sentence}" for sentence in verdicts(lengths)], "",
             "| | learning rate | steps | tokens | FLOPs | seconds | final val. loss by seed | "
             "mean | met the baseline's final loss at step |", "|---" * 9 + "|"]
    for row in table_rows(lengths):
        met = ", ".join("-" if step is None else f"{step:,}" for step in row.met)
        lines.append(f"| {row.name} | {row.learning_rate:g} | {row.steps:,} | {row.tokens:,} | "
                     f"{row.flops:.3g} | {row.seconds:.0f} | "
                     f"{', '.join(map(text, row.losses))} | {text(row.mean)} | {met} |")
    return "\n".join(lines)


def remake(data: dict) -> str:
    """Returns what `markdown` does of stored runs; raises ConfigError."""
    settings = CompareSettings(**data["settings"])
    windows = settings.config(settings.baseline).eval_windows
    return f"validation on {windows:,} windows\n\n" + markdown(
        run_comparison(Replaying(settings, data, "all")))


def draw(lengths: list[LengthResults], file: Path) -> None:
    """Draws the losses of the longest T on the left and final losses against steps on the right;
    writes `file` and a .png beside it."""
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained",
                                         sharey=True)
    lengths = sorted(lengths, key=lambda length: length.T)
    longest = lengths[-1]
    draw_losses(left, longest)
    draw_final_losses(right, lengths)
    for axes, title in ((left, f"validation loss, T = {longest.T:,}"), (right, "final losses")):
        if longest.target < math.inf:
            axes.axhline(longest.target, color="#777777", linewidth=0.8, linestyle=":")
        axes.set_title(title, loc="left", fontsize="medium")
        axes.set_xlabel("training steps")
        clear_frame(axes)
    left.set_ylabel("loss, nats per token")
    early = [r.points[len(r.points) // 8][1]
             for results in (longest.baseline, *longest.candidates.values())
             for r in results if r.points]
    if early:  # the first evaluations would hide the differences
        left.set_ylim(top=max(early))
    left.legend(frameon=False)
    save_figure(figure, file, file.with_suffix(".png"))


def draw_losses(axes, length: LengthResults) -> None:
    """Draws the validation losses of every run at one T, a colour per setting."""
    settings = {"baseline": length.baseline}
    settings |= {f"candidate, {ratio:g} T": results for ratio, results in length.candidates.items()}
    for i, (name, results) in enumerate(settings.items()):
        for seed, result in enumerate(results):
            label = f"{name} (diverged)" if result.diverged else name if seed == 0 else None
            axes.plot([step for step, _ in result.points], [loss for _, loss in result.points],
                      color=COLOURS[i % len(COLOURS)], linewidth=1.4, marker="o", markersize=3,
                      label=label)


def draw_final_losses(axes, lengths: list[LengthResults]) -> None:
    """Draws final losses over steps: a line through the means of a setting, a point per run."""
    settings = [[length.baseline for length in lengths]]
    settings += [[length.candidates[ratio] for length in lengths]
                 for ratio in lengths[0].candidates]
    for i, groups in enumerate(settings):
        colour = COLOURS[i % len(COLOURS)]
        axes.plot([results[0].config.max_iters for results in groups],
                  [mean([r.loss for r in results]) for results in groups],
                  color=colour, marker="o", linewidth=1.4)
        for results in groups:
            axes.plot([r.config.max_iters for r in results], [r.loss for r in results], ".",
                      color=colour, alpha=0.5)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(CompareSettings, argv, "python -m experiments.compare --baseline=CONFIG "
                                              "--candidate=CONFIG [--key=value]")
    pyplot()  # where matplotlib is missing, fail before the runs
    runs = Remembering(settings)
    lengths = run_comparison(runs)
    flags = f", flags {settings.flags}" if settings.flags else ""
    text, out = markdown(lengths), Path(settings.out_dir)
    write_text(out / "comparison.md", f"Baseline {settings.baseline}, candidate "
               f"{settings.candidate}{flags}.\n\n{text}\n\n![losses](comparison.svg)\n")
    kept = {key: value for key, value in vars(settings).items() if key not in ("out_dir", "jobs")}
    data = archive(command_line("experiments.compare", argv), {"all": runs.results.values()},
                   experiment="compare", settings=kept,
                   rows=[asdict(row) for row in table_rows(lengths)])
    write_text(out / "comparison.json", json.dumps(data) + "\n")
    draw(lengths, out / "comparison.svg")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
