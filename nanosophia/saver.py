"""Saves a run's checkpoints in a thread while training goes on; the last one must succeed."""

import os
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from torch import Tensor

from nanosophia import checkpoint
from nanosophia.checkpoint import (
    TEMPORARY,
    CheckpointError,
    checkpoint_folders,
    load_latest,
    missing_parts,
)
from nanosophia.distributed import Ranks, host_copy, new_gloo_group, on_main
from nanosophia.files import remove

FAILURES_ALLOWED = 2  # in a row, while an older checkpoint is there
# Seconds between attempts at the last save; torchrun kills the ranks 30 s after a signal.
RETRY_PAUSES = (1.0, 2.0, 4.0, 8.0)
SLOW_SAVE = 20.0  # seconds, beyond which a signal under torchrun may come too late


class SaveError(CheckpointError):
    """The save that ends a run failed; the message says which checkpoint is the newest one."""

    exit_code = 1


class Saver:
    """Saves the checkpoints of one run; training goes on while a thread writes.

    Every rank makes one, calls `save` at the same steps, and `finish` after the last.
    """

    def __init__(self, out_dir: Path, ranks: Ranks, *, keep: int, keep_best: bool, sharded: bool):
        """Keeps the `keep` newest checkpoints and, with `keep_best`, the one whose
        state["val_loss"] is lowest. With `sharded` each rank passes its part of the tensors."""
        self.out_dir, self.ranks, self.keep, self.keep_best = out_dir, ranks, keep, keep_best
        self.sharded = sharded and ranks.world_size > 1
        self.group = new_gloo_group() if self.sharded else None  # of the writer threads
        self.seconds_blocked = self.seconds_written = 0.0  # of the last save
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future | None = None
        self._buffers: dict[str, Tensor] = {}  # in host memory, from one save to the next
        self._last: tuple[dict, dict, dict] | None = None  # what was saved last, to try again
        self._failures, self._warned_slow = 0, False
        if ranks.is_main:
            for left in out_dir.glob(f"step_*{TEMPORARY}"):  # of a run that was killed
                remove(left)

    def save(self, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict) -> None:
        """Copies the state to host memory and starts to write the checkpoint of state["step"].

        Waits for the save before. If that failed, the failure is reported; at the third in a row,
        or when there is no older checkpoint, CheckpointError is raised on every rank.
        """
        self.wait()
        began = time.perf_counter()
        if self.sharded or self.ranks.is_main:
            model, optimizer = (host_copy(x, self._buffers) for x in (model, optimizer))
        self._last = (model, optimizer, state)
        self._submit()
        self.seconds_blocked = time.perf_counter() - began

    def _submit(self) -> None:
        self._pending = self._thread.submit(self._write, *self._last) \
            if self.sharded or self.ranks.is_main else Future()

    def wait(self) -> None:
        """Waits for the save in progress; raises as `save` does."""
        error, older = self._outcome()
        if not error:
            self._failures = 0
            if (self.seconds_written > SLOW_SAVE and not self._warned_slow and self.ranks.is_main
                    and "TORCHELASTIC_RUN_ID" in os.environ):
                self._warned_slow = True
                print(f"warning: a save took {self.seconds_written:.0f} s; torchrun kills its "
                      "ranks 30 s after a signal, so a longer --shutdown-timeout is safer",
                      file=sys.stderr, flush=True)
            return
        self._failures += 1
        if self._failures > FAILURES_ALLOWED or not older:
            times = f"{self._failures} times in a row" if older else "the first of the run"
            raise SaveError(f"{error} ({times}, so training stops); {self._describe_newest()}")
        if self.ranks.is_main:
            print(f"warning: {error}; earlier checkpoints are intact, training goes on",
                  file=sys.stderr, flush=True)

    def _outcome(self) -> tuple[str, bool]:
        """Waits for the save in progress; returns its error, if any, and whether others exist."""
        if self._pending is None:
            return "", True
        pending, self._pending = self._pending, None

        def outcome() -> tuple[float, str, bool]:
            try:
                return pending.result(), "", True
            except CheckpointError as error:
                return 0.0, str(error), bool(checkpoint_folders(self.out_dir))

        self.seconds_written, error, older = on_main(self.ranks, outcome)
        return error, older

    def finish(self) -> None:
        """Waits for the run's last save, which must succeed, and reads its manifest back.

        A failed one is tried again after each of RETRY_PAUSES, with a warning. Raises SaveError, on
        every rank, when the last attempt fails.
        """
        step = self._last[2]["step"] if self._last else None
        for pause in (*RETRY_PAUSES, None):
            error, _ = self._outcome()
            if not error and step is not None:
                error = on_main(self.ranks, lambda: missing_parts(self.out_dir, step))
            if not error:
                return
            if pause is None:
                raise SaveError(f"{error}; {len(RETRY_PAUSES) + 1} attempts failed, "
                                f"{self._describe_newest()}")
            if self.ranks.is_main:
                print(f"warning: {error}; the last save is tried again in {pause:g} s",
                      file=sys.stderr, flush=True)
            time.sleep(pause)
            self._submit()

    def _describe_newest(self) -> str:
        return on_main(self.ranks, lambda: _describe_newest(self.out_dir))

    def close(self) -> None:
        """Waits for this rank's thread."""
        self._thread.shutdown()

    def _write(self, model: dict, optimizer: dict, state: dict) -> float:
        began = time.perf_counter()
        try:
            checkpoint.save(self.out_dir, model, optimizer, state, self.keep,
                            keep_best=self.keep_best, group=self.group,
                            ranks=self.ranks if self.sharded else None)
        except CheckpointError:
            raise
        except Exception as error:  # every rank must hear of it, or the others wait for ever
            raise CheckpointError(f"checkpoint of step {state['step']}: {error!r}") from error
        return time.perf_counter() - began


def _describe_newest(out_dir: Path) -> str:
    try:
        found = load_latest(out_dir)
    except CheckpointError as error:
        return str(error)
    if found is None:
        return f"there is no checkpoint in {out_dir}"
    return f"the newest checkpoint is {found.folder}, of step {found.state['step']}"
