"""Draws the curves of one or several runs, or writes an HTML report about one run.

    python -m experiments.plot --runs=out/quickstart,out/quickstart-adamw --file=losses.svg
    python -m experiments.plot --runs=out/quickstart --panels=loss,lr,unclipped,hessian,clip
    python -m experiments.plot --runs=out/quickstart --report=report.html

The curves are read from metrics.jsonl. The panels show losses (validation with points, training
thin), the learning rate, the unclipped fraction and the norm of h (the paper's Fig. 8), and the
share of steps whose gradient norm was clipped (Fig. 6a). The colours are those of Okabe and Ito,
which colour-blind readers can tell apart; runs differ in line style too, for print. Needs
matplotlib (requirements-dev.txt).
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import base64
import html
import io
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, load, option
from nanosophia.files import write_bytes, write_text
from nanosophia.metrics import read_records
from nanosophia.schemas import RunConfig, read

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":")
PANELS = {  # name: (label of the axis, lines as (key of the record, style))
    "loss": ("loss, nats per token", (
        ("train/loss", dict(linewidth=0.7, alpha=0.5)),
        ("val/loss", dict(linewidth=1.8, marker="o", markersize=4)))),
    "lr": ("learning rate", (("lr", dict(linewidth=1.5)),)),
    "unclipped": ("unclipped fraction", (("unclipped_fraction", dict(linewidth=1.2)),)),
    "hessian": ("norm of h", (("hessian_norm", dict(linewidth=1.2)),)),
    "clip": ("steps with clipped gradient", (("norm_clip_rate", dict(linewidth=1.2)),)),
}
X_LABELS = dict(step="training steps", tokens="training tokens", seconds="seconds of training")


@dataclass(frozen=True, kw_only=True)
class PlotSettings(Settings):
    """Settings of `python -m experiments.plot`."""

    runs: str = option("", "folders of runs, comma-separated")
    labels: str = option("", "names of runs in the legend, comma-separated; empty = the folders'")
    file: str = option("losses.svg", "picture to write; its ending png, svg or pdf is the format")
    panels: str = option("loss", f"any of {', '.join(PANELS)}, comma-separated")
    x: Literal["step", "tokens", "seconds"] = option("step", "horizontal axis")
    top: float = option(0.0, "upper end of the loss axis; 0 = automatic", unit="nats", low=0)
    title: str = option("", "title of the picture")
    report: str = option("", "HTML page about one run, to write instead of the picture")
    samples: int = option(3, "texts in the report, sampled from the newest checkpoint", low=0,
                          high=100)

    def check(self) -> None:
        for key in ("title", "labels"):
            if not getattr(self, key).isprintable():
                raise ConfigError(f"{key} = {getattr(self, key)!r} is more than a line of text",
                                  key)
        unknown = [p for p in self.panels.split(",") if p not in PANELS]
        if unknown:
            raise ConfigError(f"panels = {self.panels}: {', '.join(unknown) or 'nothing'} is none "
                              f"of {', '.join(PANELS)}", "panels")
        if Path(self.file).suffix not in (".png", ".svg", ".pdf"):
            raise ConfigError(f"file = {self.file} is not the name of a png, svg or pdf picture",
                              "file")


def read_metrics(run: Path) -> list[dict]:
    """Returns the records of a run's metrics.jsonl; raises ConfigError where it cannot be read."""
    path = run / "metrics.jsonl"
    try:
        return read_records(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give a folder that train.py wrote as "
                          "--runs=FOLDER") from None


def read_config(run: Path) -> dict:
    """Returns a run's settings; raises ConfigError where they cannot be read."""
    try:
        return read(run / "config.json", RunConfig)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{run / 'config.json'} cannot be read: {error}; give a folder that "
                          "train.py wrote as --runs=FOLDER") from None


def positions(run: Path, records: list[dict], x: str) -> list[float]:
    """Returns where each record lies on the horizontal axis, counted at the end of its step."""
    config = read_config(run)
    per_step = config["total_batch_size"] * config["block_size"]
    if x == "tokens":
        return [(r["step"] + 1) * per_step for r in records]
    if x == "step":
        return [r["step"] + 1 for r in records]
    seconds, last, result = 0.0, 0, []
    for r in records:  # a record's rate is that of the steps since the record before it
        if r.get("tokens_per_second"):
            seconds += (r["step"] + 1 - last) * per_step / r["tokens_per_second"]
            last = r["step"] + 1
        result.append(seconds)
    return result


def pyplot():
    """Returns matplotlib.pyplot, set to draw to files and to repeat them byte for byte.

    Raises ConfigError where matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("matplotlib is missing; run pip install -r requirements-dev.txt") \
            from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nanosophia"
    matplotlib.rcParams["text.parse_math"] = False  # a $ in a name is a $
    import matplotlib.pyplot as plt
    return plt


def clear_frame(axes, *, grid: bool = True) -> None:
    """Takes the upper and the right line from the frame, draws a thin grid, and writes the numbers
    of logarithmic axes plainly: each decade's, or of few decades 1, 2 and 5 times it."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):
        if axis.get_scale() == "log":
            low, high = sorted(axis.get_view_interval())
            axis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axis.set_minor_formatter(NullFormatter())
    if grid:
        axes.grid(color="#dddddd", linewidth=0.6)


def save_figure(figure, *files: Path) -> None:
    """Writes a figure to each file, in the format of its ending, and closes it."""
    for file in files:
        content = io.BytesIO()
        # A date in the file would make every drawing differ from the last.
        figure.savefig(content, format=file.suffix[1:], dpi=150,
                       metadata={"Date": None} if file.suffix == ".svg" else None)
        write_bytes(file, content.getvalue())
    pyplot().close(figure)


def picture(runs: list[Path], labels: list[str], panels: list[str], *, x: str = "step",
            top: float = 0.0, title: str = ""):
    """Returns a matplotlib figure with the panels below each other.

    Raises ConfigError where a run's files cannot be read.
    """
    plt = pyplot()
    height = 3.6 if len(panels) == 1 else 0.6 + 2.1 * len(panels)
    figure, rows = plt.subplots(len(panels), figsize=(6.4, height), layout="constrained",
                                sharex=True, squeeze=False)
    for panel, axes in zip(panels, rows[:, 0], strict=True):
        _draw_panel(axes, panel, runs, labels, x)
        if panel == "loss" and top:
            axes.set_ylim(top=top)
    rows[-1, 0].set_xlabel(X_LABELS[x])
    handles = rows[0, 0].get_legend_handles_labels()[0]
    if handles:
        if panels[0] == "loss":
            handles += _kinds_of_lines(runs)
        rows[0, 0].legend(handles=handles, frameon=False)
    rows[0, 0].set_title(title, loc="left", fontsize="medium")
    return figure


def _kinds_of_lines(runs: list[Path]) -> list:
    """Returns grey lines for the legend, which say how losses are drawn, of kinds recorded here."""
    from matplotlib.lines import Line2D
    recorded = {key for run in runs for record in read_metrics(run) for key in record}
    names = {"val/loss": "validation", "train/loss": "training"}
    return [Line2D([], [], color="#777777", label=names[key], **style)
            for key, style in reversed(PANELS["loss"][1]) if key in recorded]


def _draw_panel(axes, panel: str, runs: list[Path], labels: list[str], x: str) -> None:
    """Draws one panel with the curves of every run that recorded its numbers."""
    ylabel, lines = PANELS[panel]
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        records = read_metrics(run)
        xs = positions(run, records, x)
        for n, (key, style) in enumerate(lines):
            points = [(position, r[key]) for position, r in zip(xs, records, strict=True)
                      if r.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), color=COLOURS[i % len(COLOURS)],
                          linestyle=STYLES[i % len(STYLES)],
                          # matplotlib hides names that begin with _
                          label=f" {label}" if n == len(lines) - 1 else None, **style)
    if not axes.lines:
        axes.text(0.5, 0.5, "not recorded by these runs", transform=axes.transAxes,
                  ha="center", va="center", color="#777777")
    axes.set_ylabel(ylabel)
    if panel in ("unclipped", "clip"):
        axes.set_ylim(-0.02, 1.02)
    # The paper's advice for one gamma; a controlled one is held at gamma_target.
    if panel == "unclipped" and not all(read_config(run).get("gamma_target") for run in runs):
        axes.axhspan(0.1, 0.5, color="#eeeeee", zorder=0)
        axes.text(0.99, 0.11, "the paper's range, 10-50 %", transform=axes.get_yaxis_transform(),
                  ha="right", va="bottom", fontsize="small", color="#777777")
    clear_frame(axes)


def draw(settings: PlotSettings) -> None:
    """Writes the picture; raises ConfigError where runs and labels do not match."""
    runs = [Path(run) for run in settings.runs.split(",") if run]
    labels = settings.labels.split(",") if settings.labels else [run.name for run in runs]
    if not runs or len(labels) != len(runs):
        raise ConfigError(f"--runs names {len(runs)} folders, --labels {len(labels)} names; give "
                          "at least one run and as many labels", "runs", "labels")
    figure = picture(runs, labels, list(dict.fromkeys(settings.panels.split(","))), x=settings.x,
                     top=settings.top, title=settings.title)
    save_figure(figure, Path(settings.file))


def write_report(settings: PlotSettings) -> None:
    """Writes the HTML page: plots, last values, settings, environment and samples."""
    if not settings.runs or "," in settings.runs:
        raise ConfigError(f"--report is about one run, --runs={settings.runs} names another "
                          "number of them; name one", "runs")
    run = Path(settings.runs)
    records, config = read_metrics(run), read_config(run)
    data = io.BytesIO()
    panels = [panel for panel, (_, lines) in PANELS.items()
              if any(key in r for r in records for key, _ in lines)]
    picture([run], [run.name], panels or ["loss"], x=settings.x).savefig(data, format="png",
                                                                         dpi=150)
    last = {key: r[key] for r in records for key in r}
    environment, texts = _read_checkpoint(run, settings.samples)
    image = base64.b64encode(data.getvalue()).decode()
    samples = "".join(f"<pre>{html.escape(text)}</pre>" for text in texts) or "<p>None.</p>"
    page = f"""<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(run.name)}</title>
<style>{STYLE}</style>
<h1>{html.escape(run.name)}</h1>
<p class="lead">{html.escape(_in_words(last, config))}</p>
<img alt="losses and diagnostics" src="data:image/png;base64,{image}">
<h2>Last values</h2>{_html_table(last)}
<h2>Settings that differ from the defaults</h2>{_html_table(_chosen(config))}
<details><summary>All settings</summary>{_html_table(config)}</details>
<h2>Environment</h2>{_html_table(environment)}
<h2>Samples</h2>{samples}
</html>
"""
    write_text(Path(settings.report), page)


STYLE = """
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 1.5rem auto;
       padding: 0 1rem }
h1 { overflow-wrap: anywhere; margin-bottom: .3rem }
h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
.lead { margin-top: 0 }
img { width: 100%; height: auto; background: #fff; border-radius: .3rem }
table { border-collapse: collapse; width: 100% }
td { padding: .2rem .8rem .2rem 0; vertical-align: top; border-bottom: 1px solid #8884;
     overflow-wrap: anywhere }
td + td { font-family: ui-monospace, monospace; font-size: .9em; width: 55% }
pre { background: #8882; padding: .8rem; border-radius: .3rem; white-space: pre-wrap;
      overflow-wrap: anywhere; font-size: .85rem }
summary { cursor: pointer; margin: 1rem 0 .5rem }
"""


def _in_words(last: dict, config: dict) -> str:
    """Returns a sentence with the optimizer, how far the run went, and its losses."""
    step = last.get("step", -1) + 1
    said = [f"{config.get('optimizer', 'a run')}, {step:,} steps"]
    if last.get("tokens"):
        said[0] += f", {last['tokens'] / 1e6:,.2f}M tokens"
    said += [f"{name} loss {last[key]:.4f}" for key, name in (
        ("val/loss", "validation"), ("train/loss", "training")) if last.get(key) is not None]
    return "; ".join(said)


def _chosen(config: dict) -> dict:
    """Returns the settings that are not train.py's defaults."""
    from nanosophia.options import Config
    defaults = vars(Config())
    return {key: value for key, value in config.items() if defaults.get(key) != value}


def _html_table(values: dict) -> str:
    """Returns a table with a row for each key and its value."""
    rows = "".join(f"<tr><td>{html.escape(str(key))}</td><td>"
                   f"{html.escape(f'{value:.6g}' if isinstance(value, float) else str(value))}"
                   "</td></tr>" for key, value in values.items())
    return f"<table>{rows}</table>"


def _read_checkpoint(run: Path, samples: int) -> tuple[dict, list[str]]:
    """Returns what the newest checkpoint says about its making, and texts sampled from it.

    Both are empty where there is no checkpoint; where it cannot be read, the first says why.
    """
    import torch

    from nanosophia.checkpoint import CheckpointError
    from nanosophia.generate import generate
    from nanosophia.tokenizer import TokenizerError, get_tokenizer, start_token
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
    if not samples:
        return environment, []
    model = weights.build()
    ids = torch.full((samples, 1), start_token(tokenizer))
    ids = generate(model, ids, 200, temperature=0.8, top_k=200, num_classes=weights.num_classes,
                         generator=torch.Generator().manual_seed(1337))
    return environment, [tokenizer.decode(row) for row in ids[:, 1:].tolist()]


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(PlotSettings, argv, "python -m experiments.plot --runs=FOLDERS")
    if settings.report:
        write_report(settings)
    else:
        draw(settings)
    print(f"wrote {settings.report or settings.file}")


if __name__ == "__main__":
    main(sys.argv[1:])
