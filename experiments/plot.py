"""Draws one or several runs from their metrics.jsonl, and writes a page about one.

    python -m experiments.plot --runs=out/quickstart,out/quickstart-adamw --file=losses.svg
    python -m experiments.plot --runs=out/quickstart --panels=loss,lr,unclipped,hessian,clip
    python -m experiments.plot --runs=out/quickstart --report=report.html

Panels: losses (validation with points, training thin); learning rate; the unclipped fraction and
the norm of h (the paper's Fig. 8); the share of steps whose gradient norm was clipped (Fig. 6a).
Colours are those of Okabe and Ito, told apart by the colour-blind; runs differ in line style too,
for print. Needs matplotlib (requirements-dev.txt).
"""

import base64
import html
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanosophia.configurator import ConfigError, Settings, command, knob, load

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
PANELS = {  # label of the axis, and what is drawn: (key of the record, style)
    "loss": ("loss, nats per token", (
        ("train/loss", dict(linewidth=0.7, alpha=0.5)),
        ("val/loss", dict(linewidth=1.8, marker="o", markersize=4)))),
    "lr": ("learning rate", (("lr", dict(linewidth=1.5)),)),
    "unclipped": ("unclipped fraction", (("unclipped_fraction", dict(linewidth=1.2)),)),
    "hessian": ("norm of h", (("hessian_norm", dict(linewidth=1.2)),)),
    "clip": ("steps with clipped gradient", (("norm_clip_rate", dict(linewidth=1.2)),)),
}
AXES = dict(step="training steps", tokens="training tokens", seconds="seconds of training")


@dataclass(frozen=True, kw_only=True)
class PlotSettings(Settings):
    """The settings of this command."""

    runs: str = knob("", "folders of runs, comma-separated")
    labels: str = knob("", "their names in the legend, comma-separated; empty = the folders'")
    file: str = knob("losses.svg", "picture that is written; png, svg or pdf by its ending")
    panels: str = knob("loss", f"which of {', '.join(PANELS)}, comma-separated")
    x: Literal["step", "tokens", "seconds"] = knob("step", "horizontal axis")
    top: float = knob(0.0, "upper end of the loss axis; 0 = automatic", unit="nats", low=0)
    title: str = knob("", "above the picture")
    report: str = knob("", "HTML page about one run that is written instead")
    samples: int = knob(3, "texts in the report, drawn from the newest checkpoint", low=0)

    def check(self) -> None:
        unknown = [p for p in self.panels.split(",") if p not in PANELS]
        if unknown:
            raise ConfigError(f"panels = {self.panels}: {', '.join(unknown) or 'nothing'} is none "
                              f"of {', '.join(PANELS)}", "panels")


def read_metrics(run: Path) -> list[dict]:
    """The records of a run's metrics.jsonl; raises ConfigError when there is none."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give --runs=FOLDER of train.py") \
            from None


def read_config(run: Path) -> dict:
    """A run's settings; raises ConfigError when there are none."""
    try:
        return json.loads((run / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run / 'config.json'} cannot be read: {error}; give --runs=FOLDER of "
                          "train.py") from None


def positions(run: Path, records: list[dict], x: str) -> list[float]:
    """Where each record lies on the horizontal axis: after its step."""
    config = read_config(run)
    per_step = config["total_batch_size"] * config["block_size"]
    if x == "tokens":
        return [(r["step"] + 1) * per_step for r in records]
    if x == "step":
        return [r["step"] + 1 for r in records]
    seconds, found, last = 0.0, [], 0
    for r in records:  # the rate of a record is that of the steps since the one before
        if r.get("tokens_per_second"):
            seconds += (r["step"] + 1 - last) * per_step / r["tokens_per_second"]
            last = r["step"] + 1
        found.append(seconds)
    return found


def pyplot():
    """matplotlib.pyplot, drawing to files that repeat; raises ConfigError where it is missing."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("matplotlib is missing; run pip install -r requirements-dev.txt") \
            from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nanosophia"
    import matplotlib.pyplot as plt
    return plt


def picture(runs: list[Path], labels: list[str], panels: list[str], *, x: str = "step",
            top: float = 0.0, title: str = ""):
    """A matplotlib figure with the panels below each other; raises ConfigError without data."""
    plt = pyplot()
    height = 3.6 if len(panels) == 1 else 0.6 + 2.1 * len(panels)
    figure, rows = plt.subplots(len(panels), figsize=(6.4, height), layout="constrained",
                                sharex=True, squeeze=False)
    for panel, axes in zip(panels, rows[:, 0], strict=True):
        words, lines = PANELS[panel]
        drawn = False
        for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
            records = read_metrics(run)
            places = positions(run, records, x)
            for n, (key, style) in enumerate(lines):
                found = [(place, r[key]) for place, r in zip(places, records, strict=True)
                         if r.get(key) is not None]
                if found:
                    drawn = True
                    axes.plot(*zip(*found, strict=True), color=COLOURS[i % len(COLOURS)],
                              linestyle=STYLES[i % len(STYLES)],
                              label=label if n == len(lines) - 1 else None, **style)
        axes.set_ylabel(words)
        if not drawn:
            axes.text(0.5, 0.5, "not recorded by these runs", transform=axes.transAxes,
                      ha="center", va="center", color="#777777")
        if panel == "loss" and top:
            axes.set_ylim(top=top)
        if panel in ("unclipped", "clip"):
            axes.set_ylim(-0.02, 1.02)
        if panel == "unclipped":
            axes.axhspan(0.1, 0.5, color="#eeeeee", zorder=0)  # the paper's range
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    rows[-1, 0].set_xlabel(AXES[x])
    if rows[0, 0].get_legend_handles_labels()[0]:
        rows[0, 0].legend(frameon=False)
    rows[0, 0].set_title(title, loc="left", fontsize="medium")
    return figure


def draw(settings: PlotSettings) -> None:
    """Writes the picture."""
    runs = [Path(run) for run in settings.runs.split(",") if run]
    labels = settings.labels.split(",") if settings.labels else [run.name for run in runs]
    if not runs or len(labels) != len(runs):
        raise ConfigError(f"--runs names {len(runs)} folders, --labels {len(labels)}; give at "
                          "least one run and as many labels", "runs", "labels")
    figure = picture(runs, labels, settings.panels.split(","), x=settings.x, top=settings.top,
                     title=settings.title)
    Path(settings.file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.file, dpi=150, metadata={"Date": None} if
                   settings.file.endswith(".svg") else None)


def write_report(settings: PlotSettings) -> None:
    """Writes the page: plots, results, settings, environment, samples."""
    if not settings.runs or "," in settings.runs:
        raise ConfigError(f"--report is about one run, --runs={settings.runs} names another "
                          "number", "runs")
    run = Path(settings.runs)
    records, config = read_metrics(run), read_config(run)
    data = io.BytesIO()
    panels = [panel for panel, (_, lines) in PANELS.items()
              if any(key in r for r in records for key, _ in lines)]
    picture([run], [run.name], panels or ["loss"], x=settings.x).savefig(data, format="png",
                                                                         dpi=150)
    last = {key: r[key] for r in records for key in r}
    environment, texts = _from_checkpoint(run, settings.samples)
    image = base64.b64encode(data.getvalue()).decode()
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{html.escape(run.name)}</title>
<style>body {{ font: 15px/1.45 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse }} td {{ padding: .1rem 1rem .1rem 0; vertical-align: top }}
pre {{ background: #f4f4f4; padding: .8rem; white-space: pre-wrap }} img {{ max-width: 100% }}
h2 {{ margin-top: 2rem }}</style>
<h1>{html.escape(run.name)}</h1>
<img alt="losses and diagnostics" src="data:image/png;base64,{image}">
<h2>Last values</h2>{_rows(last)}
<h2>Settings</h2>{_rows(config)}
<h2>Environment</h2>{_rows(environment)}
<h2>Samples</h2>{''.join(f"<pre>{html.escape(text)}</pre>" for text in texts) or "<p>None.</p>"}
</html>
"""
    Path(settings.report).parent.mkdir(parents=True, exist_ok=True)
    Path(settings.report).write_text(page, encoding="utf-8")


def _rows(values: dict) -> str:
    cells = "".join(f"<tr><td>{html.escape(str(key))}</td><td>"
                    f"{html.escape(f'{value:.6g}' if isinstance(value, float) else str(value))}"
                    "</td></tr>" for key, value in values.items())
    return f"<table>{cells}</table>"


def _from_checkpoint(run: Path, samples: int) -> tuple[dict, list[str]]:
    """Versions and texts of the newest checkpoint; nothing where there is none."""
    import torch

    from nanosophia.checkpoint import CheckpointError
    from nanosophia.generate import generate
    from nanosophia.tokenizer import TokenizerError, get_tokenizer
    from nanosophia.weights import run_weights
    try:
        weights = run_weights(run)
        if weights is None:
            return {}, []
        state = weights.state
        environment = dict(step=state["step"], ranks=state["world_size"], **state["versions"])
        tokenizer = get_tokenizer(weights.tokenizer)
    except (CheckpointError, TokenizerError, KeyError) as error:
        return {"not read": str(error)}, []
    model = weights.build()
    if not samples:
        return environment, []
    ids = torch.full((samples, 1), tokenizer.eot_token)
    found = generate(model, ids, 200, temperature=0.8, top_k=200, num_classes=weights.num_classes,
                     generator=torch.Generator().manual_seed(1337))
    return environment, [tokenizer.decode(row) for row in found[:, 1:].tolist()]


@command()
def main(argv: list[str]) -> None:
    """The command; exits with 2 and one line after a user's mistake."""
    settings, _ = load(PlotSettings, argv, "python -m experiments.plot --runs=FOLDERS")
    if settings.report:
        write_report(settings)
    else:
        draw(settings)
    print(f"wrote {settings.report or settings.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
