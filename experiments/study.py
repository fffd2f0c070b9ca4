"""The study on real text: tuned baselines against Sophia with a fixed and with a controlled gamma.

    python data/text/prepare.py --input=books.parquet --val_fraction=0.01 --out_dir=data/books
    python data/text/prepare.py --input=books.parquet --val_fraction=0.01 --tokenizer=bytes \
        --out_dir=data/books-bytes
    python -m experiments.study --bpe=data/books --bytes=data/books-bytes --jobs=2

Every run that was made is in the lists below; the tables of results/study.md are this command's.
"""

import sys
from dataclasses import dataclass
from itertools import chain, zip_longest

from configurator import ConfigError, exit_with, knob, load
from experiments.runs import Cell, RunSettings

MODEL = ("--n_layer=4", "--n_head=4", "--n_embd=96", "--block_size=128",
         "--eval_interval=100", "--eval_windows=1000", "--checkpoint_interval=1000",
         "--keep_best=False", "--hessian_interval=10")
CORPORA = {
    # name: (rows per step, steps)
    "bpe": (16, 400),
    "bytes": (32, 400),
}
ADAMW = ("--optimizer=adamw", "--beta1=0.9", "--beta2=0.95")
LION = ("--optimizer=lion",)
MUON = ("--optimizer=muon", "--beta1=0.9", "--beta2=0.99", "--weight_decay=0.1")
PAPER_G = ("--optimizer=sophiag",)
PAPER_H = ("--optimizer=sophiah",)
OURS = ("--optimizer=sophiag", "--beta1=0.8", "--gamma_target=0.9", "--gamma_rows=embedding")


@dataclass(frozen=True, kw_only=True)
class StudySettings(RunSettings):
    """The settings of this command."""

    bpe: str = knob("books", "folder of the text in GPT-2's tokens; - leaves it out",
                    section="study")
    bytes: str = knob("books-bytes", "folder of the text in bytes; - leaves it out")


def cell(corpus: str, dataset: str, method: str, flags: tuple[str, ...], lr: float, seed: int = 0,
         *, share: float = 1.0, warmup: float = 0.05, rows: int = 1) -> Cell:
    """A run of `share` of the corpus's steps, on `rows` times its rows per step."""
    batch, steps = CORPORA[corpus]
    batch, steps = batch * rows, round(steps * share)
    sizes = dict(dataset=dataset, batch_size=min(batch, 16), total_batch_size=batch,
                 max_iters=steps, warmup_iters=round(warmup * steps), learning_rate=lr, seed=seed)
    if not any(flag.startswith("--hessian_batch_size") for flag in flags):
        sizes["hessian_batch_size"] = batch // 2  # the paper's half
    text = f"{corpus}_{method}_{lr:g}" + f"_{share:g}T" * (share != 1) + f"_x{rows}" * (rows > 1)
    return Cell(f"{text}_s{seed}", (*MODEL, *flags, *(f"--{k}={v}" for k, v in sizes.items())))


def bpe(folder: str) -> list[Cell]:
    """The runs on GPT-2's tokens."""
    def run(method, flags, lr, **more):
        return cell("bpe", folder, method, flags, lr, **more)

    return [
        run("adamw", ADAMW, 8e-3, warmup=0.15),
        run("ours", OURS, 1.2e-2),
        run("adamw", ADAMW, 4e-3, warmup=0.15),
        run("ours", OURS, 6e-3),
        run("muon", MUON, 1.2e-2, warmup=0.1),
        run("ours", OURS, 1.2e-2, share=0.7),
        run("sophiag", (*PAPER_G, "--gamma=0.8"), 4e-3),
        run("lion", LION, 1e-3, warmup=0.15),
        run("sophiah", (*PAPER_H, "--gamma=0.16", "--hessian_batch_size=2"), 4e-3),
    ]


def bytes_(folder: str) -> list[Cell]:
    """The runs on bytes."""
    def run(method, flags, lr, **more):
        return cell("bytes", folder, method, flags, lr, **more)

    return [
        run("adamw", ADAMW, 8e-3, warmup=0.15),
        run("ours", OURS, 1.2e-2),
        run("adamw", ADAMW, 4e-3, warmup=0.15),
        run("ours", OURS, 2e-2),
        run("muon", MUON, 1.2e-2, warmup=0.1),
        run("muon", MUON, 2e-2, warmup=0.1),
        run("lion", LION, 1e-3, warmup=0.15),
        run("lion", LION, 2e-3, warmup=0.15),
        run("ours", OURS, 1.2e-2, share=0.7),
        run("sophiag", (*PAPER_G, "--gamma=0.5"), 4e-3),
        run("sophiah", (*PAPER_H, "--gamma=0.1", "--hessian_batch_size=2"), 4e-3),
    ]


def main(argv: list[str]) -> None:
    """The command."""
    try:
        settings, _ = load(StudySettings, argv, "python -m experiments.study [--key=value]")
        pairs = [(bpe, settings.bpe), (bytes_, settings.bytes)]
        lists = [make(folder) for make, folder in pairs if folder != "-"]
        settings.carry_out(filter(None, chain.from_iterable(zip_longest(*lists))))
    except ConfigError as error:
        exit_with(error)


if __name__ == "__main__":
    main(sys.argv[1:])
