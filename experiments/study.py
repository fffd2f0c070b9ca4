"""Studies tuned baselines against Sophia with a fixed and with a controlled gamma on real text.

    python data/text/prepare.py --input=books.parquet --val_fraction=0.01 --out_dir=data/books
    python data/text/prepare.py --input=books.parquet --val_fraction=0.01 --tokenizer=bytes \
        --out_dir=data/books-bytes
    python -m experiments.study --bpe=data/books --bytes=data/books-bytes --jobs=2

The lists below hold every run that was made; this command wrote the tables of results/study.md.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from experiments.plot import COLOURS, STYLES, clear_frame, pyplot, save_figure
from experiments.runs import Result, RunSettings, RunSpec
from nanosophia.command import command
from nanosophia.configurator import ConfigError, load, option
from nanosophia.files import write_text

MODEL = ("--n_layer=4", "--n_head=4", "--n_embd=96", "--block_size=128",
         "--eval_interval=100", "--eval_windows=1000", "--checkpoint_interval=1000",
         "--keep_best=False", "--hessian_interval=10")
CORPORA = {
    # name: (rows per step, steps)
    "bpe": (16, 400),
    "bytes": (32, 400),
}
LARGER = ("--n_layer=6", "--n_head=6", "--n_embd=192")
CONTROLLED = ("--beta1=0.8", "--gamma_target=0.9")
OURS = ("--optimizer=sophiag", *CONTROLLED, "--gamma_rows=embedding")
METHODS = {
    # name: (warm-up over the run's length, train.py's flags)
    "adamw": (0.15, ("--optimizer=adamw", "--beta1=0.9", "--beta2=0.95")),
    "adamw-beta2-.99": (0.15, ("--optimizer=adamw", "--beta1=0.9", "--beta2=0.99")),
    "lion": (0.15, ("--optimizer=lion",)),
    "muon": (0.1, ("--optimizer=muon", "--beta1=0.9", "--beta2=0.99", "--weight_decay=0.1")),
    "sophiag": (0.05, ("--optimizer=sophiag",)),
    "sophiah": (0.05, ("--optimizer=sophiah", "--hessian_batch_size=2")),
    "ours": (0.05, OURS),
    "ours-tensors": (0.05, ("--optimizer=sophiag", *CONTROLLED)),
    "ours-matrices": (0.05, ("--optimizer=sophiag", *CONTROLLED, "--gamma_rows=matrices")),
    "ours-ef": (0.05, ("--optimizer=ef_clip", *CONTROLLED, "--gamma_rows=embedding")),
    "ours-h": (0.05, ("--optimizer=sophiah", *CONTROLLED, "--gamma_rows=embedding")),
    "ours-2-rows": (0.05, (*OURS, "--hessian_batch_size=2")),
}
RUNS = {
    # (method, learning rate, other arguments of run_spec), in the order in which they start
    "bpe": [
        ("adamw", 8e-3, {}),
        ("ours", 1.2e-2, {}),
        ("adamw", 4e-3, {}),
        ("ours", 1.2e-2, {"seed": 1}),
        ("adamw", 8e-3, {"seed": 1}),
        ("ours", 1.2e-2, {"share": 0.7}),
        ("muon", 1.2e-2, {}),
        ("adamw", 1.6e-2, {}),
        ("ours", 1.2e-2, {"share": 0.7, "seed": 1}),
        ("sophiag", 4e-3, {"gamma": 0.8}),
        ("ours", 1.2e-2, {"rows": 4}),
        ("adamw", 8e-3, {"rows": 4}),
        ("ours", 1.2e-2, {"rows": 4, "share": 0.7}),
        ("adamw", 1.6e-2, {"rows": 4}),
        ("ours", 1.2e-2, {"rows": 4, "share": 0.7, "seed": 1}),
        ("adamw", 8e-3, {"rows": 4, "seed": 1}),
        ("adamw", 4e-3, {"rows": 4}),
    ],
    "bytes": [
        ("adamw", 8e-3, {}),
        ("ours", 1.2e-2, {}),
        ("adamw", 4e-3, {}),
        ("adamw", 1.6e-2, {}),
        ("adamw-beta2-.99", 8e-3, {}),
        ("ours", 2e-2, {}),
        ("muon", 1.2e-2, {}),
        ("muon", 2.4e-2, {}),
        ("ours", 2e-2, {"seed": 1}),
        ("adamw", 1.6e-2, {"seed": 1}),
        ("ours", 1.2e-2, {"seed": 1}),
        ("ours", 1.2e-2, {"share": 0.7}),
        ("ours", 1.2e-2, {"share": 0.7, "seed": 1}),
        ("ours", 2e-2, {"share": 0.7}),
        ("adamw", 3.2e-2, {}),
        ("ours", 1.2e-2, {"share": 0.5}),
        ("sophiag", 4e-3, {"gamma": 0.5}),
        ("lion", 1e-3, {}),
        ("lion", 2e-3, {}),
        ("lion", 4e-3, {}),
        ("lion", 5e-4, {}),
        ("lion", 2.5e-4, {}),
        ("ours-ef", 1.2e-2, {}),
        ("ours-2-rows", 1.2e-2, {}),
        ("ours-h", 1.2e-2, {}),
        ("ours-tensors", 1.2e-2, {}),
        ("ours-matrices", 1.2e-2, {}),
        ("ours-matrices", 1.2e-2, {"share": 0.7}),
        ("adamw", 1.6e-2, {"rows": 4}),
        ("ours", 1.2e-2, {"rows": 4}),
        ("ours", 1.2e-2, {"rows": 4, "share": 0.7}),
        ("adamw", 8e-3, {"rows": 4}),
        ("ours", 1.2e-2, {"rows": 4, "share": 0.7, "seed": 1}),
        ("adamw", 8e-3, {"rows": 4, "seed": 1}),
        ("adamw", 4e-3, {"rows": 4}),
        ("adamw", 8e-3, {"larger": True}),
        ("ours", 1.2e-2, {"larger": True}),
        ("sophiah", 4e-3, {"gamma": 0.1}),
        ("ours", 6e-3, {"larger": True}),
        ("ours-2-rows", 1.2e-2, {"seed": 1}),
    ],
}
PLOTTED = {  # method: its label in the picture
    "adamw": "AdamW", "lion": "Lion", "muon": "Muon", "sophiag": "Sophia-G, fixed gamma",
    "sophiah": "Sophia-H, fixed gamma", "ours": "Sophia-G, controlled gamma"}


@dataclass(frozen=True, kw_only=True)
class StudySettings(RunSettings):
    """Settings of `python -m experiments.study`."""

    bpe: str = option("books", "folder of the text in GPT-2's tokens; - skips it", section="study")
    bytes: str = option("books-bytes", "folder of the text in bytes; - skips it")

    def check(self) -> None:
        super().check()
        if self.bpe == self.bytes == "-":
            raise ConfigError("--bpe and --bytes are both -, so there is nothing to run; give one "
                              "a folder", "bpe", "bytes")


def run_spec(corpus: str, dataset: str, method: str, lr: float, *, seed: int = 0,
             share: float = 1.0, rows: int = 1, larger: bool = False, gamma: float | None = None,
             extra: tuple[str, ...] = ()) -> RunSpec:
    """Returns the spec of a run over `share` of the corpus's steps on `rows` times its batch."""
    batch, steps = CORPORA[corpus]
    batch, steps = batch * rows, round(steps * share)
    warmup, flags = METHODS[method]
    if gamma is not None:
        flags = (*flags, f"--gamma={gamma:g}")
    sizes = dict(dataset=dataset, batch_size=min(batch, 16), total_batch_size=batch,
                 max_iters=steps, warmup_iters=round(warmup * steps), learning_rate=lr, seed=seed)
    if not any(flag.startswith("--hessian_batch_size") for flag in flags):
        sizes["hessian_batch_size"] = batch // 2  # the paper's half
    name = f"{corpus}_{method}_{lr:g}"
    if share != 1:
        name += f"_{share:g}T"
    if rows != 1:
        name += f"_x{rows}"
    if larger:
        name += "_larger"
    model = (*MODEL, *LARGER) if larger else MODEL
    return RunSpec(f"{name}_s{seed}", (*model, *extra, *flags,
                                       *(f"--{key}={value}" for key, value in sizes.items())))


def run_specs(corpus: str, dataset: str, extra: tuple[str, ...] = ()) -> list[RunSpec]:
    """Returns the specs on a corpus that is prepared in the folder `dataset`."""
    return [run_spec(corpus, dataset, method, lr, extra=extra, **more)
            for method, lr, more in RUNS[corpus]]


def grouped(results: list[Result]) -> dict[str, list[Result]]:
    """Returns the results by setting, a list with an entry per seed."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.name.rpartition("_s")[0]].append(result)
    return groups


def table(results: list[Result]) -> str:
    """Returns a table with a line per setting, sorted by model, tokens per step and loss."""
    lines = ["| method | learning rate | parameters | tokens per step | steps | "
             "loss of seeds 0, 1 | unclipped |", "|---" * 7 + "|"]
    settings = sorted(grouped(results).items(),
                      key=lambda item: (*scale(item[1][0]), item[1][0].loss))
    for name, seeds in settings:
        first, config = seeds[0], seeds[0].config
        unclipped = first.mean("unclipped_fraction", 0.5)
        lines.append(
            f"| {name.split('_')[1]} | {config.learning_rate:g} | "
            f"{first.plan.parameters / 1e6:.1f}M | {config.tokens_per_step:,} | "
            f"{config.max_iters:,} | {', '.join(f'{r.loss:.4f}' for r in seeds)} | "
            f"{'' if math.isnan(unclipped) else f'{unclipped:.0%}'} |")
    return "\n".join(lines)


def scale(result: Result) -> tuple[int, int]:
    """Returns (parameters, tokens per step), which a comparison of methods holds fixed."""
    return result.plan.parameters, result.config.tokens_per_step


def best_runs(corpora: dict[str, list[Result]]) -> dict[tuple, dict[str, Result]]:
    """Returns each method's best full-length run by (corpus, parameters, tokens per step).

    Only seed 0 counts, which every setting has, and only where more than one method was run.
    """
    best: dict[tuple, dict[str, Result]] = defaultdict(dict)
    for corpus, results in corpora.items():
        for r in results:
            method = r.name.split("_")[1]
            if r.name.endswith("_s0") and r.config.max_iters == CORPORA[corpus][1] \
                    and method in PLOTTED and not r.diverged:
                methods = best[corpus, *scale(r)]
                methods[method] = min(methods.get(method, r), r, key=lambda result: result.loss)
    return {key: methods for key, methods in sorted(best.items()) if len(methods) > 1}


def draw(corpora: dict[str, list[Result]], file: Path) -> None:
    """Draws the validation losses of `best_runs`, in a panel per corpus, model and batch."""
    panels = best_runs(corpora)
    columns = min(3, len(panels) or 1)
    rows = math.ceil(len(panels) / columns) or 1
    figure, grid = pyplot().subplots(rows, columns, figsize=(4.2 * columns, 3.6 * rows),
                                     layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels):]:
        axes.set_axis_off()
    for axes, ((corpus, parameters, tokens), best) in zip(grid.flat, panels.items(), strict=False):
        for i, method in enumerate(PLOTTED):
            if method in best:
                axes.plot(*zip(*best[method].points, strict=True), color=COLOURS[i], linewidth=1.5,
                          linestyle=STYLES[i % len(STYLES)], marker="o", markersize=3,
                          label=PLOTTED[method])
        axes.set_title(f"{corpus}: {parameters / 1e6:.1f}M parameters, {tokens:,} tokens per step",
                       loc="left", fontsize="small")
        axes.set_xlabel("training steps")
        axes.set_ylabel("validation loss, nats per token")
        clear_frame(axes)
    lines = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    labels = [label for label in PLOTTED.values() if label in lines]
    figure.legend([lines[label] for label in labels], labels, loc="outside lower center", ncols=3,
                  frameon=False)
    save_figure(figure, file)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(StudySettings, argv, "python -m experiments.study [--key=value]")
    pyplot()  # where matplotlib is missing, fail before the runs
    folders = {c: getattr(settings, c) for c in CORPORA if getattr(settings, c) != "-"}
    # The corpora take turns, so that an interrupted study has runs of each.
    rounds = zip_longest(*(run_specs(corpus, folder, settings.extra)
                           for corpus, folder in folders.items()))
    results = settings.run_all([spec for group in rounds for spec in group if spec is not None])
    corpora = {corpus: [r for r in results if r.name.startswith(f"{corpus}_")]
               for corpus in folders}
    text = "\n\n".join(f"{corpus}\n\n{table(group)}" for corpus, group in corpora.items())
    out = Path(settings.out_dir)
    write_text(out / "study.md", text + "\n")
    draw(corpora, out / "study.svg")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
