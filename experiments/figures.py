"""The paper's ablations and scaling as lists of runs: Fig. 1d/4, 6 and 7.

    python -m experiments.figures --figure=7a --preset=small --jobs=2     # minutes on two CPU cores
    python -m experiments.figures --figure=7a --nproc_per_node=8          # as in the paper

    4   final losses of AdamW, Lion, Sophia-H and Sophia-G over model sizes (1d: the same points)
    6a  share of steps whose gradient norm was clipped
    6b  largest stable learning rate with and without inverse-layer scaling (GPT-2 medium's depth)
    6c  final loss over gamma and beta2
    7a  k = 1, 10, 100 against compute
    7b  estimators: GNB, Hutchinson, empirical Fisher, AdaHessian's, each under the clip
    7c  clipping: sign momentum, normalized momentum, GNB without a clip, Sophia-G

Every run is a config of this repository, or one with the settings that the figure changes. `small`
lays a byte-level model of the quickstart's size and 200 steps over each: it shows that the commands
work and which way things fall there, not what the paper's sizes give. Runs that have finished are
not run again. Written to --out_dir: PRESET_FIGURE.md, .svg and .png.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.gamma import sweep_lr
from experiments.plot import COLOURS, STYLES, pyplot
from experiments.runs import Result, RunSettings, RunSpec, by_name, scaled_flags
from nanosophia.configurator import command, knob, load

# What the small preset lays over a config of the paper. Its steps are 240 times smaller in tokens,
# so gamma is larger; its rates are those that suited AdamW there, in the paper's proportions.
SMALL = dict(n_layer=3, n_head=4, n_embd=64, block_size=64, vocab_size=320, dataset="stdlib",
             total_batch_size=32, max_iters=200, warmup_iters=20, eval_interval=20,
             eval_windows=400, log_interval=5, checkpoint_interval=1000, keep_best=False)
SMALL_RATES, SMALL_GAMMAS, SMALL_ROWS = 6, 40, {240: 16, 32: 2}
DEEP = dict(n_layer=8, n_embd=32, max_iters=200, warmup_iters=20)  # Fig. 6b, small


@dataclass(frozen=True, kw_only=True)
class FigureSettings(RunSettings):
    """The settings of this command."""

    figure: Literal["4", "6a", "6b", "6c", "7a", "7b", "7c"] = knob("7a", "which one",
                                                                  section="figure")
    preset: Literal["paper", "small"] = knob("paper", "the paper's sizes, or a laptop's")
    max_iters: int = knob(0, "steps of every run; 0 = the preset's", low=0)


def run_spec(settings: FigureSettings, name: str, file: str, **changes) -> RunSpec:
    """A run of a config under the preset and the user's flags, with what the figure changes."""
    file = f"config/{file}.py"
    config, values = RunSpec("", (file,)).config(), {}
    if settings.preset == "small":
        values = SMALL | dict(
            batch_size=max(1, SMALL["total_batch_size"] // settings.nproc_per_node),
            learning_rate=config.learning_rate * SMALL_RATES,
            gamma=config.gamma * SMALL_GAMMAS if config.gamma < 1 else config.gamma,
            hessian_batch_size=SMALL_ROWS.get(config.hessian_batch_size, 16))
        if config.beta1 > 0.9:
            values["beta1"] = 0.9  # .96 forgets too slowly for so few steps
    for key in ("learning_rate", "gamma"):
        if f"{key}_times" in changes:
            changes[key] = values.get(key, getattr(config, key)) * changes.pop(f"{key}_times")
    preset = (file, *_as_flags(values), *settings.extra)
    if settings.max_iters:
        preset = scaled_flags(preset, settings.max_iters)
        changes = {k: v for k, v in changes.items() if k not in ("max_iters", "warmup_iters")}
    return RunSpec(f"{settings.preset}_{name}", (*preset, *_as_flags(changes)))


def _as_flags(values: dict) -> tuple[str, ...]:
    return tuple(f"--{key}={value}" for key, value in values.items())


class Found(NamedTuple):
    """A figure: its table, and what draws it."""

    headings: list[str]
    rows: list[list[str]]
    draw: Callable


def curves(settings: FigureSettings, specs: dict[str, RunSpec], x: str = "step",
           also: dict[str, Callable[[Result], str]] | None = None) -> Found:
    """Runs the specs; validation losses over steps or FLOPs."""
    found = by_name(settings.run_all(list(specs.values())))
    results = {label: found[c.name] for label, c in specs.items()}
    also = also or {}
    rows = [[label, f"{r.loss:.4f}", f"{r.flops:.3g}", *(f(r) for f in also.values())]
            for label, r in results.items()]

    def draw(axes) -> None:
        for i, (label, r) in enumerate(results.items()):
            scale = r.flops / max(1, r.steps) if x == "FLOPs" else 1
            axes.plot([step * scale for step, _ in r.points], [loss for _, loss in r.points],
                      color=COLOURS[i % len(COLOURS)], linestyle=STYLES[i % len(STYLES)],
                      marker="o", markersize=3, label=label)
        first = [r.points[0][1] for r in results.values() if r.points and not r.diverged]
        if first:
            axes.set_ylim(top=1.02 * max(first))
        axes.set_xlabel(f"training {x}s" if x == "step" else x)
        axes.set_ylabel("validation loss, nats per token")

    return Found(["run", "final validation loss", "FLOPs", *also], rows, draw)


def figure_4(settings: FigureSettings) -> Found:
    """Final losses over sizes."""
    sizes = {"30m": {}, "small": {}, "medium": {}, "540m": {}, "large": {}}
    if settings.preset == "small":
        sizes = {"32 x 2": dict(n_embd=32, n_layer=2), "64 x 3": {}, "96 x 4": dict(n_embd=96,
                                                                                    n_layer=4)}
    specs = {}
    for method in ("adamw", "lion", "sophiah", "sophiag"):
        for size, changes in sizes.items():
            file = f"train_gpt2_{'30m' if settings.preset == 'small' else size}_{method}"
            if Path(f"config/{file}.py").exists():  # the paper has no Lion at every size
                name = f"4_{method}_{size.replace(' ', '')}"
                specs[method, size] = run_spec(settings, name, file, **changes)
    found = by_name(settings.run_all(list(specs.values())))
    results = {key: found[c.name] for key, c in specs.items()}

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

    return Found(["run", "learning rate", "final validation loss"], rows, draw)


def figure_6a(settings: FigureSettings) -> Found:
    """How often the gradient norm is clipped."""
    names = ("adamw", "lion", "sophiah", "sophiag")
    specs = {name: run_spec(settings, f"6a_{name}", f"train_gpt2_30m_{name}") for name in names}
    table = curves(settings, specs, also={
        "clipped steps": lambda r: f"{r.mean('norm_clip_rate'):.1%}",
        "after a tenth": lambda r: f"{r.mean('norm_clip_rate', 0.1):.1%}"})

    def draw(axes) -> None:
        shares = [float(row[-2].rstrip("%")) for row in table.rows]
        axes.bar(names, shares, color=COLOURS[:4])
        axes.set_ylabel("steps with a clipped gradient, %")

    return table._replace(draw=draw)


def figure_6b(settings: FigureSettings) -> Found:
    """The largest rate that does not blow up, with and without inverse-layer scaling."""
    def rate_spec(method: str, inverse: bool) -> tuple[Callable[[float], RunSpec], float]:
        changes = dict(scale_attn_by_inverse_layer_idx=inverse, grad_clip=1.0)
        if settings.preset == "small":
            changes |= DEEP
        file = f"train_gpt2_medium_{method}"
        name = f"6b_{method}_{'scaled' if inverse else 'plain'}"
        return (lambda rate: run_spec(settings, f"{name}_{rate:.3g}", file, learning_rate=rate,
                                  **changes)), run_spec(settings, "", file).config().learning_rate

    kinds = [(method, inverse) for method in ("adamw", "lion", "sophiag")
             for inverse in (False, True)]
    found = sweep_lr(settings,
                     {f"{m}, {'scaled' if s else 'plain'}": rate_spec(m, s) for m, s in kinds},
                     factor=2.0 if settings.preset == "paper" else 4.0)
    rows, bars = [], {}
    for (method, inverse), ladder in zip(kinds, found.values(), strict=True):
        bars[method, inverse] = ladder.largest_stable
        rows.append([method, "yes" if inverse else "no", f"{ladder.largest_stable:.3g}",
                     f"{ladder.best:.3g}", f"{ladder.best_loss:.4f}",
                     f"{ladder.blew_up_at:.3g}" if ladder.blew_up_at else "none tried"])

    def draw(axes) -> None:
        for i, ((_, inverse), rate) in enumerate(bars.items()):
            axes.bar(i, rate, color=COLOURS[i // 2], alpha=1 if inverse else 0.5)
        axes.set_xticks(range(len(bars)), [f"{m}\n{'scaled' if s else 'plain'}" for m, s in bars])
        axes.set_yscale("log")
        axes.set_ylabel("largest stable learning rate")

    return Found(["optimizer", "inverse-layer scaling", "largest stable rate", "best rate",
                  "its loss", "blew up at"], rows, draw)


def figure_6c(settings: FigureSettings) -> Found:
    """Final losses over gamma and beta2."""
    gammas, betas = (0.25, 1, 4), (0.95, 0.99, 0.995)
    specs = {(g, b): run_spec(settings, f"6c_gamma{g:g}_beta{b:g}", "train_gpt2_30m_sophiag",
                          gamma_times=g, beta2=b) for g in gammas for b in betas}
    found = by_name(settings.run_all(list(specs.values())))
    grid = [[found[specs[g, b].name] for b in betas] for g in gammas]
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

    return Found(["gamma", *(f"beta2 {b:g}: loss (unclipped)" for b in betas)], rows, draw)


def figure_7a(settings: FigureSettings) -> Found:
    """k against compute."""
    files = {"k = 1": "ablation_k1", "k = 10": "train_gpt2_30m_sophiag", "k = 100": "ablation_k100"}
    return curves(settings, {label: run_spec(settings, f"7_{file}", file)
                             for label, file in files.items()}, x="FLOPs")


def figure_7b(settings: FigureSettings) -> Found:
    """Estimators."""
    files = {"Sophia-G (GNB)": "train_gpt2_30m_sophiag",
             "Sophia-H (Hutchinson)": "train_gpt2_30m_sophiah", "E-F + clip": "ablation_ef_clip",
             "AH + clip": "ablation_ah_clip", "AdaHessian": "ablation_adahessian"}
    return curves(settings, {label: run_spec(settings, f"7_{file}", file)
                             for label, file in files.items()})


def figure_7c(settings: FigureSettings) -> Found:
    """Clipping."""
    files = {"Sophia-G": "train_gpt2_30m_sophiag", "Clip (sign momentum)": "ablation_clip",
             "Normalize": "ablation_normalize", "GNB, no clip, k = 2": "ablation_gnb_unclipped"}
    return curves(settings, {label: run_spec(settings, f"7_{file}", file)
                             for label, file in files.items()})


FIGURES = {"4": figure_4, "6a": figure_6a, "6b": figure_6b, "6c": figure_6c, "7a": figure_7a,
           "7b": figure_7b, "7c": figure_7c}


def write(settings: FigureSettings, found: Found) -> str:
    """The table, also into FIGURE.md, and the picture."""
    out = Path(settings.out_dir)
    text = "\n".join([f"Figure {settings.figure}, preset {settings.preset}.", "",
                      f"| {' | '.join(found.headings)} |", "|---" * len(found.headings) + "|",
                      *(f"| {' | '.join(row)} |" for row in found.rows), ""])
    name = f"{settings.preset}_{settings.figure}"
    (out / f"{name}.md").write_text(text)
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    found.draw(axes)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"Figure {settings.figure}, preset {settings.preset}", loc="left",
                   fontsize="medium")
    for ending in ("svg", "png"):
        figure.savefig(out / f"{name}.{ending}", dpi=150,
                       metadata={"Date": None} if ending == "svg" else None)
    plt.close(figure)
    return text


@command()
def main(argv: list[str]) -> None:
    """The command; exits with 2 and one line after a user's mistake."""
    settings, _ = load(FigureSettings, argv, "python -m experiments.figures --figure=7a")
    pyplot()  # better missed now than after the runs
    print(write(settings, FIGURES[settings.figure](settings)))


if __name__ == "__main__":
    main(sys.argv[1:])
