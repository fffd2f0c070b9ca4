"""The paper's figures of losses: which runs each is made of, and what it shows of them.

A figure is a function of settings (experiments.figures) that asks them for runs and returns a table
and what to draw. Every run is a config of this repository with settings that the figure changes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from experiments.gamma import RateSweep, sweep_lr
from experiments.plot import COLOURS, STYLES
from experiments.runs import Result, RunSettings, RunSpec, by_name, scaled_flags
from nanosophia.configurator import option

# The small preset's settings in place of the paper's. A step has 240 times fewer tokens, so gamma
# is larger; learning rates are multiplied by what suited AdamW at this size.
SMALL = dict(n_layer=3, n_head=4, n_embd=64, block_size=64, vocab_size=320, dataset="stdlib",
             total_batch_size=32, max_iters=200, warmup_iters=20, eval_interval=20,
             eval_windows=400, log_interval=5, checkpoint_interval=1000, keep_best=False)
SMALL_RATE_FACTOR, SMALL_GAMMA_FACTOR = 6, 40
SMALL_HESSIAN_ROWS = {240: 16, 32: 2}  # the paper's hessian_batch_size: the small preset's
SMALL_DEEP = dict(n_layer=8, n_embd=32)  # Fig. 6b


@dataclass(frozen=True, kw_only=True)
class FigureSettings(RunSettings):
    """Settings of `python -m experiments.figures`."""

    figure: Literal["3", "4", "6a", "6b", "6c", "7a", "7b", "7c", "10"] = option(
        "7a", "figure of the paper", section="figure")
    preset: Literal["paper", "small"] = option("paper", "the paper's model sizes, or a laptop's")
    max_iters: int = option(0, "length of every run, in figures 3 and 7a of the shortest; 0 = the "
                               "preset's", unit="steps", low=0)
    seeds: int = option(1, "runs of each setting: with the runs' own seed and those after it",
                        low=1, high=100)
    dry_run: bool = option(False, "list the runs with their settings, FLOPs and days on "
                                  "nproc_per_node GPUs (train.py's --dry_run_gpu, in --flags)")


@dataclass(frozen=True)
class Figure:
    """The content of a figure: a table, and a function that draws on matplotlib axes."""

    headings: list[str]
    rows: list[list[str]]
    draw: Callable[[Any], None]


def run_spec(settings: FigureSettings, name: str, file: str, **changes) -> RunSpec:
    """Returns the spec of a config under the preset, the user's flags and the figure's changes.

    The changes `learning_rate_times` and `gamma_times` multiply the preset's value.
    """
    file = f"config/{file}.py"
    config, values = RunSpec("", (file,)).config(), {}
    if settings.preset == "small":
        values = SMALL | dict(
            batch_size=max(1, SMALL["total_batch_size"] // settings.nproc_per_node),
            learning_rate=config.learning_rate * SMALL_RATE_FACTOR,
            gamma=config.gamma * SMALL_GAMMA_FACTOR if config.gamma < 1 else config.gamma,
            hessian_batch_size=SMALL_HESSIAN_ROWS.get(config.hessian_batch_size, 16))
        if config.beta1 > 0.9:
            values["beta1"] = 0.9  # .96 averages over too many of so few steps
    for key in ("learning_rate", "gamma"):
        if f"{key}_times" in changes:
            value = values.get(key, getattr(config, key)) * changes.pop(f"{key}_times")
            changes[key] = float(f"{value:.6g}")
    preset = (file, *_as_flags(values), *settings.extra)
    if settings.max_iters:  # and a warm-up of the same share; a figure may vary the length
        preset = scaled_flags(preset, settings.max_iters)
        changes.pop("warmup_iters", None)
    return RunSpec(f"{settings.preset}_{name}", (*preset, *_as_flags(changes)))


def _as_flags(values: dict) -> tuple[str, ...]:
    return tuple(f"--{key}={value}" for key, value in values.items())


def run_labelled(settings: FigureSettings, specs: dict[Any, RunSpec]) -> dict[Any, Result]:
    """Makes the runs; returns their results under the same keys."""
    results = by_name(settings.run_all(list(specs.values())))
    return {label: results[spec.name] for label, spec in specs.items()}


def loss_curves(results: dict[str, Result],
                columns: dict[str, Callable[[Result], str]]) -> Figure:
    """Returns a figure of validation losses over steps; `columns` are more columns of the table."""
    rows = [[label, f"{r.loss:.4f}", f"{r.flops:.3g}", *(text(r) for text in columns.values())]
            for label, r in results.items()]

    def draw(axes) -> None:
        for i, (label, r) in enumerate(results.items()):
            axes.plot(*zip(*r.points, strict=True), color=COLOURS[i % len(COLOURS)],
                      linestyle=STYLES[i % len(STYLES)], marker="o", markersize=3, label=label)
        first = [r.points[0][1] for r in results.values() if r.points and not r.diverged]
        if first:  # a run that rises above its first loss would hide the others
            axes.set_ylim(top=1.02 * max(first))
        axes.set_xlabel("training steps")
        axes.set_ylabel("validation loss, nats per token")

    return Figure(["run", "final validation loss", "FLOPs", *columns], rows, draw)


def share(key: str, after: float = 0.0) -> Callable[[Result], str]:
    """Returns what prints the mean of a share over a run, or its part after a fraction of it."""
    def text(result: Result) -> str:
        value = result.mean(key, after)
        return "" if math.isnan(value) else f"{value:.1%}"

    return text


def figure_4(settings: FigureSettings) -> Figure:
    """Returns the final losses over model sizes."""
    sizes = {"30m": {}, "small": {}, "medium": {}, "540m": {}, "large": {}}
    if settings.preset == "small":
        sizes = {"32 x 2": dict(n_embd=32, n_layer=2), "64 x 3": {}, "96 x 4": dict(n_embd=96,
                                                                                    n_layer=4)}
    specs = {}
    for method in ("adamw", "lion", "sophiah", "sophiag"):
        for size, changes in sizes.items():
            file = f"train_gpt2_{'30m' if settings.preset == 'small' else size}_{method}"
            if Path(f"config/{file}.py").exists():  # the paper does not have Lion at every size
                name = f"4_{method}_{size.replace(' ', '')}"
                specs[method, size] = run_spec(settings, name, file, **changes)
    results = run_labelled(settings, specs)
    rows = [[f"{method}, {size}", f"{r.config.learning_rate:.3g}", f"{r.loss:.4f}"]
            for (method, size), r in results.items()]

    def draw(axes) -> None:
        for i, method in enumerate(dict.fromkeys(m for m, _ in results)):
            points = sorted((r.plan.parameters, r.loss) for (m, _), r in results.items()
                            if m == method)
            axes.semilogx(*zip(*points, strict=True), color=COLOURS[i], linestyle=STYLES[i],
                          marker="o", label=method)
        axes.set_xlabel("parameters")
        axes.set_ylabel("final validation loss, nats per token")

    return Figure(["run", "learning rate", "final validation loss"], rows, draw)


def three_lengths(settings: FigureSettings) -> tuple[int, ...]:
    """Returns T, 2 T and 4 T steps, which share one warm-up."""
    first = settings.max_iters or (100 if settings.preset == "small" else 100_000)
    return first, 2 * first, 4 * first


def figure_3(settings: FigureSettings) -> Figure:
    """Returns the final losses over the length of a run: Sophia's in T/2 steps beside AdamW's."""
    sizes = {"355M": "gpt2_medium", "770M": "gpt2_large", "1.5B": "neox_1.5b"}
    if settings.preset == "small":
        sizes = {"small preset": "gpt2_30m"}
    lengths = three_lengths(settings)
    specs = {(size, method, T): run_spec(
                 settings, f"3_{method}_{file}_T{T}", f"train_{file}_{method}", max_iters=T)
             for size, file in sizes.items() for method in ("adamw", "sophiah", "sophiag")
             if Path(f"config/train_{file}_{method}.py").exists() for T in lengths}
    results = run_labelled(settings, specs)
    rows = [[f"{method}, {size}", f"{T:,}", f"{r.config.learning_rate:.3g}", f"{r.loss:.4f}"]
            for (size, method, T), r in results.items()]

    def draw(axes) -> None:
        for i, (size, method) in enumerate(dict.fromkeys((s, m) for s, m, _ in results)):
            axes.semilogx(lengths, [results[size, method, T].loss for T in lengths], marker="o",
                          color=COLOURS[i % len(COLOURS)], linestyle=STYLES[i % len(STYLES)],
                          label=f"{method}, {size}")
        axes.set_xlabel("steps of the whole run")
        axes.set_ylabel("final validation loss, nats per token")

    return Figure(["run", "steps", "learning rate", "final validation loss"], rows, draw)


def figure_10(settings: FigureSettings) -> Figure:
    """Returns the losses of the 6.6B model: AdamW's at two rates, and Sophia-G's."""
    size = "gpt2_30m" if settings.preset == "small" else "neox_6.6b"
    runs = {"AdamW": ("adamw", 1), "AdamW at 1.25 times the rate": ("adamw", 1.25),
            "Sophia-G": ("sophiag", 1)}
    return loss_curves(run_labelled(settings, {
        label: run_spec(settings, f"10_{method}_{times:g}", f"train_{size}_{method}",
                        learning_rate_times=times) for label, (method, times) in runs.items()}),
        {"learning rate": lambda r: f"{r.config.learning_rate:.3g}"})


def figure_6a(settings: FigureSettings) -> Figure:
    """Returns how often the gradient norm is clipped, at GPT-2 small's size."""
    names = ("adamw", "lion", "sophiah", "sophiag")
    size = "30m" if settings.preset == "small" else "small"
    specs = {name: run_spec(settings, f"6a_{name}", f"train_gpt2_{size}_{name}") for name in names}
    figure = loss_curves(run_labelled(settings, specs), {
        "clipped steps": share("norm_clip_rate"), "after a tenth": share("norm_clip_rate", 0.1)})

    def draw(axes) -> None:
        shares = [float(row[-2].rstrip("%")) for row in figure.rows]
        axes.bar(names, shares, color=COLOURS[:4])
        axes.set_ylabel("steps with a clipped gradient, %")

    return replace(figure, draw=draw)


def figure_6b(settings: FigureSettings) -> Figure:
    """Returns the largest stable learning rate with and without inverse-layer scaling."""
    def rate_spec(method: str, inverse: bool) -> tuple[Callable[[float], RunSpec], float]:
        changes = dict(scale_attn_by_inverse_layer_idx=inverse, grad_clip=1.0)
        if settings.preset == "small":
            changes |= SMALL_DEEP
        file = f"train_gpt2_medium_{method}"
        name = f"6b_{method}_{'scaled' if inverse else 'plain'}"
        return (lambda rate: run_spec(settings, f"{name}_{rate:.3g}", file, learning_rate=rate,
                                  **changes)), run_spec(settings, "", file).config().learning_rate

    kinds = [(method, inverse) for method in ("adamw", "lion", "sophiag")
             for inverse in (False, True)]
    sweeps = sweep_lr(settings,
                      {f"{m}, {'scaled' if s else 'plain'}": rate_spec(m, s) for m, s in kinds},
                      factor=2.0 if settings.preset == "paper" else 4.0)
    rows, bars = [], {}
    for (method, inverse), sweep in zip(kinds, sweeps.values(), strict=True):
        bars[method, inverse] = sweep.largest_stable
        rows.append([method, "yes" if inverse else "no", f"{sweep.largest_stable:.3g}",
                     f"{sweep.best:.3g}", f"{sweep.best_loss:.4f}",
                     f"{sweep.blew_up_at:.3g}" if sweep.blew_up_at else "none tried"])

    def draw(axes) -> None:
        for i, ((_, inverse), rate) in enumerate(bars.items()):
            axes.bar(i, rate, color=COLOURS[i // 2], alpha=1 if inverse else 0.5)
        axes.set_xticks(range(len(bars)), [f"{m}\n{'scaled' if s else 'plain'}" for m, s in bars])
        axes.set_yscale("log")
        axes.set_ylabel("largest stable learning rate")

    return Figure(["optimizer", "inverse-layer scaling", "largest stable rate", "best rate",
                   "its loss", "blew up at"], rows, draw)


def figure_6c(settings: FigureSettings) -> Figure:
    """Returns Sophia-H's final losses over gamma, around the paper's .01, and beta2."""
    gammas, betas = (0.5, 1, 2), (0.95, 0.99, 0.995)
    specs = {(g, b): run_spec(settings, f"6c_gamma{g:g}_beta{b:g}", "train_gpt2_30m_sophiah",
                          gamma_times=g, beta2=b) for g in gammas for b in betas}
    results = run_labelled(settings, specs)
    grid = [[results[g, b] for b in betas] for g in gammas]
    rows = [[f"{line[0].config.gamma:g}",
             *(f"{r.loss:.4f} ({r.mean('unclipped_fraction', 0.5):.0%})" for r in line)]
            for line in grid]

    def draw(axes) -> None:
        values = [[r.loss for r in line] for line in grid]
        axes.imshow(values, cmap="viridis_r")
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                axes.text(j, i, f"{value:.3f}", ha="center", va="center",
                          bbox=dict(facecolor="white", alpha=0.75, edgecolor="none"))
        axes.set_xticks(range(len(betas)), [f"{b:g}" for b in betas])
        axes.set_yticks(range(len(gammas)), [row[0] for row in rows])
        axes.set_xlabel("beta2")
        axes.set_ylabel("gamma")

    return Figure(["gamma", *(f"beta2 {b:g}: loss (unclipped)" for b in betas)], rows, draw)


@dataclass(frozen=True)
class Tuned:
    """A run at the best rate of its ladder, and what the ladder showed."""

    result: Result
    sweep: RateSweep


def tuned(settings: FigureSettings, runs: dict[Any, tuple[str, str, dict]]) -> dict[Any, Tuned]:
    """Makes ladders of rates for runs, each (name, config, changes); returns the best of each."""
    def spec(rate: float, name: str, file: str, changes: dict) -> RunSpec:
        return run_spec(settings, f"{name}_lr{rate:.3g}", file, learning_rate=rate, **changes)

    ladders = {}
    for key, (name, file, changes) in runs.items():
        start = run_spec(settings, "", file, **changes).config().learning_rate
        ladders[key] = (partial(spec, name=name, file=file, changes=changes), start)
    sweeps = sweep_lr(settings, ladders, bracket_below=True)
    best = run_labelled(settings, {key: ladders[key][0](sweep.best)
                                   for key, sweep in sweeps.items()})
    return {key: Tuned(result, sweeps[key]) for key, result in best.items()}


def figure_7a(settings: FigureSettings) -> Figure:
    """Returns the final losses against compute of runs of three lengths, the rate tuned at each."""
    files = {"AdamW": "train_gpt2_30m_adamw", "k = 1": "ablation_k1",
             "k = 10": "train_gpt2_30m_sophiag", "k = 100": "ablation_k100"}
    lengths = three_lengths(settings)
    found = tuned(settings, {(label, T): (f"7a_{file}_T{T}", file, dict(max_iters=T))
                         for label, file in files.items() for T in lengths})
    rows = [[label, f"{T:,}", f"{t.sweep.best:.3g}", f"{t.result.loss:.4f}",
             f"{t.result.flops:.3g}"] for (label, T), t in found.items()]

    def draw(axes) -> None:
        for i, label in enumerate(files):
            points = [(found[label, T].result.flops, found[label, T].result.loss) for T in lengths]
            axes.semilogx(*zip(*points, strict=True), color=COLOURS[i], linestyle=STYLES[i],
                          marker="o", label=label)
        axes.set_xlabel("FLOPs of the whole run")
        axes.set_ylabel("final validation loss, nats per token")

    return Figure(["run", "steps", "best rate", "final validation loss", "FLOPs"], rows, draw)


def figure_7b(settings: FigureSettings) -> Figure:
    """Returns the losses with each estimator under the clip, at its best gamma of a grid."""
    files = {"Sophia-G (GNB)": "train_gpt2_30m_sophiag",
             "Sophia-H (Hutchinson)": "train_gpt2_30m_sophiah", "E-F + clip": "ablation_ef_clip",
             "AH + clip": "ablation_ah_clip"}
    grid = run_labelled(settings, {
        (label, g): run_spec(settings, f"7b_{file}_gamma{g:g}", file, gamma_times=g)
        for label, file in files.items() for g in (0.05, 0.2, 1, 5, 20)})
    best = {label: min((r for (name, _), r in grid.items() if name == label), key=lambda r: r.loss)
            for label in files}
    return loss_curves(best, {"best gamma": lambda r: f"{r.config.gamma:g}",
                              "unclipped": share("unclipped_fraction", 0.5)})


def figure_7c(settings: FigureSettings) -> Figure:
    """Returns the losses with and without each kind of clipping, each at its best rate."""
    adahessian, unclipped = "ablation_adahessian", "ablation_gnb_unclipped"
    runs = {"Sophia-G": ("train_gpt2_30m_sophiag", {}), "AdamW": ("train_gpt2_30m_adamw", {}),
            "Clip (sign momentum)": ("ablation_clip", {}), "Normalize": ("ablation_normalize", {}),
            **{f"GNB without clip, k = {k}": (unclipped, dict(hessian_interval=k))
               for k in (2, 5)},
            **{f"AdaHessian, k = {k}": (adahessian, dict(hessian_interval=k))
               for k in ((1, 2, 10) if settings.preset == "small" else (1, 2))}}
    found = tuned(settings, {
        label: (f"7c_{file}" + "".join(f"_k{k}" for k in changes.values()), file, changes)
        for label, (file, changes) in runs.items()})
    sweeps = {t.result.name: t.sweep for t in found.values()}
    return loss_curves({label: t.result for label, t in found.items()}, {
        "best rate": lambda r: f"{sweeps[r.name].best:.3g}",
        "blew up at": lambda r: f"{at:.3g}" if (at := sweeps[r.name].blew_up_at) else "none tried",
        "curvature decides": share("curvature_fraction", 0.5)})


FIGURES = {"3": figure_3, "4": figure_4, "6a": figure_6a, "6b": figure_6b, "6c": figure_6c,
           "7a": figure_7a, "7b": figure_7b, "7c": figure_7c, "10": figure_10}
