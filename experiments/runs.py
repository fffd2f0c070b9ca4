"""Lists of training runs, carried out one after the other or side by side, and read again.

What every experiment here is made of: a `Cell` is a name and train.py's own flags; `carry_out` runs
`train.py` for each that has not finished yet, in OUT/NAME, so that an interrupted list goes on
where it stopped; a `Result` is what a finished run says of itself. A run that diverges (train.py
ends with 1) is a result too: its loss is infinite.
"""

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
from nanosophia.configurator import ConfigError, Settings, UserError, knob, load
from nanosophia.options import Config


class RunError(UserError):
    """A run ended without a result; the message names its folder and the reason."""


ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What every command that carries out runs is asked."""

    out_dir: str = knob("out/experiment", "folder that receives the runs, a table and pictures",
                        section="runs")
    flags: str = knob("", "train.py's flags for every run, e.g. \"--dataset=mine --compile=off\"; "
                          "what the experiment itself sets, it sets after them")
    jobs: int = knob(1, "runs at the same time; the processor's cores are shared out", low=1)
    nproc_per_node: int = knob(1, "ranks of each run, under torchrun", low=1)

    def check(self) -> None:
        try:
            shlex.split(self.flags)
        except ValueError as error:
            raise ConfigError(f"flags = {self.flags!r}: {error}", "flags") from None

    @property
    def extra(self) -> tuple[str, ...]:
        """The flags for every run."""
        return tuple(shlex.split(self.flags))

    def check_cells(self, cells: Iterable["Cell"]) -> None:
        """`check_cells` as these settings ask."""
        check_cells(list(cells), Path(self.out_dir), self.nproc_per_node)

    def carry_out(self, cells: Iterable["Cell"]) -> list["Result"]:
        """`carry_out` as these settings ask."""
        return carry_out(list(cells), Path(self.out_dir), jobs=self.jobs,
                         ranks=self.nproc_per_node)


@dataclass(frozen=True)
class Cell:
    """One run: its folder's name and train.py's arguments, without --out_dir and --init_from."""

    name: str
    flags: tuple[str, ...]

    def load(self) -> tuple[Config, dict[str, str]]:
        """The resolved settings, and where each given key came from; raises ConfigError."""
        config, given = load(Config, list(self.flags), "train.py")
        return optimizers.with_own_defaults(config, given), given

    def config(self) -> Config:
        """The resolved settings; raises ConfigError."""
        return self.load()[0]


@dataclass(frozen=True)
class Result:
    """A finished run."""

    name: str
    folder: Path
    diverged: bool

    @cached_property
    def records(self) -> list[dict]:
        """Its metrics.jsonl; empty where it diverged before the first."""
        return read_metrics(self.folder) if (self.folder / "metrics.jsonl").exists() else []

    @cached_property
    def config(self) -> Config:
        """Its settings."""
        return Config(**read_config(self.folder))

    @property
    def loss(self) -> float:
        """Final validation loss in nats; infinite where the run diverged."""
        return math.inf if self.diverged else self.records[-1]["val/loss"]

    @property
    def points(self) -> list[tuple[int, float]]:
        """(steps done, validation loss) of every evaluation that was finite."""
        return [(r["step"] + 1, r["val/loss"]) for r in self.records
                if r.get("val/loss") is not None]

    @property
    def steps(self) -> int:
        """Done, which are fewer than asked for where the run diverged."""
        return self.records[-1]["step"] + 1 if self.records else 0

    @property
    def seconds(self) -> float:
        """Of training, evaluations and saves left out."""
        times, last = 0.0, 0
        for r in self.records:
            if r.get("tokens_per_second"):
                times += (r["step"] + 1 - last) * self.config.tokens_per_step \
                    / r["tokens_per_second"]
                last = r["step"] + 1
        return times

    @property
    def tokens(self) -> int:
        """Seen in training."""
        return self.steps * self.config.tokens_per_step

    @cached_property
    def plan(self) -> dry_run.Plan:
        """Its parameters and FLOPs."""
        return dry_run.plan(self.config)

    @property
    def flops(self) -> float:
        """6 N + 12 L d T per token, and the estimates'."""
        estimates = math.ceil(self.steps / self.config.hessian_interval)
        worth = self.plan.estimate_share * self.config.hessian_interval  # steps per estimate
        return (self.steps + worth * estimates) * self.config.tokens_per_step \
            * self.plan.flops_per_token

    def steps_to(self, loss: float) -> int | None:
        """Steps until the first evaluation at or below this loss; None: never."""
        return next((step for step, found in self.points if found <= loss < math.inf), None)

    def mean(self, key: str, first: float = 0.0) -> float:
        """Of a recorded number, over the steps after this fraction of the run.

        A record counts for the steps since the one before it.
        """
        total, steps, last = 0.0, 0, -1
        for r in self.records:
            if r.get(key) is not None:
                if r["step"] >= first * self.config.max_iters:
                    total += r[key] * (r["step"] - last)
                    steps += r["step"] - last
                last = r["step"]
        return total / steps if steps else math.nan


def carry_out(cells: Sequence[Cell], out_dir: Path, *, jobs: int = 1, ranks: int = 1,
              say: Callable[[str], object] = print) -> list[Result]:
    """Results of the cells in their order; runs those that have none yet.

    Raises ConfigError before the first run as `check_cells` does; RunError where a run ended
    otherwise than by finishing or diverging. Runs that are going on then, or when this process is
    asked to stop, are asked to save and stop.
    """
    check_cells(cells, out_dir, ranks)
    threads = max(1, (os.cpu_count() or 1) // (jobs * ranks))
    going = _Going()

    def one(cell: Cell) -> Result:
        folder = out_dir / cell.name
        if (found := _finished(cell, folder)) is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ConfigError(f"cannot write to {folder}: {error.strerror}; give another "
                                  "--out_dir", "out_dir") from None
            log = _run(cell, folder, ranks, threads, going)
            found = _finished(cell, folder)
            if found is None:
                raise RunError(f"{folder} did not finish: {_reason(log)}")
            say(f"{cell.name}: loss {found.loss:.4f} after {found.config.max_iters:,} steps")
        return found

    def one_unless_stopped(cell: Cell) -> Result | None:
        if going.error is not None:
            return None
        try:
            return one(cell)
        except Exception as error:
            going.stop(error)
            return None

    with _sigterm_raises(), ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one_unless_stopped, cell) for cell in cells]
        try:
            results = [future.result() for future in futures]
        except BaseException as stopped:
            going.stop(stopped)
            raise
    if going.error is not None:
        raise going.error
    return results


SET_HERE = dict(init_from=("scratch", "auto"), eval_only=(False,), dry_run=(False,))


def check_cells(cells: Sequence[Cell], out_dir: Path, ranks: int = 1) -> None:
    """Raises ConfigError where a cell's settings are wrong or not a training run's, two cells share
    a name, or a folder holds a run with other settings."""
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two runs would share the name {min(twice)}; their settings are too "
                          "close to each other")
    for cell in cells:
        config = cell.config()
        for key, allowed in SET_HERE.items():
            if getattr(config, key) not in allowed:
                raise ConfigError(f"{key} = {getattr(config, key)!r} is not for an experiment, "
                                  "whose runs train from scratch or go on; leave it out", key)
        config.check_world(ranks)
        optimizers.check(config, ranks)
        folder = out_dir / cell.name
        other = _differs(asdict(config), folder)
        if other is not None:
            key, held, asked = other
            raise ConfigError(f"{folder} holds a run with other settings: {key} = {held!r} there, "
                              f"{asked!r} here; give another --out_dir", "out_dir")


def _differs(asked: dict, folder: Path) -> tuple[str, object, object] | None:
    """(key, value there, value asked) of a setting in which the run that a folder holds differs."""
    try:
        held = read_config(folder)
    except ConfigError:  # none was begun, or its first write was interrupted
        return None
    derived = {"vocab_size": 0, "dtype": "auto"}  # what stands for train.py's choice
    for key, value in asked.items():
        if key in held and key not in ("out_dir", "init_from") and value != held[key] \
                and derived.get(key) != value:
            return key, held[key], value
    return None


@dataclass
class _Going:
    """The processes of the runs that are going on, and why they shall not."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    processes: list[subprocess.Popen] = field(default_factory=list)
    error: BaseException | None = None

    def start(self, command: list[str], **more) -> subprocess.Popen:
        with self.lock:
            if self.error is not None:
                raise self.error
            process = subprocess.Popen(command, **more)
            self.processes.append(process)
            return process

    def stop(self, error: BaseException) -> None:
        """Asks them to save and end; none starts any more."""
        with self.lock:
            self.error = self.error or error
            for process in self.processes:
                if process.poll() is None:
                    process.terminate()


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM ends this process by an exception, so that its runs are stopped first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number, frame):
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(cell: Cell, folder: Path, ranks: int, threads: int, going: _Going) -> str:
    """Runs train.py to its end; what it printed."""
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    with open(folder / "log.txt", "a+", errors="replace") as log:
        begin = log.seek(0, os.SEEK_END)
        code = going.start([*launch, "train.py", *cell.flags, f"--out_dir={folder.resolve()}",
                            "--init_from=auto"], cwd=ROOT, stdout=log, stderr=log,
                           env=environment).wait()
        log.seek(begin)
        text = log.read()
    if code == 1 and "not finite" in text:
        (folder / "diverged").touch()
    return text


def _reason(log: str) -> str:
    """The line of a log that says why a run ended; under torchrun more lines follow it."""
    lines = log.strip().splitlines() or ["no output"]
    return next((line for line in lines if re.search(r"[eE]rror: ", line)), lines[-1])


def _finished(cell: Cell, folder: Path) -> Result | None:
    result = Result(cell.name, folder, (folder / "diverged").exists())
    if result.diverged:
        return result
    try:
        last = result.records[-1]
    except (ConfigError, IndexError):
        return None
    ended = last["step"] == cell.config().max_iters - 1 and last.get("val/loss") is not None
    return result if ended else None


def by_name(results: Iterable[Result]) -> dict[str, Result]:
    """The results by their cells' names."""
    return {result.name: result for result in results}


def scaled(flags: tuple[str, ...], steps: int, *, keep_warmup: bool = False,
           **settings) -> tuple[str, ...]:
    """Arguments for a run of another length: its warm-up keeps its share of the run, or its steps.

    Flags that give a warm-up and no length are taken as written for this one. Raises ConfigError
    where the warm-up does not fit.
    """
    config, given = Cell("", flags).load()
    written_for = config.max_iters if "max_iters" in given or "warmup_iters" not in given else steps
    warmup = config.warmup_iters if keep_warmup else round(
        config.warmup_iters * steps / written_for)
    if 0 < warmup >= steps:
        raise ConfigError(f"a warm-up of {warmup:,} steps does not fit into a run of {steps:,}; "
                          "set warmup_iters", "warmup_iters")
    values = dict(max_iters=steps, warmup_iters=warmup) | settings
    return (*flags, *(f"--{key}={value}" for key, value in values.items()))


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
