"""Draws the losses of one or several runs from their metrics.jsonl.

    python -m experiments.plot --runs=out/quickstart,out/quickstart-adamw --file=losses.svg

Validation losses are solid with points, training losses thin. Colours are those of Okabe and Ito,
told apart by the colour-blind. Needs matplotlib (requirements-dev.txt).
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import ConfigError, Settings, exit_with, knob, load

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


@dataclass(frozen=True, kw_only=True)
class PlotSettings(Settings):
    """The settings of this command."""

    runs: str = knob("", "folders of runs, comma-separated")
    labels: str = knob("", "their names in the legend, comma-separated; empty = the folders'")
    file: str = knob("losses.svg", "picture that is written; png, svg or pdf by its ending")
    x: Literal["step", "tokens"] = knob("step", "horizontal axis")
    top: float = knob(0.0, "upper end of the loss axis; 0 = automatic", unit="nats", low=0)
    title: str = knob("", "above the picture")


def read_metrics(run: Path) -> list[dict]:
    """The records of a run's metrics.jsonl; raises ConfigError when there is none."""
    path = run / "metrics.jsonl"
    try:
        return [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}; give --runs=FOLDER of train.py") \
            from None


def draw(settings: PlotSettings) -> None:
    """Writes the picture."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("matplotlib is missing; run pip install -r requirements-dev.txt") \
            from None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nanosophia"
    import matplotlib.pyplot as plt
    runs = [Path(run) for run in settings.runs.split(",") if run]
    labels = settings.labels.split(",") if settings.labels else [run.name for run in runs]
    if not runs or len(labels) != len(runs):
        raise ConfigError(f"--runs names {len(runs)} folders, --labels {len(labels)}; give at "
                          "least one run and as many labels", "runs", "labels")
    figure, axes = plt.subplots(figsize=(6.4, 3.6), layout="constrained")
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        records, colour = read_metrics(run), COLOURS[i % len(COLOURS)]
        config = json.loads((run / "config.json").read_text())
        per_step = config["total_batch_size"] * config["block_size"] if settings.x == "tokens" \
            else 1
        for key, style in (("train/loss", dict(linewidth=0.7, alpha=0.5)),
                           ("val/loss", dict(linewidth=1.8, marker="o", markersize=4,
                                             label=label))):
            found = [((r["step"] + 1) * per_step, r[key]) for r in records if key in r]
            if found:
                axes.plot(*zip(*found, strict=True), color=colour, **style)
    axes.set_xlabel("training tokens" if settings.x == "tokens" else "training steps")
    axes.set_ylabel("loss, nats per token")
    if settings.top:
        axes.set_ylim(top=settings.top)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title(settings.title, loc="left", fontsize="medium")
    Path(settings.file).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(settings.file, dpi=150, metadata={"Date": None} if
                   settings.file.endswith(".svg") else None)


def main(argv: list[str]) -> None:
    """The command; exits with 2 and one line after a user's mistake."""
    try:
        settings, _ = load(PlotSettings, argv, "python -m experiments.plot --runs=FOLDERS")
        draw(settings)
        print(f"wrote {settings.file}")
    except (ConfigError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv[1:])
