"""The paper's T against T/2 protocol (its section 3.2) for any two settings.

    python -m experiments.compare --baseline=config/train_gpt2_small_adamw.py \
        --candidate=config/train_gpt2_small_sophiag.py --max_iters=100000,200000 --warmup=steps
    python -m experiments.compare --baseline="config/quickstart_adamw.py" --rates=0.5,1,2 \
        --candidate="config/quickstart.py,gamma_target=0.95" --max_iters=600 --ratios=0.5,0.7,1

"S is twice as fast as A" means: S, scheduled for T/2 steps, ends at or below the loss that A,
scheduled for T steps at its best learning rate, ends at. So for each T the baseline runs at every
rate of its ladder with the first seed, then with the other seeds at the best; the candidate runs
for each of `ratios` times T with every seed. Runs that have finished are not run again. A contender
is a config file and settings after commas; both must train on the same dataset and context and be
evaluated on the same windows. The warm-up keeps its share of a run; the paper's is 2000 steps in
runs of every length, which --warmup=steps keeps. Losses in the middle of a schedule decide nothing;
they are drawn, and the table tells when a run first met the baseline's final loss.
Written to --out_dir: comparison.md, .json, .svg and .png.
"""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments.plot import COLOURS, pyplot
from experiments.runs import RunSettings, RunSpec, by_name, mean, scaled_flags
from nanosophia.configurator import ConfigError, command, knob, load


@dataclass(frozen=True, kw_only=True)
class CompareSettings(RunSettings):
    """The settings of this command."""

    baseline: str = knob("", "config file, then settings after commas", section="comparison")
    candidate: str = knob("", "config file, then settings after commas")
    max_iters: str = knob("", "the baseline's lengths T, comma-separated; empty = its config's")
    ratios: str = knob("0.5", "the candidate's lengths over T, comma-separated")
    rates: str = knob("1", "the baseline's ladder: multiples of its learning rate, comma-separated")
    seeds: int = knob(1, "runs of each setting, with seeds 0, 1, ...", low=1)
    warmup: Literal["share", "steps"] = knob(
        "share", "what of a config's warm-up is kept when the length is another")

    def check(self) -> None:
        super().check()
        for key in ("baseline", "candidate"):
            if not getattr(self, key):
                raise ConfigError(f"{key} is not given; give a config file, e.g. --{key}="
                                  "config/quickstart.py", key)
        for key in ("ratios", "rates"):
            numbers(self, key)
        if any(x != int(x) for x in numbers(self, "max_iters", empty=True)):
            raise ConfigError(f"max_iters = {self.max_iters!r} are not whole numbers", "max_iters")

    def lengths(self) -> list[int]:
        """The baseline's Ts."""
        return [int(x) for x in numbers(self, "max_iters", empty=True)] or \
            [RunSpec("", self.contender(self.baseline)).config().max_iters]

    def contender(self, text: str) -> tuple[str, ...]:
        """train.py's arguments of a contender, with those for every run."""
        return (*flags(text), *self.extra)


def numbers(settings, key: str, *, empty: bool = False) -> list[float]:
    """The positive numbers of a comma-separated setting, each once; raises ConfigError."""
    text = getattr(settings, key)
    try:
        found = list(dict.fromkeys(float(x) for x in text.split(",") if x.strip()))
    except ValueError:
        found = [-1.0]
    if not (found or empty) or not all(0 < x < math.inf for x in found):
        raise ConfigError(f"{key} = {text!r} is not a list of positive numbers; write it like "
                          f"--{key}=1,2", key)
    return found


def flags(contender: str) -> tuple[str, ...]:
    """train.py's arguments of a contender."""
    parts = [part.strip() for part in contender.split(",") if part.strip()]
    return tuple(part if part.endswith(".py") else f"--{part}" for part in parts)


def one(settings: CompareSettings, name: str, contender: str, steps: int, seed: int,
        **more) -> RunSpec:
    """The spec of a contender at a length, evaluated at least ten times."""
    given = settings.contender(contender)
    every = min(RunSpec("", given).config().eval_interval, max(1, steps // 10))
    return RunSpec(f"{name}_s{seed}", scaled_flags(given, steps, seed=seed, eval_interval=every,
                                                   keep_warmup=settings.warmup == "steps", **more))


ALIKE = ("dataset", "block_size", "eval_windows")  # or the losses are not of the same thing


def run_comparison(settings: CompareSettings) -> dict:
    """Runs what is missing; {T: {"ladder": {rate: Result}, "baseline": [Result],
    ratio: [Result]}}. Raises ConfigError, before anything has run, where a run would be refused or
    the contenders cannot be compared."""
    first, second = (RunSpec("", settings.contender(text)).config()
                     for text in (settings.baseline, settings.candidate))
    for key in ALIKE:
        if getattr(first, key) != getattr(second, key):
            raise ConfigError(f"the baseline has {key} = {getattr(first, key)!r}, the candidate "
                              f"{getattr(second, key)!r}: their losses cannot be compared; give "
                              "both the same", "baseline", "candidate")
    rates = [first.learning_rate * x for x in numbers(settings, "rates")]
    lengths, ratios = settings.lengths(), numbers(settings, "ratios")

    def baseline(T: int, rate: float, seed: int) -> RunSpec:
        return one(settings, f"baseline_T{T}_lr{rate:.6g}", settings.baseline, T, seed,
                   learning_rate=rate)

    def candidate(T: int, ratio: float, seed: int) -> RunSpec:
        return one(settings, f"candidate_{ratio:g}T{T}", settings.candidate, round(ratio * T), seed)

    seeds = range(settings.seeds)
    tried = [baseline(T, rate, 0) for T in lengths for rate in rates]
    judged = [candidate(T, ratio, s) for T in lengths for ratio in ratios for s in seeds]
    settings.check_specs([*tried, *judged])
    ladder = by_name(settings.run_all(tried))
    best = {T: min(rates, key=lambda rate, T=T: ladder[baseline(T, rate, 0).name].loss)
            for T in lengths}
    rest = by_name(settings.run_all(
        [baseline(T, best[T], s) for T in lengths for s in seeds] + judged))
    return {T: {"ladder": {rate: ladder[baseline(T, rate, 0).name] for rate in rates},
                "baseline": [rest[baseline(T, best[T], s).name] for s in seeds],
                **{ratio: [rest[candidate(T, ratio, s).name] for s in seeds] for ratio in ratios}}
            for T in lengths}


def verdicts(found: dict) -> list[str]:
    """One sentence per T and ratio."""
    words = []
    group = next(iter(found.values()))
    first, second = group["baseline"][0].config, next(reversed(group.values()))[0].config
    if first.tokens_per_step != second.tokens_per_step:
        words.append(f"a step of the baseline sees {first.tokens_per_step:,} tokens, one of the "
                     f"candidate {second.tokens_per_step:,}: equal steps are not equal data")
    for T, group in found.items():
        target = mean([r.loss for r in group["baseline"]])
        edge = list(group["ladder"])
        if len(edge) > 1 and group["baseline"][0].config.learning_rate in (min(edge), max(edge)):
            words.append(f"T = {T:,}: the baseline's best learning rate, "
                         f"{group['baseline'][0].config.learning_rate:g}, is at the end of its "
                         "ladder, so it may not be tuned: widen --rates")
        for ratio, results in group.items():
            if ratio in ("ladder", "baseline"):
                continue
            losses = [r.loss for r in results]
            lost = sum(r.diverged for r in (*results, *group["baseline"]))
            if lost:
                words.append(f"T = {T:,}: no verdict on {ratio:g} T, {lost} of "
                             f"{len(results) + len(group['baseline'])} runs diverged")
                continue
            gap, every = mean(losses) - target, [r.loss for r in (*results, *group["baseline"])]
            spread = max(max(x) - min(x) for x in
                         (losses, [r.loss for r in group["baseline"]])) if len(every) > 2 else None
            verb = "reaches" if gap <= 0 else "does not reach"
            noise = f", seeds differ by up to {spread:.4f}" if spread is not None else \
                ", one seed each"
            words.append(f"T = {T:,}: the candidate in {ratio:g} T = {round(ratio * T):,} steps "
                         f"{verb} the baseline: {mean(losses):.4f} against {target:.4f} "
                         f"({gap:+.4f}{noise})")
    return words


def rows(found: dict) -> list[dict]:
    """What the table and the JSON file hold: one entry per setting."""
    table = []
    for T, group in found.items():
        target = mean([r.loss for r in group["baseline"]])
        best = group["baseline"][0].config.learning_rate
        settings = [(f"baseline, T = {T:,}", group["baseline"])]
        settings += [(f"baseline, T = {T:,}, ladder", [r]) for rate, r in group["ladder"].items()
                     if rate != best]
        settings += [(f"candidate, {ratio:g} x {T:,}", results) for ratio, results in group.items()
                     if ratio not in ("ladder", "baseline")]
        for name, results in settings:
            first = results[0]
            table.append(dict(
                name=name, learning_rate=first.config.learning_rate, steps=first.config.max_iters,
                tokens=first.tokens, flops=first.flops, seconds=mean([r.seconds for r in results]),
                losses=[None if r.diverged else r.loss for r in results],
                mean=None if any(r.diverged for r in results) else mean([r.loss for r in results]),
                met=[r.steps_to(target) for r in results]))
    return table


def markdown(settings: CompareSettings, found: dict) -> str:
    """The report."""
    def words(loss: float | None) -> str:
        return "diverged" if loss is None else f"{loss:.4f}"

    lines = [f"Baseline {settings.baseline}, candidate {settings.candidate}"
             + (f", flags {settings.flags}" if settings.flags else "") + ".", "",
             *[f"- {words}" for words in verdicts(found)], "",
             "| | learning rate | steps | tokens | FLOPs | seconds | final val. loss by seed | "
             "mean | met the baseline's final loss at step |", "|---" * 9 + "|"]
    for r in rows(found):
        met = ", ".join("-" if m is None else f"{m:,}" for m in r["met"])
        lines.append(f"| {r['name']} | {r['learning_rate']:g} | {r['steps']:,} | {r['tokens']:,} | "
                     f"{r['flops']:.3g} | {r['seconds']:.0f} | "
                     f"{', '.join(map(words, r['losses']))} | {words(r['mean'])} | {met} |")
    return "\n".join([*lines, "", "![losses](comparison.svg)", ""])


def draw(found: dict, file: Path) -> None:
    """The losses of the longest T on the left, final losses against steps on the right.

    Also as a .png beside it.
    """
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 3.8), layout="constrained",
                                         sharey=True)
    T, group = max(found.items())
    kinds = [kind for kind in group if kind != "ladder"]
    for i, kind in enumerate(kinds):
        name = "baseline" if kind == "baseline" else f"candidate, {kind:g} T"
        for n, result in enumerate(group[kind]):
            left.plot([step for step, _ in result.points], [loss for _, loss in result.points],
                      color=COLOURS[i % len(COLOURS)], linewidth=1.4, marker="o", markersize=3,
                      label=name + " (diverged)" * result.diverged
                      if n == 0 or result.diverged else None)
        means = [(g[kind][0].config.max_iters, mean([r.loss for r in g[kind]]))
                 for _, g in sorted(found.items())]
        right.plot(*zip(*means, strict=True), color=COLOURS[i % len(COLOURS)], marker="o",
                   linewidth=1.4)
        for g in found.values():
            right.plot([r.config.max_iters for r in g[kind]], [r.loss for r in g[kind]], ".",
                       color=COLOURS[i % len(COLOURS)], alpha=0.5)
    target = mean([r.loss for r in group["baseline"]])
    for axes, words in ((left, f"validation loss, T = {T:,}"), (right, "final losses")):
        if target < math.inf:
            axes.axhline(target, color="#777777", linewidth=0.8, linestyle=":")
        axes.set_title(words, loc="left", fontsize="medium")
        axes.set_xlabel("training steps")
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    left.set_ylabel("loss, nats per token")
    early = [r.points[len(r.points) // 8][1] for k in kinds for r in group[k] if r.points]
    if early:
        left.set_ylim(top=max(early))
    left.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})
    figure.savefig(file.with_suffix(".png"), dpi=150)
    plt.close(figure)


@command()
def main(argv: list[str]) -> None:
    """The command; exits with 2 and one line after a user's mistake."""
    settings, _ = load(CompareSettings, argv, "python -m experiments.compare --baseline=CONFIG "
                                              "--candidate=CONFIG [--key=value]")
    pyplot()  # better missed now than after the runs
    found = run_comparison(settings)
    text, out = markdown(settings, found), Path(settings.out_dir)
    (out / "comparison.md").write_text(text)
    (out / "comparison.json").write_text(json.dumps(rows(found), indent=1) + "\n")
    draw(found, out / "comparison.svg")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
