"""nanoGPT's example for a CPU, by four optimizers and by nanoGPT itself, over several seeds.

    python data/shakespeare_char/prepare.py
    python -m experiments.shakespeare --jobs=2 [--nanogpt=FOLDER]

4 layers, 4 heads, width 128, context 64, batch 12, 2,000 steps, no dropout, on the characters of
Shakespeare. Each optimizer is tuned as by experiments.leaderboard, at the full length, by --budget
runs with seed 0; then it runs with --seeds seeds. With --nanogpt,
a folder that holds github.com/karpathy/nanoGPT, its own train.py runs with the flags of its README
and other seeds. All losses are of the same windows: the whole validation split once, in nats per
character; nanoGPT's of the weights that it saved after 2,000 steps.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from experiments import judge
from experiments.archive import Remembering, Replaying, archive, command_line
from experiments.leaderboard import LeaderboardSettings, Setting, spec_of, tune_all
from experiments.runs import Result, RunSettings, mean
from nanosophia.command import command
from nanosophia.configurator import ConfigError, UserError, load, option
from nanosophia.dataloader import ValidationWindows, open_dataset
from nanosophia.distributed import start_ranks
from nanosophia.evaluation import evaluate
from nanosophia.files import write_text
from nanosophia.weights import foreign_weights

STEPS, CONTEXT, ROWS = 2000, 64, 12
MODEL = dict(n_layer=4, n_head=4, n_embd=128, block_size=CONTEXT, batch_size=ROWS)
BASELINE = "AdamW: optimizer=adamw,learning_rate=2e-3|4e-3|8e-3,beta1=0.9|0.8,beta2=0.99|0.95"
CANDIDATES = (
    "controlled gamma: optimizer=sophiag,gamma_rows=embedding,learning_rate=5e-3|1e-2|2e-2,"
    "gamma_target=0.9|0.8,beta1=0.8|0.9; "
    "Muon: optimizer=muon,learning_rate=1e-2|2e-2|4e-2,muon_momentum=0.95|0.9,beta2=0.95|0.99; "
    "metric Muon: optimizer=metric_muon,learning_rate=1e-2|2e-2|4e-2,muon_momentum=0.95|0.9,"
    "beta2=0.95|0.99")
# nanoGPT's README: its config of Shakespeare with these flags, but evaluated once.
NANOGPT = dict(device="cpu", compile=False, eval_iters=1, eval_interval=STEPS, log_interval=STEPS,
               **MODEL, max_iters=STEPS, lr_decay_iters=STEPS, dropout=0.0,
               always_save_checkpoint=True)
OTHER_SEED = """
import runpy, sys, torch
seed, sys.argv = int(sys.argv[1]), ["train.py", *sys.argv[2:]]
own = torch.manual_seed
torch.manual_seed = lambda number: own(number + seed)
runpy.run_path("train.py", run_name="__main__")
"""


@dataclass(frozen=True, kw_only=True)
class ShakespeareSettings(RunSettings):
    """Settings of `python -m experiments.shakespeare`."""

    dataset: str = option("shakespeare_char", "folder that its prepare.py wrote",
                          section="shakespeare")
    nanogpt: str = option("", "folder with nanoGPT's train.py and model.py; empty = left out")
    seeds: int = option(5, "runs of each optimizer at its best", low=2)
    budget: int = option(8, "runs that tune each optimizer", low=6)
    max_iters: int = option(STEPS, "steps; fewer to try the command", low=20)

    def check(self) -> None:
        super().check()
        if self.nanogpt and not (Path(self.nanogpt) / "train.py").is_file():
            raise ConfigError(f"{self.nanogpt} holds no train.py of nanoGPT", "nanogpt")


def board(settings: ShakespeareSettings) -> LeaderboardSettings:
    """Returns how the optimizers are tuned, and where their runs are."""
    shape = " ".join(f"--{key}={value}" for key, value in MODEL.items())
    return LeaderboardSettings(
        baseline=BASELINE, candidates=CANDIDATES, budget=settings.budget, seeds=settings.seeds,
        max_iters=f"{settings.max_iters // 2},{settings.max_iters}",
        out_dir=settings.out_dir, jobs=settings.jobs,
        flags=f"{shape} --total_batch_size={ROWS} --hessian_batch_size={ROWS} --dtype=float32 "
              f"--dataset={settings.dataset} --eval_windows=2000 {settings.flags}".strip())


def run_all(board: LeaderboardSettings) -> dict[str, tuple[Setting, list[Result]]]:
    """Returns each optimizer's best setting and its runs, by seed."""
    tuned, steps = tune_all(board), board.lengths[-1]
    specs = [spec_of(board, c, tuned[c.name][0], steps, seed)
             for seed in range(board.seeds) for c in board.contenders]
    results = iter(board.run_all(specs))
    runs: dict[str, list[Result]] = {c.name: [] for c in board.contenders}
    for _ in range(board.seeds):
        for found in runs.values():
            found.append(next(results))
    return {name: (tuned[name][0], found) for name, found in runs.items()}


def nanogpt_runs(settings: ShakespeareSettings) -> list[dict]:
    """Runs nanoGPT's own train.py with each seed; returns losses and processor seconds per step."""
    data, found = open_dataset(settings.dataset, CONTEXT), []
    windows = ValidationWindows(data.val, block_size=CONTEXT, limit=2000)
    ranks = start_ranks("cpu")
    with tempfile.TemporaryDirectory() as out:
        start = run_nanogpt(settings, 0, 1, data.folder.resolve(), out)
    for seed in range(settings.seeds):
        with tempfile.TemporaryDirectory() as out:
            seconds = run_nanogpt(settings, seed, settings.max_iters, data.folder.resolve(), out)
            model = foreign_weights(f"{out}/ckpt.pt").build()
            loss = evaluate(model, windows, ranks, ROWS, torch.no_grad)
        found.append(dict(loss=loss, seconds=(seconds - start) / (settings.max_iters - 1)))
        print(f"nanoGPT, seed {seed}: loss {loss:.4f}", flush=True)
    return found


def run_nanogpt(settings: ShakespeareSettings, seed: int, steps: int, data: Path,
                out: str) -> float:
    """Runs its train.py on one thread; returns processor seconds. Its ckpt.pt is in `out`."""
    flags = NANOGPT | dict(max_iters=steps, eval_interval=steps, lr_decay_iters=steps,
                           dataset=data, out_dir=out)
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER_SEED, str(seed), "config/train_shakespeare_char.py",
             *(f"--{key}={value}" for key, value in flags.items())], cwd=settings.nanogpt,
            stdout=output, stderr=output, env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode or not (Path(out) / "ckpt.pt").exists():
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"nanoGPT's train.py ended with {process.returncode}: {''.join(last)}")
    return usage.ru_utime + usage.ru_stime


def table(runs: dict[str, tuple[Setting, list[Result]]], board: LeaderboardSettings,
          nanogpt: list[dict]) -> str:
    """Returns the losses and the processor time of a step as a Markdown table."""
    contenders = {c.name: c for c in board.contenders}
    rows = []
    for name, (setting, results) in runs.items():
        losses = [result.loss for result in results]
        own = "".join(f", {key} {value}" for key, value in zip(
            contenders[name].options, setting.options, strict=True))
        per_step = sorted(result.processor_seconds for result in results)[len(results) // 2]
        how = f"lr {setting.rate:.3g}, warm-up {setting.warmup:.0%}{own}"
        rows.append((mean(losses), name, how, losses, per_step))
    if nanogpt:
        losses = [run["loss"] for run in nanogpt]
        rows.append((mean(losses), "nanoGPT's own train.py, AdamW", "its config: lr 0.001, warm-up "
                     "5%, beta1 0.9, beta2 0.99", losses,
                     sorted(run["seconds"] for run in nanogpt)[len(nanogpt) // 2]))
    first = next(iter(runs.values()))[1][0]
    lines = [f"{board.lengths[-1]:,} steps of {first.config.tokens_per_step} characters, "
             f"{first.plan.parameters / 1e6:.2f}M parameters, {board.budget} runs tuned each, "
             f"{board.seeds} seeds; nats per character", "",
             "| | at its best | loss (standard error) | least-most | ms per step, one core |",
             "|---|---|---|---|---|"]
    for loss, name, how, losses, seconds in sorted(rows):
        lines.append(f"| {name} | {how} | {loss:.4f} ({judge.standard_error(losses):.4f}) | "
                     f"{min(losses):.4f}-{max(losses):.4f} | {1000 * seconds:.0f} |")
    return "\n".join(lines)


def remake(data: dict) -> str:
    """Returns the table of stored runs; raises ConfigError."""
    replayed = Replaying(board(ShakespeareSettings(**data["settings"])), data, "all")
    return table(run_all(replayed), replayed, data["nanogpt"])


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(ShakespeareSettings, argv, "python -m experiments.shakespeare [--key=value]")
    judge.require_scipy()
    remembering = Remembering(board(settings))
    runs, out = run_all(remembering), Path(settings.out_dir)
    nanogpt = nanogpt_runs(settings) if settings.nanogpt else []
    kept = {key: value for key, value in vars(settings).items()
            if key not in ("out_dir", "jobs", "nanogpt")}
    data = archive(command_line("experiments.shakespeare", argv),
                   {"all": remembering.results.values()}, experiment="shakespeare", settings=kept,
                   nanogpt=nanogpt)
    write_text(out / "shakespeare.json", json.dumps(data) + "\n")
    text = table(runs, remembering, nanogpt)
    write_text(out / "shakespeare.md", text + "\n")
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
