"""Times whole training commands on a CPU: processor time per step, and memory.

    python -m experiments.speed --dataset=stdlib [--nanogpt=FOLDER] [--n_layer=6 --n_embd=384]

Every contender is a command in a process of its own, which trains once for one step and once for
`steps` more; the difference of their processor times is that of the steps, whole cycles of k = 10.
They take turns, round after round, and a ratio is taken within a round. With --nanogpt, a folder
that holds github.com/karpathy/nanoGPT, its own train.py is the first contender. The share is of the
rate at which one core multiplies matrices of 2048 x 2048 in the contender's precision.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from bench import publish
from experiments.archive import measured
from model import GPT, GPTConfig
from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, UserError, load, option
from nanosophia.precision import computes_bfloat16

ROOT = Path(__file__).resolve().parents[1]
SIDE = 2048  # of the matrices whose product is the rate


@dataclass(frozen=True, kw_only=True)
class SpeedSettings(Settings):
    """Settings of `python -m experiments.speed`."""

    nanogpt: str = option("", "folder with nanoGPT's train.py and model.py; empty = left out")
    dataset: str = option("stdlib", "folder under data/, or a path, with train.bin and val.bin")
    rounds: int = option(3, "times that every contender is run", low=1)
    steps: int = option(20, "steps that are timed in each run; a multiple of 10", low=10)
    n_layer: int = option(2, "of the model", low=1)
    n_head: int = option(4, "of the model", low=1)
    n_embd: int = option(128, "of the model", low=1)
    block_size: int = option(128, "context", unit="tokens", low=1)
    batch_size: int = option(10, "sequences per micro-batch, of two per step", low=2)
    vocab_size: int = option(50304, "rows of the embedding", low=257)
    json: str = option("", "file that receives the measurements; empty = none")

    def check(self) -> None:
        if self.steps % 10:
            raise ConfigError(f"steps = {self.steps} is no multiple of 10, the interval between "
                              "estimates", "steps")
        if self.nanogpt and not (Path(self.nanogpt) / "train.py").is_file():
            raise ConfigError(f"{self.nanogpt} holds no train.py of nanoGPT", "nanogpt")

    @property
    def flops_per_step(self) -> int:
        """Returns the training FLOPs of one step, without those of estimates."""
        with torch.device("meta"):
            model = GPT(GPTConfig(**{key: getattr(self, key) for key in (
                "n_layer", "n_head", "n_embd", "block_size", "vocab_size")}))
        return model.flops_per_token() * 2 * self.batch_size * self.block_size


def contenders(settings: SpeedSettings) -> dict[str, list[str]]:
    """Returns the flags of train.py for each contender; the precision of those after the first is
    what dtype = auto may take."""
    low = "bfloat16" if computes_bfloat16() else "float32"
    half, twentieth = settings.batch_size, max(1, settings.batch_size // 10)
    found = {"AdamW, float32": ["--optimizer=adamw", "--dtype=float32"]}
    found |= {f"{name}, {low}": [*flags, f"--dtype={low}"] for name, flags in {
        "AdamW": ["--optimizer=adamw"], "Lion": ["--optimizer=lion"], "Muon": ["--optimizer=muon"],
        "Sophia-G, half of the batch": ["--optimizer=sophiag", f"--hessian_batch_size={half}"],
        "Sophia-G, a tenth in two chunks": [
            "--optimizer=sophiag", f"--hessian_batch_size={2 * twentieth}", "--hessian_chunks=2"],
        "Sophia-H, a twentieth": ["--optimizer=sophiah", f"--hessian_batch_size={twentieth}"],
        "AdaHessian, a twentieth": [
            "--optimizer=adahessian", f"--hessian_batch_size={twentieth}"]}.items()}
    return found


def our_command(settings: SpeedSettings, flags: list[str], steps: int, out: str) -> list[str]:
    """Returns the command that trains for some steps with train.py."""
    shape = [f"--{key}={getattr(settings, key)}" for key in (
        "n_layer", "n_head", "n_embd", "block_size", "batch_size", "vocab_size", "dataset")]
    return [sys.executable, str(ROOT / "train.py"), *shape, *flags, f"--out_dir={out}",
            f"--total_batch_size={2 * settings.batch_size}", f"--max_iters={steps}",
            "--warmup_iters=0", "--eval_windows=1", "--device=cpu"]


def nanogpt_command(settings: SpeedSettings, steps: int, out: str) -> list[str]:
    """Returns the command that trains for some steps with nanoGPT's train.py."""
    from nanosophia.dataloader import open_dataset
    shape = [f"--{key}={getattr(settings, key)}" for key in (
        "n_layer", "n_head", "n_embd", "block_size", "batch_size")]
    data = open_dataset(settings.dataset, settings.block_size, "none").folder.resolve()
    return [sys.executable, "train.py", *shape, f"--dataset={data}", f"--out_dir={out}",
            "--gradient_accumulation_steps=2", f"--max_iters={steps - 1}", "--device=cpu",
            "--compile=False", "--eval_iters=1", "--eval_interval=1000000", "--log_interval=1000",
            "--always_save_checkpoint=False"]


def run(arguments: list[str], folder: Path) -> tuple[float, int]:
    """Runs a command on one thread; returns its processor seconds and its peak bytes."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(arguments, cwd=folder, stdout=output, stderr=output,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            output.seek(0)
            last = output.read().decode(errors="replace").strip().splitlines()[-1:]
            raise UserError(f"{' '.join(arguments)} ended with {process.returncode}: "
                            f"{''.join(last)}")
    return usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024  # it is in KiB


def product_rate(dtype: torch.dtype) -> float:
    """Returns the FLOP/s of one core at a large matrix product, the best of four."""
    x, seconds = torch.ones(SIDE, SIDE, dtype=dtype), []
    for _ in range(4):
        start = time.process_time()
        x @ x
        seconds.append(time.process_time() - start)
    return 2 * SIDE**3 / min(seconds)


def measure(settings: SpeedSettings) -> dict:
    """Runs all contenders in turn and returns the report."""
    torch.set_num_threads(1)
    makers = {name: (lambda steps, out, flags=flags: our_command(settings, flags, steps, out), ROOT)
              for name, flags in contenders(settings).items()}
    if settings.nanogpt:
        nanogpt = (lambda steps, out: nanogpt_command(settings, steps, out),
                   Path(settings.nanogpt))
        makers = {"nanoGPT's train.py, AdamW, float32": nanogpt} | makers
    seconds, peaks = ({name: [] for name in makers} for _ in range(2))
    rates = {dtype: [] for dtype in ("float32", "bfloat16")}
    for _ in range(settings.rounds):
        for dtype, found in rates.items():
            found.append(product_rate(getattr(torch, dtype)))
        for name, (make, folder) in makers.items():
            with tempfile.TemporaryDirectory() as out:
                short, _ = run(make(1, f"{out}/short"), folder)
                long, peak = run(make(1 + settings.steps, f"{out}/long"), folder)
            seconds[name].append((long - short) / settings.steps)
            peaks[name].append(peak)
    first = next(iter(makers))
    rates = {dtype: max(found) for dtype, found in rates.items()}
    rows = {}
    for name, found in seconds.items():
        ratios = [a / b for a, b in zip(found, seconds[first], strict=True)]
        rate = rates[name.rpartition(", ")[2]]
        rows[name] = dict(seconds=median(found), ratio=median(ratios), least=min(ratios),
                          most=max(ratios), peak_bytes=max(peaks[name]),
                          share=settings.flops_per_step / median(found) / rate)
    return dict(rows=rows, rates=rates, rounds=settings.rounds, steps=settings.steps,
                flops_per_step=settings.flops_per_step, torch=torch.__version__,
                tokens=2 * settings.batch_size * settings.block_size)


def table(report: dict) -> str:
    """Returns the report as a Markdown table."""
    rates = ", ".join(f"{dtype} {rate / 1e9:.0f}" for dtype, rate in report["rates"].items())
    gflop = report["flops_per_step"] / 1e9
    lines = [f"{report['tokens']:,} tokens and {gflop:.0f} GFLOP per step, one thread, "
             f"torch {report['torch']}, {report['rounds']} rounds of "
             f"{report['steps']} steps; products in GFLOP/s: {rates}", "",
             "| contender | s per step | x the first | least-most | share of the product rate | "
             "peak MiB |", "|---" * 6 + "|"]
    for name, row in report["rows"].items():
        lines.append(f"| {name} | {row['seconds']:.3f} | {row['ratio']:.3f} | {row['least']:.3f}-"
                     f"{row['most']:.3f} | {row['share']:.0%} | {row['peak_bytes'] >> 20:,} |")
    return "\n".join(lines)


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(SpeedSettings, argv, "python -m experiments.speed [--key=value]")
    report = measure(settings) | measured("speed", argv)
    publish(report, table(report), settings.json)


if __name__ == "__main__":
    main(sys.argv[1:])
