"""Records a run to the console, metrics.jsonl and trackers; peak FLOP/s by device.

metrics.jsonl in the run's folder has one JSON object a line, in the order of `step`. A recorder
that fails warns once and never stops training.
"""

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from nanosophia.distributed import full_tensor, sum_over_ranks, widest_float
from nanosophia.files import append_text, read_bytes, write_text
from nanosophia.schemas import Record, parse
from nanosophia.trackers import Tracker

# Peak in FLOP/s by a part of torch's device name, from NVIDIA's data sheets: products of bfloat16
# (V100 and T4, which have none: float16) without sparsity, summed in float32.
PEAK_FLOPS = {"B200": 2250e12, "H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
              "A6000": 154.8e12, "A5000": 111.1e12, "A10": 125e12, "L4": 121e12,
              "RTX 4090": 165.2e12, "RTX 3090": 71e12, "V100": 125e12, "T4": 65e12}


def peak_flops(device_name: str) -> float | None:
    """Returns the peak of the named device, or None when it is not in the table."""
    return next((flops for name, flops in PEAK_FLOPS.items() if re.search(
        rf"\b{name}\b(?! (Ti|SUPER|D|Laptop))", device_name)), None)


class Clock:
    """Counts steps and seconds of training in this process, without the time in `paused()`.

    Seconds come in pairs: of wall time, and of processor time of all threads.
    """

    def __init__(self, done: int):
        self.done, self.start = done, self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves out the time that the context takes."""
        began = self._now()
        yield
        wall, processor = (s + now - b for s, now, b in
                           zip(self.start, self._now(), began, strict=True))
        self.start = wall, processor

    def read(self, done: int) -> tuple[int, float, float]:
        """Returns steps and both seconds since the last reading, when `done` steps are done."""
        now = self._now()
        found = done - self.done, now[0] - self.start[0], now[1] - self.start[1]
        self.start, self.done = now, done
        return found


def measure(run, step: int, lr: float, loss: Tensor, grad_norm: Tensor, clock: Clock) -> dict:
    """Returns the metrics of a logging step of train.py's `run`, read in one host sync."""
    world_size, device = run.ranks.world_size, run.ranks.device
    if world_size > 1:
        sum_over_ranks([loss])
    measured = {"train/loss": loss / world_size, "grad_norm": grad_norm,
                "norm_clip_rate": run.counters.clipped / run.counters.steps}
    if run.loss_scale.dynamic:
        measured["loss_scale"] = run.loss_scale.value
    if hasattr(run.optimizer, "statistics"):
        measured |= {key: full_tensor(x) for key, x in run.optimizer.statistics().items()}
    wide = widest_float(device)
    values = torch.cat([torch.stack([value.to(wide) for value in measured.values()]),
                        run.guard.report.to(wide)]).tolist()  # sync
    record, report = dict(zip(measured, values, strict=False)), values[len(measured):]
    run.guard.raise_if_tripped(report)
    if report[0]:
        record["refused"] = int(report[0])
    run.counters.clipped.zero_()
    run.counters.steps = 0
    steps, seconds, processor_seconds = clock.read(step + 1)
    tokens_per_step = run.config.tokens_per_step
    record |= dict(data_wait_fraction=run.batches.seconds_waited / seconds, lr=lr,
                   tokens=(step + 1) * tokens_per_step,
                   tokens_per_second=steps * tokens_per_step / seconds,
                   processor_seconds=processor_seconds)
    run.batches.seconds_waited = 0.0
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak:
        record["mfu"] = (record["tokens_per_second"] * run.model.flops_per_token()
                         / (peak * world_size))
    return record


class Recorder:
    """Shows and stores the records of one run; on ranks other than 0 every method does nothing."""

    def __init__(self, out_dir: Path, *, first_step: int, max_iters: int, active: bool,
                 trackers: dict[str, Callable[[], Tracker]] | None = None,
                 health: "Health | None" = None):
        """Drops stored records from `first_step` on: they will be rewritten.

        `trackers` are what starts each, by name. `health` turns records into warnings.
        """
        self.active, self.health = active, health
        if not active:
            return
        self.path = out_dir / "metrics.jsonl"
        self.on_terminal = sys.stderr.isatty()
        self.failed = set()
        self.bar = tqdm(total=max_iters, initial=first_step, unit="step", disable=not
                        self.on_terminal, dynamic_ncols=True)
        self._attempt("metrics.jsonl", self._forget_from, first_step)
        self.trackers = {name: tracker for name, start in (trackers or {}).items()
                         if (tracker := self._attempt(name, start)) is not None}

    def record(self, record: dict) -> None:
        """Stores one step's numbers; None values are left out."""
        if not self.active:
            return
        record = {k: v for k, v in record.items() if v is not None}
        finite = {k: v if math.isfinite(v) else None for k, v in record.items()}  # JSON has no NaN
        self._attempt("metrics.jsonl", append_text, self.path, json.dumps(finite) + "\n")
        for name, tracker in self.trackers.items():
            self._attempt(name, tracker.log, record)
        if self.on_terminal:
            self.bar.update(record["step"] + 1 - self.bar.n)
            self.bar.set_postfix_str(_brief(record))
        if not self.on_terminal or "val/loss" in record:
            self.say(_line(record))
        for warning in self.health.warnings(record) if self.health else ():
            self.say(f"warning: step {record['step']}: {warning}")

    def say(self, text: str) -> None:
        """Prints a line without breaking the progress bar."""
        if self.active:
            try:
                with tqdm.external_write_mode(file=sys.stdout):
                    print(text, flush=True)
            except BrokenPipeError:  # whoever reads has seen enough
                raise
            except OSError as error:
                self._give_up("standard output", error)

    def close(self) -> None:
        """Ends the bar and the trackers."""
        if self.active:
            self.bar.close()
            for name, tracker in self.trackers.items():
                self._attempt(name, tracker.close)

    def _forget_from(self, step: int) -> None:
        if self.path.exists():
            *lines, _ = read_bytes(self.path).decode(errors="replace").split("\n")
            write_text(self.path, "".join(f"{line}\n" for line in lines if _step_of(line) < step))

    def _attempt(self, what: str, action, *args, **kwargs):
        if what in self.failed:
            return None
        try:
            return action(*args, **kwargs)
        except Exception as error:  # whatever a logger does, training goes on
            self._give_up(what, error)
            return None

    def _give_up(self, what: str, error: Exception) -> None:
        if what not in self.failed:
            self.failed.add(what)
            with contextlib.suppress(OSError):
                print(f"warning: recording to {what} failed and is off from now on: {error}",
                      file=sys.stderr, flush=True)


class Health:
    """Warns when a second-order run leaves its healthy range, once per kind of warning."""

    PATIENCE = 20  # consecutive records outside 10-50 %, after warm-up, before the warning

    def __init__(self, warmup_iters: int, hessian_interval: int, *, fixed_gamma: bool):
        """`fixed_gamma`: gamma is a setting, and not controlled towards a target of its own."""
        self.warmup_iters, self.hessian_interval = warmup_iters, hessian_interval
        self.fixed_gamma = fixed_gamma
        self.warned, self.outside = set(), 0
        self.norm, self.since = None, 0  # of the last record's h, and the first step that had it

    def warnings(self, record: dict) -> list[str]:
        """Returns the new warnings for this record, whose keys are those of Sophia.statistics."""
        found = {}
        if "hessian_norm" in record:
            if not math.isfinite(record["hessian_norm"]):
                found["finite"] = ("the curvature h is not finite; an estimate overflowed: look at "
                                   "the loss of that step, or resume from an earlier checkpoint")
            elif record["hessian_norm"] == 0:
                found["zero"] = ("the curvature h is still zero, so every step is a sign step; is "
                                 "hessian_interval right, and do estimates reach the optimizer?")
            elif record["hessian_norm"] != self.norm:
                self.norm, self.since = record["hessian_norm"], record["step"]
            elif record["step"] - self.since > 2 * self.hessian_interval:
                found["still"] = (f"the curvature h has not changed since step {self.since}; do "
                                  "estimates still reach the optimizer?")
        found |= self._gamma(record)
        new = {key: text for key, text in found.items() if key not in self.warned}
        self.warned |= new.keys()
        return list(new.values())

    def _gamma(self, record: dict) -> dict[str, str]:
        fraction = record.get("unclipped_fraction")
        if fraction is None or not self.fixed_gamma or record["step"] < self.warmup_iters:
            return {}
        self.outside = 0 if 0.1 <= fraction <= 0.5 else self.outside + 1
        if self.outside < self.PATIENCE:
            return {}
        advice = "lower" if fraction > 0.5 else "raise"
        return {advice: f"{fraction:.0%} of the coordinates are unclipped, for {self.PATIENCE} "
                        f"records now; the paper's range is 10-50 %: {advice} gamma"}


def read_records(path: Path) -> list[dict]:
    """Returns the records of a metrics.jsonl, without a last line that a kill cut off.

    Raises OSError when it cannot be read, ValueError naming the line that is no record.
    """
    *lines, _ = read_bytes(path).split(b"\n")
    records = []
    for number, line in enumerate(lines, 1):
        try:
            records.append(parse(line, Record))
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from None
    return records


def _step_of(line: str) -> float:
    try:
        return parse(line.encode(), Record)["step"]
    except ValueError:
        return math.inf


def _brief(record: dict) -> str:
    parts = [f"loss {record['train/loss']:.3f}"] if "train/loss" in record else []
    if "tokens_per_second" in record:
        parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(parts)


_FORMATS = {"train/loss": "loss {:.4f}", "val/loss": "val loss {:.4f}", "lr": "lr {:.2e}",
            "grad_norm": "|g| {:.3f}", "unclipped_fraction": "unclipped {:.0%}",
            "hellaswag/normalised": "HellaSwag {:.1%}", "refused": "refused {:.0f}",
            "tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}"}


def _line(record: dict) -> str:
    shown = [form.format(record[key]) for key, form in _FORMATS.items() if key in record]
    return f"step {record['step']}: " + ", ".join(shown)
