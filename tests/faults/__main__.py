"""Runs every test marked `trial`, the slow ones too, and writes the table of what survived.

    python -m tests.faults [--out=results/reliability.md]
"""

import platform
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

FAULTS = {
    1: "none: the same run twice, on 1 and on 2 ranks",
    2: "stop around an estimate and an evaluation, resume; every optimizer",
    3: "kill -9 at random moments and during saves until done; 1 rank, 2 ranks, 2 with shards",
    4: "a save cut off at each write, fsync, rename and removal",
    5: "SIGTERM, SIGUSR1, SIGINT; to the process, to one rank, to torchrun",
    6: "truncated, bit-flipped, missing, swapped and stray checkpoint files",
    7: "a disk that is full or refuses; a file or a folder in use as out_dir",
    8: "NaN and Inf in loss, gradient and estimate, on one rank",
    9: "wrong, changed, odd-sized, empty, short and out-of-range data",
    10: "a rank killed under torchrun --max-restarts=3",
    11: "1 -> 2 -> 1 ranks, whole and sharded; a number that does not divide",
    12: "code in a pickle, in a config file",
    13: "unknown, mistyped, negative, empty and malformed settings",
    14: "preparation killed at random moments, 1 and 2 processes; cut off at every call",
    15: "none: the losses of 50 steps as they were once measured",
    16: "files that cannot be read; planted links, pipes and devices; a quarantine in error",
    17: "settings in files edited by hand, with valid checksums",
    18: "odd arguments, environments, inputs and outputs; Ctrl-C at any moment of any command",
    19: "exports over other files; an export killed at random moments, cut off at every call",
}


class TrialCounts:
    """A pytest plugin that adds up the trials of each row."""

    def __init__(self):
        self.trials, self.failures, self.differing = Counter(), Counter(), Counter()
        self.skipped, self.rows, self.notes = [], {}, []

    def pytest_collection_modifyitems(self, items):
        """Keeps the marked tests, and says which row each belongs to."""
        items[:] = [item for item in items if item.get_closest_marker("trial")]
        self.rows = {item.nodeid: item.get_closest_marker("trial").args[0] for item in items}

    def pytest_runtest_logreport(self, report):
        """Counts one test: what it recorded, or one trial."""
        row, recorded = self.rows[report.nodeid], dict(report.user_properties)
        if report.skipped:
            self.skipped.append(f"{report.nodeid}: {report.longrepr[-1]}")
        elif report.when == "call":
            self.trials[row] += recorded.get("trials", 1)
            self.failures[row] += recorded.get("failures", int(report.failed))
            self.differing[row] += recorded.get("differing", 0)
            if recorded.get("failures"):
                name = report.nodeid.partition("[")[2].rstrip("]") or report.nodeid
                self.notes.append(f"Row {row}, {name}: {recorded['failures']} of "
                                  f"{recorded['trials']} failed.")
        elif report.failed:
            self.failures[row] += 1

    def table(self, seconds: float, command: str) -> str:
        """The page."""
        lines = [
            "# What was survived", "",
            f"`{command}` on {platform.machine()}, 2 threads, torch {torch.__version__}, gloo, in "
            f"{seconds / 60:.0f} minutes. The model has 2 layers x 64 and a context of 64. A loss "
            "differs when it is not the same number to the last bit.", "",
            "| # | fault | trials | failures | differing losses |", "|---|---|---|---|---|"]
        lines += [f"| {row} | {fault} | {self.trials[row]} | {self.failures[row]} | "
                  f"{self.differing[row]} |" for row, fault in FAULTS.items()]
        lines += [f"| | **all** | {self.trials.total()} | {self.failures.total()} | "
                  f"{self.differing.total()} |"]
        lines += ["", *self.notes, *(f"Skipped: {text}" for text in self.skipped)]
        return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str]) -> int:
    """The command; pytest's exit code."""
    out = Path(argv[0].removeprefix("--out=") if argv else "results/reliability.md")
    counts, began = TrialCounts(), time.monotonic()
    code = pytest.main(["-m", "trial", "-p", "no:cacheprovider"], plugins=[counts])
    out.write_text(counts.table(time.monotonic() - began, "python -m tests.faults"))
    print(out.read_text())
    return int(code)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
