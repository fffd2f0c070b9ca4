"""Runs lists of trainings, one after the other or side by side, and reads their results.

The experiments that train are made of three things. A `RunSpec` is a name and flags of train.py.
`run_all` runs train.py in OUT/NAME for each spec that has not finished yet, so that an interrupted
list continues where it stopped. A `Result` reads what a finished run recorded. A run that diverges
(train.py then exits with 1) is a result too: its loss is infinite.
"""

import io
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

from experiments.plot import read_config, read_metrics
from nanosophia import dry_run, optimizers
from nanosophia.checkpoint import checkpoint_folders
from nanosophia.configurator import ConfigError, Settings, UserError, load, option
from nanosophia.files import append_text, reason, reopen
from nanosophia.options import Config

ROOT = Path(__file__).resolve().parents[1]
# The only values that a spec may give to these settings: an experiment's runs train, from scratch.
ALLOWED_VALUES = dict(init_from=("scratch", "auto"), eval_only=(False,), dry_run=(False,))
# These values leave the choice to train.py, so any value that a run has chosen agrees with them.
CHOSEN_BY_TRAIN = dict(vocab_size=0, dtype="auto", batch_size=0)


class RunError(UserError):
    """Reports that a run ended without a result; the message names its folder and the reason."""


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """Settings of every command that makes training runs."""

    out_dir: str = option("out/experiment", "folder that receives the runs, a table and pictures",
                          section="runs")
    flags: str = option("", "train.py's flags for every run, e.g. \"--dataset=mine --bias\"; "
                            "settings that the experiment itself varies win over them")
    jobs: int = option(1, "runs at the same time; the processor's cores are divided among them",
                       low=1)
    nproc_per_node: int = option(1, "ranks of each run, under torchrun", low=1)

    def check(self) -> None:
        try:
            shlex.split(self.flags)
        except ValueError as error:
            raise ConfigError(f"flags = {self.flags!r} cannot be split into flags: {error}; "
                              "correct the quotes", "flags") from None

    @property
    def extra(self) -> tuple[str, ...]:
        """Returns the flags for every run as a tuple."""
        return tuple(shlex.split(self.flags))

    def check_specs(self, specs: Iterable["RunSpec"]) -> None:
        """Calls `check_specs` with these settings."""
        check_specs(list(specs), Path(self.out_dir), self.nproc_per_node)

    def run_all(self, specs: Iterable["RunSpec"]) -> list["Result"]:
        """Calls `run_all` with these settings."""
        return run_all(list(specs), Path(self.out_dir), jobs=self.jobs,
                       ranks=self.nproc_per_node)


@dataclass(frozen=True)
class RunSpec:
    """One run to make: the name of its folder, and train.py's flags without --out_dir and
    --init_from. It starts from scratch, or where `branch`, the name of another run that was made
    before and a step that it saved, left off."""

    name: str
    flags: tuple[str, ...]
    branch: tuple[str, int] | None = None

    def load(self) -> tuple[Config, dict[str, str]]:
        """Returns the resolved settings and the source of each given key; raises ConfigError."""
        config, sources = load(Config, list(self.flags), "")
        return optimizers.with_own_defaults(config, sources), sources

    def config(self) -> Config:
        """Returns the resolved settings; raises ConfigError."""
        return self.load()[0]


@dataclass(frozen=True)
class Result:
    """A run that finished or diverged."""

    name: str
    folder: Path
    diverged: bool

    @cached_property
    def records(self) -> list[dict]:
        """Returns the lines of its metrics.jsonl; none where it diverged before the first."""
        return read_metrics(self.folder) if (self.folder / "metrics.jsonl").exists() else []

    @cached_property
    def config(self) -> Config:
        """Returns its settings; raises ConfigError where they are of other code."""
        try:
            return Config(**read_config(self.folder))
        except TypeError as error:
            raise ConfigError(f"{self.folder / 'config.json'} is of other code: {error}; give "
                              "another --out_dir", "out_dir") from None

    @property
    def loss(self) -> float:
        """Returns the final validation loss in nats per token, infinite where it diverged."""
        return math.inf if self.diverged else self.records[-1]["val/loss"]

    @property
    def points(self) -> list[tuple[int, float]]:
        """Returns (steps done, validation loss) of every evaluation whose loss was finite."""
        return [(r["step"] + 1, r["val/loss"]) for r in self.records
                if r.get("val/loss") is not None]

    @property
    def steps(self) -> int:
        """Returns the steps done: fewer than max_iters where the run diverged."""
        return self.records[-1]["step"] + 1 if self.records else 0

    @property
    def seconds(self) -> float:
        """Returns the time spent in training steps, without evaluations and saves."""
        seconds, last = 0.0, 0
        for r in self.records:
            if r.get("tokens_per_second"):
                seconds += (r["step"] + 1 - last) * self.config.tokens_per_step \
                    / r["tokens_per_second"]
                last = r["step"] + 1
        return seconds

    @property
    def processor_seconds(self) -> float:
        """Returns the processor time per step, NaN where it was not recorded.

        The first record is left out, whose step is the slowest.
        """
        found = [r for r in self.records if "processor_seconds" in r]
        steps = found[-1]["step"] - found[0]["step"] if found else 0
        return sum(r["processor_seconds"] for r in found[1:]) / steps if steps else math.nan

    @property
    def tokens(self) -> int:
        """Returns the number of training tokens."""
        return self.steps * self.config.tokens_per_step

    @cached_property
    def plan(self) -> dry_run.Plan:
        """Returns its numbers of parameters and FLOPs."""
        return dry_run.plan(self.config)

    @property
    def flops(self) -> float:
        """Returns 6 N + 12 L d T per token, and the same for the work of the estimates."""
        estimates = math.ceil(self.steps / self.config.hessian_interval)
        steps_per_estimate = self.plan.estimate_share * self.config.hessian_interval  # in cost
        return (self.steps + steps_per_estimate * estimates) * self.config.tokens_per_step \
            * self.plan.flops_per_token

    def steps_to(self, loss: float) -> int | None:
        """Returns the steps until the first evaluation at or below `loss`; None: never."""
        return next((step for step, value in self.points if value <= loss < math.inf), None)

    def mean(self, key: str, start: float = 0.0) -> float:
        """Returns the mean of a recorded number over the steps after the fraction `start` of the
        run.

        A record speaks for all the steps since the record before it.
        """
        total, steps, last = 0.0, 0, -1
        for r in self.records:
            if r.get(key) is not None:
                if r["step"] >= start * self.config.max_iters:
                    total += r[key] * (r["step"] - last)
                    steps += r["step"] - last
                last = r["step"]
        return total / steps if steps else math.nan


def run_all(specs: Sequence[RunSpec], out_dir: Path, *, jobs: int = 1, ranks: int = 1,
            report: Callable[[str], object] = print) -> list[Result]:
    """Makes every run that has not finished; returns the results in the order of the specs.

    Raises ConfigError as `check_specs` does, before the first run, and RunError where a run neither
    finishes nor diverges. On an error, and when this process is asked to stop, the runs in progress
    are asked to save and stop.
    """
    check_specs(specs, out_dir, ranks)
    threads = max(1, (os.cpu_count() or 1) // (jobs * ranks))
    processes = _Processes()

    def run_unless_stopped(spec: RunSpec) -> Result | None:
        if processes.error is not None:
            return None
        try:
            return _run(spec, out_dir / spec.name, ranks, threads, processes, report)
        except Exception as error:
            processes.stop(error)
            return None

    with _exit_on_sigterm(), ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(run_unless_stopped, spec) for spec in specs]
        try:
            results = [future.result() for future in futures]
        except BaseException as error:  # Ctrl-C and SIGTERM too
            processes.stop(error)
            raise
    if processes.error is not None:
        raise processes.error
    return results


def check_specs(specs: Sequence[RunSpec], out_dir: Path, ranks: int = 1) -> None:
    """Raises ConfigError where train.py would refuse a spec, where a spec does not train from
    scratch, where two specs share a name, or where a folder holds a run with other settings."""
    names = [spec.name for spec in specs]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two runs would share the name {min(duplicates)}: their settings differ "
                          "by less than the name shows; give values that differ more")
    for spec in specs:
        config = spec.config()
        for key, allowed in ALLOWED_VALUES.items():
            if getattr(config, key) not in allowed:
                raise ConfigError(f"{key} = {getattr(config, key)!r} is not for an experiment, "
                                  "whose runs train from scratch; leave it out", key)
        config.check_world(ranks)
        optimizers.check(config, ranks)
        folder = out_dir / spec.name
        try:
            stored = read_config(folder)
        except ConfigError:  # no run has begun there, or its first write was interrupted
            continue
        if difference := find_difference(asdict(config), stored):
            key, stored, asked = difference
            raise ConfigError(f"{folder} holds a run with other settings: {key} = {stored!r} "
                              f"there, {asked!r} here; give another --out_dir", "out_dir")


def find_difference(config: dict, stored: dict) -> tuple[str, object, object] | None:
    """Returns (key, stored value, asked value) where a run's stored settings are not those asked
    for."""
    for key, value in config.items():
        if key in stored and key not in ("out_dir", "init_from") and value != stored[key] \
                and CHOSEN_BY_TRAIN.get(key) != value:
            return key, stored[key], value
    return None


def _run(spec: RunSpec, folder: Path, ranks: int, threads: int, processes: "_Processes",
         report: Callable[[str], object]) -> Result:
    """Returns the result of a run, which it makes or continues unless it has finished."""
    if (result := _finished(spec, folder)) is not None:
        return result
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {reason(error)}; give another --out_dir",
                          "out_dir") from None
    log = _train(spec, folder, ranks, threads, processes)
    if (result := _finished(spec, folder)) is None:
        raise RunError(f"{folder} did not finish: {_reason(log)}")
    report(f"{spec.name}: loss {result.loss:.4f} after {result.config.max_iters:,} steps")
    return result


def _train(spec: RunSpec, folder: Path, ranks: int, threads: int,
           processes: "_Processes") -> str:
    """Runs train.py until it exits; returns what it printed."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    begins = "auto"
    if spec.branch and not checkpoint_folders(folder):
        begins = f"{folder.parent / spec.branch[0]}@{spec.branch[1]}"
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    append_text(folder / "log.txt", "")  # refuses a link, and makes the file
    with io.TextIOWrapper(reopen(folder / "log.txt"), errors="replace") as log:
        start = log.seek(0, os.SEEK_END)
        code = processes.start([*launch, str(ROOT / "train.py"), *spec.flags, f"--out_dir={folder}",
                                f"--init_from={begins}"], stdout=log, stderr=log,
                               env=environment).wait()
        log.seek(start)
        text = log.read()
    if code == 1 and "not finite" in text:
        (folder / "diverged").touch()
    return text


def _reason(log: str) -> str:
    """Returns the line of a log that tells why a run ended; torchrun prints more lines after it."""
    lines = log.strip().splitlines() or ["no output"]
    return next((line for line in lines if re.search(r"[eE]rror: ", line)), lines[-1])


def _finished(spec: RunSpec, folder: Path) -> Result | None:
    """Returns the result of a run that finished or diverged, None of any other."""
    result = Result(spec.name, folder, (folder / "diverged").exists())
    if result.diverged:
        return result
    try:
        last = result.records[-1]
    except (ConfigError, IndexError):
        return None
    finished = last["step"] == spec.config().max_iters - 1 and last.get("val/loss") is not None
    return result if finished else None


@dataclass
class _Processes:
    """Holds the processes of the runs in progress and, once they must stop, the error that ended
    the list."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    running: list[subprocess.Popen] = field(default_factory=list)
    error: BaseException | None = None

    def start(self, command: list[str], **options) -> subprocess.Popen:
        """Starts a process; raises the error instead where the list has ended."""
        with self.lock:
            if self.error is not None:
                raise self.error
            process = subprocess.Popen(command, **options)
            self.running.append(process)
            return process

    def stop(self, error: BaseException) -> None:
        """Asks every process to save and exit, and prevents that another one starts."""
        with self.lock:
            self.error = self.error or error
            for process in self.running:
                if process.poll() is None:
                    process.terminate()


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turns SIGTERM into SystemExit, so that the runs are stopped before this process exits."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set a handler
        return

    def handler(number, frame):
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def by_name(results: Iterable[Result]) -> dict[str, Result]:
    """Returns the results by the names of their specs."""
    return {result.name: result for result in results}


def scaled_flags(flags: tuple[str, ...], steps: int, *, keep_warmup: bool = False,
                 **settings) -> tuple[str, ...]:
    """Returns flags for a run of another length; its warm-up keeps its share of the run, or, with
    `keep_warmup`, its number of steps.

    A warm-up that is given without a length is taken to be meant for `steps`. Raises ConfigError
    where the warm-up does not fit.
    """
    config, sources = RunSpec("", flags).load()
    warmup_is_meant_for_steps = "warmup_iters" in sources and "max_iters" not in sources
    if keep_warmup or warmup_is_meant_for_steps:
        warmup = config.warmup_iters
    else:
        warmup = round(config.warmup_iters * steps / config.max_iters)
    if 0 < warmup >= steps:
        raise ConfigError(f"a warm-up of {warmup:,} steps does not fit into a run of {steps:,}; "
                          "set warmup_iters", "warmup_iters")
    values = dict(max_iters=steps, warmup_iters=warmup) | settings
    return (*flags, *(f"--{key}={value}" for key, value in values.items()))


def mean(values: Sequence[float]) -> float:
    """Returns the arithmetic mean."""
    return sum(values) / len(values)
