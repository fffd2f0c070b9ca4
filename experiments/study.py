"""The study on real text: tuned baselines against Sophia with a fixed and with a controlled gamma.

    python data/text/prepare.py --input=books.parquet --val_fraction=0.01 --out_dir=data/books
    python data/text/prepare.py --input=books.parquet --val_fraction=0.01 --tokenizer=bytes \
        --out_dir=data/books-bytes
    python -m experiments.study --bpe=data/books --bytes=data/books-bytes --jobs=2

Every run that was made is in the lists below; the tables of results/study.md are this command's.
"""

import math
import sys
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

from experiments.plot import COLOURS, STYLES, pyplot
from experiments.runs import Result, RunSettings, RunSpec
from nanosophia.configurator import ConfigError, command, knob, load

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
    # (method, learning rate, arguments of spec); begun in this order
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


@dataclass(frozen=True, kw_only=True)
class StudySettings(RunSettings):
    """The settings of this command."""

    bpe: str = knob("books", "folder of the text in GPT-2's tokens; - leaves it out",
                    section="study")
    bytes: str = knob("books-bytes", "folder of the text in bytes; - leaves it out")

    def check(self) -> None:
        super().check()
        if self.bpe == self.bytes == "-":
            raise ConfigError("--bpe and --bytes are both left out; give a folder", "bpe", "bytes")


def run_spec(corpus: str, dataset: str, method: str, lr: float, *, seed: int = 0,
             share: float = 1.0, rows: int = 1, larger: bool = False, gamma: float | None = None,
             extra: tuple[str, ...] = ()) -> RunSpec:
    """A run of `share` of the corpus's steps, on `rows` times its rows per step."""
    batch, steps = CORPORA[corpus]
    batch, steps = batch * rows, round(steps * share)
    warmup, flags = METHODS[method]
    if gamma is not None:
        flags = (*flags, f"--gamma={gamma:g}")
    sizes = dict(dataset=dataset, batch_size=min(batch, 16), total_batch_size=batch,
                 max_iters=steps, warmup_iters=round(warmup * steps), learning_rate=lr, seed=seed)
    if not any(flag.startswith("--hessian_batch_size") for flag in flags):
        sizes["hessian_batch_size"] = batch // 2  # the paper's half
    text = f"{corpus}_{method}_{lr:g}" + f"_{share:g}T" * (share != 1) + f"_x{rows}" * (rows > 1) \
        + "_larger" * larger
    return RunSpec(f"{text}_s{seed}", (*MODEL, *LARGER * larger, *extra, *flags,
                                    *(f"--{k}={v}" for k, v in sizes.items())))


def run_specs(corpus: str, dataset: str, extra: tuple[str, ...] = ()) -> list[RunSpec]:
    """The runs on a corpus, prepared in the folder `dataset`, with flags for every run."""
    return [run_spec(corpus, dataset, method, lr, extra=extra, **more)
            for method, lr, more in RUNS[corpus]]


def grouped(results: list[Result]) -> dict[str, list[Result]]:
    """Results by setting: the seeds of each, in the order of the first."""
    groups: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        groups[result.name.rpartition("_s")[0]].append(result)
    return groups


def table(results: list[Result]) -> str:
    """One line per setting: by model and tokens per step, the lowest loss of seed 0 first."""
    lines = ["| method | learning rate | parameters | tokens per step | steps | "
             "loss of seeds 0, 1 | unclipped |", "|---" * 7 + "|"]
    rows = sorted(grouped(results).items(),
                  key=lambda item: (*size(item[1][0]), item[1][0].loss))
    for name, found in rows:
        config = found[0].config
        unclipped = found[0].mean("unclipped_fraction", 0.5)
        lines.append(
            f"| {name.split('_')[1]} | {config.learning_rate:g} | "
            f"{found[0].plan.parameters / 1e6:.1f}M | {config.tokens_per_step:,} | "
            f"{config.max_iters:,} | {', '.join(f'{r.loss:.4f}' for r in found)} | "
            f"{'' if math.isnan(unclipped) else f'{unclipped:.0%}'} |")
    return "\n".join(lines)


def size(result: Result) -> tuple[int, int]:
    """(parameters, tokens per step): what a comparison holds fixed."""
    return result.plan.parameters, result.config.tokens_per_step


def draw(corpora: dict[str, list[Result]], file: Path) -> None:
    """Validation losses of each method's best full-length setting, seed 0.

    A panel per corpus, model and batch at which more than one method was run.
    """
    plt = pyplot()
    panels: dict[tuple, dict[str, Result]] = {}
    for corpus, results in corpora.items():
        for r in (r for r in results if r.name.endswith("_s0")):  # the seed that all have
            method = r.name.split("_")[1]
            best = panels.setdefault((corpus, *size(r)), {})
            if r.config.max_iters == CORPORA[corpus][1] and method in PLOTTED \
                    and r.loss < getattr(best.get(method), "loss", math.inf):
                best[method] = r
    panels = {key: best for key, best in sorted(panels.items()) if len(best) > 1}
    rows = -(-len(panels) // 3) or 1
    figure, grid = plt.subplots(rows, min(3, len(panels) or 1), figsize=(
        4.2 * min(3, len(panels) or 1), 3.6 * rows), layout="constrained", squeeze=False)
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
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    drawn = {line.get_label(): line for axes in grid.flat for line in axes.lines}
    named = [label for label in PLOTTED.values() if label in drawn]
    figure.legend([drawn[label] for label in named], named, loc="outside lower center", ncols=3,
                  frameon=False)
    figure.savefig(file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)


PLOTTED = {"adamw": "AdamW", "lion": "Lion", "muon": "Muon", "sophiag": "Sophia-G, fixed gamma",
           "sophiah": "Sophia-H, fixed gamma", "ours": "Sophia-G, controlled gamma"}


@command()
def main(argv: list[str]) -> None:
    """The command."""
    settings, _ = load(StudySettings, argv, "python -m experiments.study [--key=value]")
    pyplot()  # better missed now than after the runs
    folders = {c: getattr(settings, c) for c in CORPORA if getattr(settings, c) != "-"}
    lists = [run_specs(corpus, folder, settings.extra) for corpus, folder in folders.items()]
    results = settings.run_all(list(filter(None, chain.from_iterable(zip_longest(*lists)))))
    corpora = {corpus: [r for r in results if r.name.startswith(f"{corpus}_")]
               for corpus in folders}
    text = "\n\n".join(f"{corpus}\n\n{table(found)}" for corpus, found in corpora.items())
    (Path(settings.out_dir) / "study.md").write_text(text + "\n")
    draw(corpora, Path(settings.out_dir) / "study.svg")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
