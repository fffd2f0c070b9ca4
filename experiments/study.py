"""The study of optimizers behind results/study.md: the same contenders on several texts and sizes.

    python data/stdlib/prepare.py
    python -m experiments.study --setting=stdlib --jobs=2

For the others first prepare a parquet file of books, in bytes and in GPT-2's tokens:

    python data/text/prepare.py --input=books.parquet --val_fraction=0.01 --tokenizer=bytes \
        --out_dir=data/books-bytes
    python data/text/prepare.py --input=books.parquet --val_fraction=0.01 --out_dir=data/books

The pictures are drawn from the stored runs of every setting that is there:

    python -m experiments.study --picture=results/study_speed_ups.svg
    python -m experiments.study --sizes_picture=results/study_sizes.svg

Each setting is a leaderboard (experiments.leaderboard) of the contenders below. --dry_run lists
them. In --out_dir: SETTING.md and SETTING.json; the latter belongs in results/runs.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from experiments import judge, leaderboard
from experiments.archive import Remembering, Replaying, archive, command_line
from experiments.leaderboard import LeaderboardSettings, Outcome, run_leaderboard
from experiments.plot import COLOURS, clear_frame, pyplot, save_figure
from experiments.runs import Result, RunSettings
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, option
from nanosophia.files import read_bytes, write_text

# Rates are for the smallest model; a ladder goes on beyond an end that is best.
CONTENDERS = {
    "AdamW": "optimizer=adamw,learning_rate=4e-3|8e-3|1.6e-2,beta1=0.9|0.8,beta2=0.99|0.95",
    "Lion": "optimizer=lion,learning_rate=5e-4|1e-3|2e-3,beta1=0.95|0.9,beta2=0.98|0.95",
    "Sophia-G": "optimizer=sophiag,learning_rate=3e-3|6e-3|1.2e-2,gamma=0.5|0.1|2,beta1=0.8|0.96",
    "Sophia-H": "optimizer=sophiah,learning_rate=3e-3|6e-3|1.2e-2,gamma=0.5|0.1|2,beta1=0.8|0.96,"
                "hessian_batch_size=4",
    "controlled gamma": "optimizer=sophiag,gamma_rows=embedding,learning_rate=1e-2|2e-2|4e-2,"
                        "gamma_target=0.9|0.8,beta1=0.8|0.9",
    "Muon": "optimizer=muon,learning_rate=1e-2|2e-2|4e-2,muon_momentum=0.95|0.9,beta2=0.95|0.99",
    "Muon, q k v apart": "optimizer=metric_muon,metric_power=0,metric_qkv=apart,"
                         "learning_rate=1e-2|2e-2|4e-2,muon_momentum=0.95|0.9,beta2=0.95|0.99",
    "metric Muon": "optimizer=metric_muon,learning_rate=1e-2|2e-2|4e-2,muon_momentum=0.95|0.9,"
                   "beta2=0.95|0.99",
    "metric Muon (GNB)": "optimizer=metric_muon_gnb,learning_rate=1e-2|2e-2|4e-2,"
                        "muon_momentum=0.95|0.9,metric_rest=adamw|sophia",
    "SOAP": "optimizer=soap,learning_rate=1e-2|2e-2|4e-2,beta1=0.95|0.9,beta2=0.95|0.99",
    "Kron": "optimizer=kron,learning_rate=1e-2|2e-2|4e-2,beta1=0.9|0.95,weight_decay=0.1|0.02",
    "AdEMAMix": "optimizer=ademamix,learning_rate=4e-3|8e-3|1.6e-2,slow_beta=0.99|0.999,beta2=0.99,"
                "slow_weight=2|5",
    "MARS": "optimizer=mars,learning_rate=4e-3|8e-3|1.6e-2,mars_gamma=0.025|0.1,beta2=0.99|0.95",
    "Schedule-Free": "optimizer=schedule_free,learning_rate=4e-3|8e-3|1.6e-2,beta1=0.9|0.95,"
                     "beta2=0.95|0.99"}
HEADLINE = ("AdamW", "Sophia-G", "controlled gamma", "Muon", "Muon, q k v apart", "metric Muon",
            "metric Muon (GNB)", "SOAP")
FOUR = ("AdamW", "controlled gamma", "Muon", "metric Muon")
FIVE = (*FOUR, "metric Muon (GNB)")
# without those that came last of the others when each was tuned by eight runs
TWELVE = tuple(name for name in CONTENDERS if name not in ("MARS", "Schedule-Free"))


@dataclass(frozen=True)
class Setting:
    """A text, a model and a batch, on which contenders are compared."""

    model: str  # train.py's flags
    lengths: str
    longer: str = "2,4"
    seeds: int = 3
    budget: int = 12
    contenders: tuple[str, ...] = TWELVE


def _model(layers: int, width: int, context: int, rows: int, dataset: str) -> str:
    return (f"--n_layer={layers} --n_head={max(3, width // 32)} --n_embd={width} "
            f"--block_size={context} --total_batch_size={rows} --batch_size={min(rows, 32)} "
            f"--hessian_batch_size={rows} --dataset={dataset} --eval_windows=2000")


SETTINGS = {
    # 0.08M parameters in blocks, 20 bytes for each of them at the longest T
    "stdlib": Setting(_model(3, 48, 64, 32, "stdlib"), "200,400,800"),
    "books_bytes": Setting(_model(3, 48, 64, 32, "books-bytes"), "200,400,800",
                           contenders=HEADLINE),
    # up to T = 400, with this batch and with four times as much: what is left of each advantage
    "books_bytes_400": Setting(_model(3, 48, 64, 32, "books-bytes"), "100,200,400",
                               contenders=FIVE),
    "books_bytes_x4": Setting(_model(3, 48, 64, 128, "books-bytes"), "100,200,400",
                              contenders=FIVE),
    # 0.44M and 2.2M parameters in blocks
    "books_bytes_w96": Setting(_model(4, 96, 64, 32, "books-bytes"), "200,400,800",
                               longer="3", contenders=FOUR),
    "books_bytes_w192": Setting(_model(5, 192, 64, 32, "books-bytes"), "200,400,800",
                                longer="3", contenders=FOUR),
    "books_bpe": Setting(_model(3, 48, 64, 32, "books"), "200,400,800", contenders=HEADLINE)}


@dataclass(frozen=True, kw_only=True)
class StudySettings(RunSettings):
    """Settings of `python -m experiments.study`."""

    setting: str = option("stdlib", f"one of {', '.join(SETTINGS)}", section="study")
    picture: str = option("", "file that receives a picture of the stored runs; trains nothing")
    sizes_picture: str = option("", "the same: speed-ups and rates over widths and batches")
    stored: str = option("results/runs", "folder with study_SETTING.json, for the pictures")
    dry_run: bool = option(False, "print the contenders and the number of runs, and exit")

    def check(self) -> None:
        super().check()
        if self.setting not in SETTINGS:
            raise ConfigError(f"setting = {self.setting!r} is none of {', '.join(SETTINGS)}",
                              "setting")


def board(settings: StudySettings) -> LeaderboardSettings:
    """Returns the leaderboard of a setting; its runs are in a folder of its name."""
    of = SETTINGS[settings.setting]
    first, *others = (f"{name}: {CONTENDERS[name]}" for name in of.contenders)
    return LeaderboardSettings(
        baseline=first, candidates="; ".join(others), max_iters=of.lengths, longer=of.longer,
        budget=of.budget, seeds=of.seeds, flags=f"{of.model} {settings.flags}".strip(),
        out_dir=f"{settings.out_dir}/{settings.setting}", jobs=settings.jobs,
        nproc_per_node=settings.nproc_per_node)


def stored_board(data: dict) -> tuple[LeaderboardSettings, list[Outcome]]:
    """Returns a leaderboard and its outcomes from stored runs; raises ConfigError."""
    settings = board(StudySettings(**data["settings"]))
    return settings, run_leaderboard(Replaying(settings, data, "all"))


def remake(data: dict) -> str:
    """Returns the table of stored runs; raises ConfigError."""
    return leaderboard.markdown(*stored_board(data))


def stored_boards(stored: Path) -> dict[str, tuple[LeaderboardSettings, list[Outcome]]]:
    """Returns the leaderboards whose runs are stored; raises ConfigError where there are none."""
    boards = {name: stored_board(json.loads(read_bytes(path))) for name in SETTINGS
              if (path := stored / f"study_{name}.json").exists()}
    if not boards:
        raise ConfigError(f"{stored} holds no study_SETTING.json; make the runs first", "stored")
    return boards


def compared(settings: LeaderboardSettings, outcomes: list[Outcome]) -> dict[str, judge.Row]:
    """Returns what is said of each contender that did not diverge, at the longest T."""
    base, *others = outcomes
    rows = judge.compare(base.losses(), {o.contender.name: o.losses() for o in others},
                         settings.lengths[-1])
    return {name: row for name, row in rows.items() if math.isfinite(row.mean)}


def draw(stored: Path, file: Path) -> None:
    """Draws the speed-ups at the longest T with their intervals, a panel for each stored setting;
    writes `file` and a .png beside it. Raises ConfigError where nothing is stored."""
    boards = stored_boards(stored)
    columns = min(3, len(boards))
    lines = -(-len(boards) // columns)
    picture, grid = pyplot().subplots(lines, columns, figsize=(5.2 * columns, 4.2 * lines),
                                      layout="constrained", squeeze=False)
    for axes in grid.flat[len(boards):]:
        axes.set_visible(False)
    for axes, (name, (settings, outcomes)) in zip(grid.flat, boards.items(), strict=False):
        base, T = outcomes[0], settings.lengths[-1]
        rows = compared(settings, outcomes)
        order = sorted(rows, key=lambda name: -rows[name].mean)
        for y, contender in enumerate(order):
            speed = rows[contender].speed_up
            axes.plot([speed.low, speed.high], [y, y], color=COLOURS[0], linewidth=2)
            marker = ">" if speed.value == speed.most else "o"
            axes.plot([speed.value], [y], marker, color=COLOURS[0], markersize=7)
        axes.axvline(1, color=COLOURS[1], linewidth=1)
        axes.set_yticks(range(len(order)), order)
        first = base.runs[T][0]
        axes.set_title(f"{name}: {first.plan.parameters / 1e6:.2g}M parameters,\n{T:,} steps of "
                       f"{first.config.tokens_per_step:,} tokens", loc="left", fontsize="medium")
        axes.set_xlabel(f"steps of {base.contender.name} per step (95 %; triangle: at least)")
        clear_frame(axes)
    save_figure(picture, file, file.with_suffix(".png"))


WIDTHS = ("books_bytes", "books_bytes_w96", "books_bytes_w192")
BATCHES = ("books_bytes_400", "books_bytes_x4")


def draw_speed_ups(axes, boards: list[tuple[LeaderboardSettings, list[Outcome]]],
                   size: Callable[[Result], int]) -> None:
    """Draws the speed-up of each contender that several boards have over the size of their runs."""
    runs = [outcomes[0].runs[settings.lengths[-1]][0] for settings, outcomes in boards]
    sizes = [size(run) for run in runs]
    rows = [compared(*board) for board in boards]
    for i, name in enumerate(FIVE[1:]):
        found = [(x * 1.04 ** (i - 1.5), row[name].speed_up)
                 for x, row in zip(sizes, rows, strict=True) if name in row]
        if len(found) > 1:
            x, speeds = zip(*found, strict=True)
            spread = [[s.value - s.low for s in speeds], [s.high - s.value for s in speeds]]
            axes.errorbar(x, [s.value for s in speeds], yerr=spread, fmt="o-", capsize=3,
                          color=COLOURS[i], label=name)
            if ends := [(x, s.value) for x, s in zip(x, speeds, strict=True) if s.value == s.most]:
                axes.plot(*zip(*ends, strict=True), "^", color=COLOURS[i], markersize=11)
    axes.axhline(1, color=COLOURS[-1], linewidth=1)
    axes.set(xscale="log",
             ylabel="steps of AdamW per step (95 %; triangle: at least)")
    clear_frame(axes)  # before the ticks, which it makes anew
    axes.set_xticks(sizes, [f"{x:,}" for x in sizes])
    axes.set_title(f"Books, bytes, {runs[0].steps:,} steps", loc="left")


def draw_sizes(stored: Path, file: Path) -> None:
    """Draws speed-ups at the longest T over parameters and over tokens per step, and the best rates
    over widths; writes `file` and a .png beside it. Raises ConfigError where runs are missing."""
    boards = stored_boards(stored)
    if len(boards.keys() & set(WIDTHS)) < 2:
        raise ConfigError(f"{stored} has no two of {', '.join(WIDTHS)}; make those runs first",
                          "stored")
    families = [(WIDTHS, "parameters in blocks", lambda run: run.config.n_layer
                 * run.plan.block_parameters)]
    if boards.keys() >= set(BATCHES):
        families.append((BATCHES, "tokens per step", lambda run: run.config.tokens_per_step))
    picture, panels = pyplot().subplots(1, len(families) + 1, figsize=(5 * len(families) + 5, 4.4),
                                        layout="constrained")
    for axes, (names, label, size) in zip(panels, families, strict=False):
        draw_speed_ups(axes, [boards[name] for name in names if name in boards], size)
        axes.set_xlabel(label)
    stored_widths = [boards[name] for name in WIDTHS if name in boards]
    for i, name in enumerate(FOUR):
        found = [(outcomes[0].runs[settings.lengths[-1]][0].config.n_embd, outcome.setting.rate)
                 for settings, outcomes in stored_widths
                 for outcome in outcomes if outcome.contender.name == name]
        widths, rates = zip(*found, strict=True)
        panels[-1].plot([x * 1.01 ** (i - 1.5) for x in widths], rates, "o-", color=COLOURS[i - 1],
                        label=name)
    panels[-1].set(xscale="log", yscale="log", xlabel="width", ylabel="best peak learning rate")
    clear_frame(panels[-1])
    panels[-1].set_xticks(widths, [f"{x}" for x in widths])
    panels[-1].set_title("The best rates (seed 0)", loc="left")
    for axes in panels:
        axes.minorticks_off()
        axes.legend(frameon=False)
    save_figure(picture, file, file.with_suffix(".png"))


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(StudySettings, argv, "python -m experiments.study [--key=value]")
    if settings.picture or settings.sizes_picture:
        for file, drawing in ((settings.picture, draw), (settings.sizes_picture, draw_sizes)):
            if file:
                drawing(Path(settings.stored), Path(file))
        return
    of, out = board(settings), Path(settings.out_dir)
    if settings.dry_run:
        n, lengths = len(of.contenders), len(of.lengths)
        more = len(of.baseline_lengths) - lengths
        print("\n".join(f"{c.name}: {' '.join(c.flags)} rates {c.rates} {c.options}"
                        for c in of.contenders))
        print(f"{n * of.budget} runs to tune, {(n * lengths + more) * of.seeds - n} at the best")
        return
    judge.require_scipy()
    runs = Remembering(of)
    outcomes = run_leaderboard(runs)
    data = archive(command_line("experiments.study", argv), {"all": runs.results.values()},
                   experiment="study",
                   settings=dict(setting=settings.setting, flags=settings.flags))
    write_text(out / f"{settings.setting}.json", json.dumps(data) + "\n")
    text = leaderboard.markdown(of, outcomes)
    write_text(out / f"{settings.setting}.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
