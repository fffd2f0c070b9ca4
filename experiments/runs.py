"""Lists of training runs, carried out one after the other or side by side, and read again.

What every experiment here is made of: a `Cell` is a name and train.py's own flags; `carry_out` runs
`train.py` for each that has not finished yet, in OUT/NAME, so that an interrupted list goes on
where it stopped; a `Result` is what a finished run says of itself. A run that diverges (train.py
ends with 1) is a result too: its loss is infinite.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import dry_run
from configurator import Config, ConfigError, Settings, knob, load
from experiments.plot import read_config, read_metrics
from optimizers import with_own_defaults

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class RunSettings(Settings):
    """What every command that carries out runs is asked."""

    out_dir: str = knob("out/experiment", "folder that receives the runs, a table and pictures",
                        section="runs")
    flags: str = knob("", "train.py's flags for every run, e.g. \"--dataset=mine --compile=off\"")
    jobs: int = knob(1, "runs at the same time; the processor's cores are shared out", low=1)
    nproc_per_node: int = knob(1, "ranks of each run, under torchrun", low=1)

    def carry_out(self, cells: Iterable["Cell"]) -> list["Result"]:
        """`carry_out` as these settings ask."""
        extra = tuple(self.flags.split())
        return carry_out([Cell(c.name, (*c.flags, *extra)) for c in cells], Path(self.out_dir),
                         jobs=self.jobs, ranks=self.nproc_per_node)


@dataclass(frozen=True)
class Cell:
    """One run: its folder's name and train.py's arguments, without --out_dir and --init_from."""

    name: str
    flags: tuple[str, ...]

    def config(self) -> Config:
        """The resolved settings; raises ConfigError."""
        return with_own_defaults(*load(Config, list(self.flags), "train.py"))


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
        return self.tokens * self.plan.flops_per_token * (1 + self.plan.estimate_share)

    def steps_to(self, loss: float) -> int | None:
        """Steps until the first evaluation at or below this loss; None: never."""
        return next((step for step, found in self.points if found <= loss < math.inf), None)

    def mean(self, key: str, first: float = 0.0) -> float:
        """Of a recorded number, over the records after this fraction of the run."""
        found = [r[key] for r in self.records
                 if r.get(key) is not None and r["step"] >= first * self.config.max_iters]
        return sum(found) / len(found) if found else math.nan


def carry_out(cells: Sequence[Cell], out_dir: Path, *, jobs: int = 1, ranks: int = 1,
              say: Callable[[str], object] = print) -> list[Result]:
    """Results of the cells in their order; runs those that have none yet.

    Raises ConfigError before the first run where a cell's settings are wrong, two cells share a
    name, or a folder holds another run; RuntimeError where a run ended otherwise than by finishing
    or diverging.
    """
    names = [cell.name for cell in cells]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ConfigError(f"two runs would share the name {min(twice)}; their settings are too "
                          "close to each other")
    for cell in cells:
        cell.config()
        held = _flags_of(out_dir / cell.name)
        if held is not None and held != list(cell.flags):
            raise ConfigError(f"{out_dir / cell.name} holds a run with other settings "
                              f"({' '.join(held)}); give another --out_dir", "out_dir")
    threads = max(1, (os.cpu_count() or 1) // (jobs * ranks))

    def one(cell: Cell) -> Result:
        folder = out_dir / cell.name
        if (found := _finished(cell, folder)) is None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "cell.json").write_text(json.dumps(list(cell.flags)))
            except OSError as error:
                raise ConfigError(f"cannot write to {folder}: {error.strerror}; give another "
                                  "--out_dir", "out_dir") from None
            _run(cell, folder, ranks, threads)
            found = _finished(cell, folder)
            if found is None:
                log = (folder / "log.txt").read_text(errors="replace").strip().splitlines()
                raise RuntimeError(f"{folder} did not finish: {log[-1] if log else 'no output'}")
            say(f"{cell.name}: loss {found.loss:.4f} after {found.config.max_iters:,} steps")
        return found

    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(one, cell) for cell in cells]
        try:
            return [future.result() for future in futures]
        except BaseException:
            for future in futures:
                future.cancel()
            raise


def _flags_of(folder: Path) -> list[str] | None:
    """The flags of the run that a folder holds; None where none was begun."""
    try:
        return json.loads((folder / "cell.json").read_text())
    except (OSError, ValueError):  # a write that was interrupted
        return None


def _run(cell: Cell, folder: Path, ranks: int, threads: int) -> None:
    launch = [sys.executable]
    if ranks > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
    environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
    with open(folder / "log.txt", "w") as log:
        code = subprocess.run([*launch, "train.py", *cell.flags, f"--out_dir={folder.resolve()}",
                               "--init_from=auto"], cwd=ROOT, stdout=log, stderr=log,
                              env=environment).returncode
    if code == 1 and "not finite" in (folder / "log.txt").read_text(errors="replace"):
        (folder / "diverged").touch()


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


def scaled(flags: tuple[str, ...], steps: int, **settings) -> tuple[str, ...]:
    """Arguments for a run of another length: its warm-up keeps its share of the run."""
    config = Cell("", flags).config()
    warmup = round(config.warmup_iters * steps / config.max_iters)
    values = dict(max_iters=steps, warmup_iters=warmup) | settings
    return (*flags, *(f"--{key}={value}" for key, value in values.items()))


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)
