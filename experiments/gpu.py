"""Proves and times a machine: the tests for GPUs, exactness, speed, and trainings on real tokens.

    python -m experiments.gpu --out_dir=results/gpu/h100 --dataset=data/books
    python -m experiments.gpu --out_dir=out/rehearsal --rehearse       toy sizes, on a CPU too

It works for at most --minutes and then stops; the same command continues with what is not done, as
often as it takes. Each part is a command of its own, whose log and figures are in --out_dir:

    tests       pytest -m gpu
    exactness   experiments.exactness: against the CPU, low precision, compiled, resumed
    batch_SIZE  experiments.micro_batch: the fastest micro-batch, by doubling
    speed_SIZE  bench.py, all with the config's micro-batch: a nanoGPT-shaped loop, AdamW, Sophia-G
                (half of the batch; a tenth in twelve chunks), Sophia-H, Muon and other matrix
                optimizers
    train_NAME  train.py on --dataset, which goes on where the last call stopped it

A part that fails, or takes longer than a whole call, is noted with its last line and passed over;
--again=NAME repeats it. README.md there has the tables, report.json the figures: device, driver,
versions and commit, and no figure that was not measured. No network is needed.
"""

if __name__ == "__main__":
    import nanosophia.startup  # noqa: F401

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

import bench
from experiments import exactness, micro_batch
from experiments.archive import circumstances
from experiments.plot import read_metrics
from nanosophia.command import command
from nanosophia.configurator import ConfigError, Settings, UserError, load, option
from nanosophia.distributed import start_ranks
from nanosophia.files import create, read_bytes, remove, write_text
from nanosophia.folder_lock import FolderLock

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"30m": "train_gpt2_30m", "125m": "train_gpt2_small", "355m": "train_gpt2_medium",
         "770m": "train_gpt2_large"}
SMALLEST = {"30m": 16, "125m": 8, "355m": 4, "770m": 2}  # micro-batch to begin with
TABLES = {"exactness": exactness.table, "speed": bench.table, "batch": micro_batch.table}
CONTENDERS = (
    "optimizer=adamw", "optimizer=sophiag", "optimizer=sophiag,hessian_batch_size={tenth},"
    "hessian_chunks=12", "optimizer=sophiah", "optimizer=muon", "optimizer=metric_muon",
    "optimizer=soap", "optimizer=kron")
TRAININGS = ("adamw", "sophiag", "muon", "metric_muon")
TOY = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, batch_size=12)
LEAST_SECONDS = 20  # left of a call to begin a part with


@dataclass(frozen=True, kw_only=True)
class GpuSettings(Settings):
    """Settings of `python -m experiments.gpu`."""

    out_dir: str = option("", "folder for logs, figures and tables, e.g. results/gpu/h100",
                          section="gpu")
    dataset: str = option("", "prepared folder of real tokens; empty = no trainings")
    device: str = option("cuda", "cuda, cuda:N; with --rehearse also cpu")
    sizes: str = option(",".join(SIZES), "of these, comma-separated")
    minutes: float = option(9.0, "after which a call stops", above=0)
    max_iters: int = option(2000, "steps of each training", low=1)
    total_batch_size: int = option(480, "sequences per step of each training", low=1)
    rehearse: bool = option(False, "toy sizes, to try the command itself")
    again: str = option("", "parts to do again, comma-separated")

    def check(self) -> None:
        if not self.out_dir:
            raise ConfigError("out_dir is not given; write --out_dir=results/gpu/NAME", "out_dir")
        if unknown := set(self.sizes.split(",")) - SIZES.keys():
            raise ConfigError(f"sizes = {self.sizes!r}: {min(unknown) or 'nothing'} is none of "
                              f"{', '.join(SIZES)}", "sizes")
        if not self.rehearse and not self.device.startswith("cuda"):
            raise ConfigError(f"device = {self.device!r} is no GPU; --rehearse tries the command "
                              "without one", "device", "rehearse")


class PartsFailed(UserError):
    """Some parts failed; the message names them."""

    exit_code = 1


@dataclass(frozen=True)
class Part:
    """A command that gives figures."""

    name: str
    words: list[str]
    kind: Literal["log", "exactness", "batch", "speed", "training"] = "log"

    @property
    def resumes(self) -> bool:
        """Returns whether one that was stopped goes on where it was."""
        return self.kind == "training"


def parts(settings: GpuSettings) -> list[Part]:
    """Returns the parts in their order."""
    out = Path(os.path.relpath(settings.out_dir, ROOT))  # from where they run
    toy, device = settings.rehearse, dict(device=settings.device)
    found = [
        Part("tests", ["-m", "pytest", "-m", "gpu", "-q", "tests"]),
        Part("exactness", ["-m", "experiments.exactness", *_flags(
            device, dict(json=out / "exactness.json"),
            dict(compiled=False, steps=3, optimizers="adamw,sophiag") if toy else {})],
            "exactness")]
    for size in settings.sizes.split(","):
        found.append(Part(f"batch_{size}", [
            "-m", "experiments.micro_batch", f"config/{SIZES[size]}_adamw.py", *_flags(
                device, dict(first=SMALLEST[size], json=out / f"batch_{size}.json"),
                {key: value for key, value in TOY.items() if key != "batch_size"}
                | dict(vocab_size=512, first=1, last=4, repeats=3) if toy else {})], "batch"))
        # Few at a time: all that are compared are compiled, and held in memory, together.
        group_size, those = (2, CONTENDERS[:6]) if size == "770m" else (3, CONTENDERS)
        groups = [CONTENDERS[:3]] if toy else [
            those[i:i + group_size] for i in range(0, len(those), group_size)]
        for i, group in enumerate(groups):
            name = f"speed_{size}" + (f"_{i + 1}" if len(groups) > 1 else "")
            found.append(Part(name, ["bench.py", f"config/{SIZES[size]}_sophiag.py", *_flags(
                device, dict(compare="; ".join(["plain", *group]).format(tenth=12 if toy else 48),
                             json=out / f"{name}.json"),
                TOY | dict(total_batch_size=24, hessian_batch_size=12, vocab_size=512,
                           repeats=3) if toy else {})], "speed"))
    return found + [_training(settings, optimizer, out / "runs" / optimizer)
                    for optimizer in TRAININGS if settings.dataset]


def _flags(*settings: dict) -> list[str]:
    """Returns settings as flags; of those named twice the later ones."""
    return [f"--{key}={value}" for key, value in {k: v for s in settings for k, v in
                                                  s.items()}.items()]


def _training(settings: GpuSettings, optimizer: str, run: Path) -> Part:
    steps, rows, data = settings.max_iters, settings.total_batch_size, Path(settings.dataset)
    own = dict(device=settings.device, out_dir=run, init_from="auto", checkpoint_interval=200,
               keep_checkpoints=2, keep_best=False, sample_tokens=0, max_iters=steps,
               dataset=f"./{os.path.relpath(data, ROOT)}" if data.is_dir() else data,
               warmup_iters=max(1, steps // 20), total_batch_size=rows, eval_interval=100)
    if optimizer == "sophiag":
        own["hessian_batch_size"] = max(1, rows // 2)
    if settings.rehearse:
        own |= TOY | dict(eval_interval=10, checkpoint_interval=10, eval_windows=4)
    return Part(f"train_{optimizer}", ["train.py", f"config/train_gpt2_30m_{optimizer}.py",
                                       *_flags(own)], "training")


def read_state(out: Path) -> dict[str, dict]:
    """Returns by name what was done: status, seconds, and the last line of what failed."""
    try:
        state = json.loads(read_bytes(out / "state.json"))
        return {name: dict(status=str(row["status"]), seconds=float(row["seconds"]),
                           said=str(row["said"]))
                for name, row in state.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, AttributeError, TypeError) as error:
        raise ConfigError(f"{out / 'state.json'} is not what this command writes ({error!r}); "
                          "remove it to begin anew", "out_dir") from None


def run_part(part: Part, out: Path, seconds: float) -> tuple[int | None, str]:
    """Runs a part for at most so many seconds; returns its exit code, None where it was stopped,
    and its last line. Its output is appended to logs/NAME.log."""
    log = out / "logs" / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    before = log.stat().st_size if part.resumes and log.exists() else 0
    with open(log, "ab") if before else create(log) as file:
        process = subprocess.Popen([sys.executable, *part.words], cwd=ROOT, stdout=file,
                                   stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also after Ctrl-C
            if process.poll() is None:
                _end(process, patience=60 if part.resumes else 5)
    lines = read_bytes(log)[before:].decode(errors="replace").strip().splitlines() or [""]
    return code, lines[-1].strip()[:200]


def _end(process: subprocess.Popen, patience: float) -> None:
    """Stops a part and all that it started; a training saves first."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(patience)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def work(settings: GpuSettings, out: Path) -> bool:
    """Does what is not done until the time is over; returns whether all is done."""
    state, todo = read_state(out), parts(settings)
    begin, first = time.monotonic(), True
    for name in filter(None, settings.again.split(",")):
        if name not in {part.name for part in todo}:
            raise ConfigError(f"again = {name!r} is no part; they are "
                              f"{', '.join(part.name for part in todo)}", "again")
        state.pop(name, None)
        remove(out / "runs" / name.removeprefix("train_"))
    for part in todo:
        if state.get(part.name, {}).get("status") in ("done", "failed"):
            continue
        left = 60 * settings.minutes - (time.monotonic() - begin)
        if left < LEAST_SECONDS and not first:
            return False
        print(f"{part.name} ...", flush=True)
        started = time.monotonic()
        code, said = run_part(part, out, left)
        seconds = time.monotonic() - started + state.get(part.name, dict(seconds=0))["seconds"]
        if code is None and (part.resumes or not first):
            status = "stopped"  # and goes on, or has a whole call next time
        else:
            status = "done" if code == 0 or (part.name, code) == ("tests", 5) else "failed"
        if code is None and status == "failed":
            said = f"did not end within {settings.minutes:g} minutes"
        state[part.name] = dict(status=status, seconds=seconds, said=said)
        write_text(out / "state.json", json.dumps(state, indent=1) + "\n")
        print(f"{part.name}: {status}, {said if status == 'failed' else f'{seconds:.0f} s'}",
              flush=True)
        if code is None and status == "stopped":
            return False
        first = False
    return True


def facts(settings: GpuSettings) -> dict:
    """Returns what the figures belong to."""
    device = start_ranks(settings.device).device
    found = circumstances() | dict(device=exactness.device_name(device), cuda=torch.version.cuda,
                                   system=platform.platform(), rehearsal=settings.rehearse)
    for key, words in dict(
            driver=["nvidia-smi", "--query-gpu=driver_version,memory.total",
                    "--format=csv,noheader"],
            commit=["git", "-C", str(ROOT), "rev-parse", "HEAD"]).items():
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=20)
            found[key] = done.stdout.strip().splitlines()[0] if done.returncode == 0 else "unknown"
        except (OSError, IndexError, subprocess.TimeoutExpired):
            found[key] = "unknown"
    return found


def report(settings: GpuSettings, out: Path, facts: dict) -> dict:
    """Returns the figures of all parts that have some."""
    figures = {}
    for part in parts(settings):
        file, run = out / f"{part.name}.json", out / "runs" / part.name.removeprefix("train_")
        if part.kind in TABLES and file.exists():
            figures[part.name] = json.loads(read_bytes(file))
        elif part.kind == "training" and (run / "metrics.jsonl").exists():
            figures[part.name] = [{key: record.get(key) for key in (
                "step", "val/loss", "tokens_per_second", "mfu")} for record in read_metrics(run)]
    return dict(facts=facts, state=read_state(out), figures=figures)


def markdown(settings: GpuSettings, data: dict) -> str:
    """Returns the page of a report."""
    facts, state, figures = data["facts"], data["state"], data["figures"]
    lines = [f"# {facts['device']}" + (" (a rehearsal at toy sizes: no GPU figure)"
                                       if facts["rehearsal"] else ""), "",
             ", ".join(f"{key} {facts[key]}" for key in (
                 "date", "driver", "cuda", "torch", "python", "commit")), "",
             "| part | | seconds |", "|---|---|---|"]
    for part in parts(settings):
        row = state.get(part.name, dict(status="not begun", seconds=0, said=""))
        said = f": {row['said']}" if row["status"] == "failed" else ""
        lines.append(f"| {part.name} | {row['status']}{said} | {row['seconds']:.0f} |")
    for part in parts(settings):
        if part.name in figures and part.kind in TABLES:
            words = [word for word in part.words if not word.startswith("--json=")]
            lines += ["", f"## {part.name}", "", f"`python {shlex.join(words)}`", "",
                      TABLES[part.kind](figures[part.name])]
    trained = {name: rows for name, rows in figures.items() if name.startswith("train_")}
    if trained:
        lines += ["", "## Training 30M", "", f"{settings.max_iters:,} steps of "
                  f"{settings.total_batch_size} sequences of {Path(settings.dataset).name}; "
                  "validation loss, "
                  "nats per token", "", "| optimizer | steps | loss | tokens/s, median | MFU |",
                  "|---|---|---|---|---|"]
    for name, rows in trained.items():
        seen = [r for r in rows if r["val/loss"] is not None]
        rates = sorted(r["tokens_per_second"] for r in rows if r["tokens_per_second"])
        shares = sorted(r["mfu"] for r in rows if r["mfu"])
        lines.append(f"| {name.removeprefix('train_')} | {rows[-1]['step'] + 1:,} | " + (
            f"{seen[-1]['val/loss']:.4f}" if seen else "-") + " | " + (
            f"{rates[len(rates) // 2]:,.0f}" if rates else "-") + " | " + (
            f"{shares[len(shares) // 2]:.1%}" if shares else "-") + " |")
    return "\n".join(lines) + "\n"


@command()
def main(argv: list[str]) -> None:
    """Runs the command."""
    settings, _ = load(GpuSettings, argv, "python -m experiments.gpu --out_dir=results/gpu/NAME")
    out = Path(settings.out_dir)
    found = facts(settings)  # a missing driver or device ends here
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    with FolderLock(out) as lock:
        lock.take()
        try:
            done = work(settings, out)
        finally:
            data = report(settings, out, found)
            write_text(out / "report.json", json.dumps(data) + "\n")
            write_text(out / "README.md", markdown(settings, data))
            signal.signal(signal.SIGTERM, before)
    print(f"{'all done' if done else 'to be continued by the same command'}; {out / 'README.md'}")
    state = read_state(out)
    failed = [part.name for part in parts(settings)
              if state.get(part.name, {}).get("status") == "failed"]
    if failed:
        raise PartsFailed(f"{', '.join(failed)} failed; see the logs in {out / 'logs'}, and repeat "
                          f"with --again={','.join(failed)}")


if __name__ == "__main__":
    main(sys.argv[1:])
