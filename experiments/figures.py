"""Runs the paper's figures of losses and draws them: 3 (with 1a-c and 9), 4 (with 1d), 6, 7, 10.

    python -m experiments.figures --figure=7a --preset=small --jobs=2     # minutes on two CPU cores
    python -m experiments.figures --figure=7a --nproc_per_node=8          # as in the paper

    3   final losses over the length of a run, 355M to 1.5B: T/2 steps beside T (1a-c, 9)
    4   final losses of AdamW, Lion, Sophia-H and Sophia-G over model sizes (1d: the same points)
    6a  share of steps whose gradient norm was clipped
    6b  largest stable learning rate with and without inverse-layer scaling, at GPT-2 medium's depth
    6c  final loss over gamma and beta2
    7a  losses against compute for k = 1, 10, 100 and AdamW, for three lengths of run
    7b  estimators: GNB, Hutchinson, empirical Fisher, AdaHessian's, each with clipping
    7c  clipping: sign momentum, normalized momentum, GNB without clipping, AdaHessian, AdamW
    10  losses of the 6.6B model, of AdamW at two rates and of Sophia-G

6b, 7a and 7c find the rate of each run by a ladder, 7b gamma by a grid. Fig. 2 is
experiments.toy, Fig. 5 nanosophia.superglue. --dry_run lists the runs of a figure.

Every run is a config of this repository with the settings that the figure changes. The preset
`small` replaces the model of each by a byte-level one of the quickstart's size and trains it for
200 steps: it shows that the commands work and how the methods compare at that size, not what the
paper's sizes give. Finished runs are not repeated. The results in --out_dir are PRESET_FIGURE.md,
.svg and .png, and .json with the runs, from which experiments.report makes the table again. With
--seeds=3 a cell lists what came out of each seed where they differ.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import sys
from dataclasses import replace
from pathlib import Path

from experiments.archive import Remembering, Replaying, archive, command_line
from experiments.paper_figures import FIGURES, Figure, FigureSettings
from experiments.plot import clear_frame, pyplot, save_figure
from experiments.runs import RunSpec
from nanosophia import dry_run
from nanosophia.command import command
from nanosophia.configurator import load
from nanosophia.files import write_text

MODULE = "experiments.figures"
LEFT_OUT = ("out_dir", "jobs")  # settings that no table depends on


class Listed(Exception):
    """Ends the making of a figure at the runs that it would begin with."""

    def __init__(self, specs: list[RunSpec]):
        self.specs = specs


class Listing(Remembering):
    """Settings under which a figure makes no runs."""

    def run_all(self, specs):
        """Raises Listed."""
        raise Listed(list(specs))


def list_runs(settings: FigureSettings) -> str:
    """Returns the runs of a figure as a Markdown table; of a ladder of rates the first."""
    try:
        FIGURES[settings.figure](Listing(settings))
    except Listed as listed:
        specs = listed.specs
    settings.check_specs(specs)
    ladders = " Each is the first of a ladder of rates by factors of 2 or 4, five to eight runs." \
        if settings.figure in ("6b", "7a", "7c") else ""
    seeds = f" for each of {settings.seeds} seeds" if settings.seeds > 1 else ""
    gpus, lines, total = settings.nproc_per_node, [], 0.0
    for spec in specs:
        config = spec.config()
        plan = dry_run.plan(config)
        days = dry_run.days(plan, gpus)
        total += days * settings.seeds
        flops = plan.flops_per_token * (1 + plan.estimate_share) * config.tokens_per_step \
            * config.max_iters
        lines.append(f"| {spec.name} | {' '.join(spec.flags)} | {flops:.3g} | {days:.3g} |")
    return "\n".join([
        f"Figure {settings.figure}, preset {settings.preset}: {len(specs)} runs{seeds}, "
        f"{total:.3g} days on {gpus} x {config.dry_run_gpu} at {config.dry_run_mfu:.0%} of the "
        f"peak.{ladders}", "",
        f"| run | settings | FLOPs | days on {gpus} |", "|---|---|---|---|", *lines])


def of_seed(settings: FigureSettings, number: int) -> tuple[int, FigureSettings]:
    """Returns the number-th seed from the runs' own on, and settings for runs with it."""
    given = [flag for flag in settings.extra if flag.startswith("--seed")]
    seed = RunSpec("", tuple(given)).config().seed + number
    if number == 0:
        return seed, settings
    return seed, replace(settings, flags=f"{settings.flags} --seed={seed}",
                         out_dir=f"{settings.out_dir}/seed{seed}")


def combine(figures: list[Figure]) -> Figure:
    """Returns the first seed's picture, and a table whose cells list what differs by seed."""
    rows = [[", ".join(cells[:1] if len(set(cells)) == 1 else cells)
             for cells in zip(*rows, strict=True)]
            for rows in zip(*(figure.rows for figure in figures), strict=True)]
    return replace(figures[0], rows=rows)


def make(settings: FigureSettings, argv: list[str]) -> tuple[Figure, dict]:
    """Makes the runs of every seed; returns the figure, and the runs as data."""
    groups, figures = {}, []
    for number in range(settings.seeds):
        seed, for_seed = of_seed(settings, number)
        runs = Remembering(for_seed)
        figures.append(FIGURES[settings.figure](runs))
        groups[str(seed)] = runs.results.values()
    kept = {key: value for key, value in vars(settings).items() if key not in LEFT_OUT}
    return combine(figures), archive(command_line(MODULE, argv), groups, experiment="figures",
                                     settings=kept)


def remake(data: dict) -> tuple[Figure, str]:
    """Returns the figure of stored runs, and a line on them; raises ConfigError."""
    settings, figures = FigureSettings(**data["settings"]), []
    for number in range(settings.seeds):
        seed, for_seed = of_seed(settings, number)
        figures.append(FIGURES[settings.figure](Replaying(for_seed, data, str(seed))))
    seeds = ", ".join(data["groups"])
    return combine(figures), (
        f"{sum(map(len, data['groups'].values()))} runs, "
        f"{'seeds' if settings.seeds > 1 else 'seed'} {seeds}, validation on "
        f"{data['common']['eval_windows']:,} windows")


def table(figure: Figure) -> str:
    """Returns the figure's table in Markdown."""
    return "\n".join([f"| {' | '.join(figure.headings)} |", "|---" * len(figure.headings) + "|",
                      *(f"| {' | '.join(row)} |" for row in figure.rows)])


def draw(figure: Figure, title: str, file: Path) -> None:
    """Draws the picture; writes `file` and a .png beside it."""
    picture, axes = pyplot().subplots(figsize=(6.4, 4), layout="constrained")
    figure.draw(axes)
    if labels := axes.get_legend_handles_labels()[0]:
        beside = dict(loc="upper left", bbox_to_anchor=(1, 1)) if len(labels) > 5 else {}
        axes.legend(frameon=False, **beside)
    clear_frame(axes, grid=False)
    axes.set_title(title, loc="left", fontsize="medium")
    save_figure(picture, file, file.with_suffix(".png"))


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(FigureSettings, argv, f"python -m {MODULE} --figure=7a [--key=value]")
    if settings.dry_run:
        print(list_runs(settings))
        return
    pyplot()  # where matplotlib is missing, fail before the runs
    figure, data = make(settings, argv)
    title = f"Figure {settings.figure}, preset {settings.preset}"
    text, name = f"{title}.\n\n{table(figure)}\n", f"{settings.preset}_{settings.figure}"
    out = Path(settings.out_dir)
    write_text(out / f"{name}.md", text)
    write_text(out / f"{name}.json", json.dumps(data) + "\n")
    seed = f", seed {next(iter(data['groups']))}" if settings.seeds > 1 else ""
    draw(figure, title + seed, out / f"{name}.svg")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
