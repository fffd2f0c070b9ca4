"""A training process with a fault built in, forked from one that has torch loaded already.

Also a command: `python -m tests.faults.child --fault=KIND:VALUE:STEP:RANK [train.py's flags]`.
"""

import multiprocessing
import os
import signal
import sys
from pathlib import Path

import torch

import train

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["tests.faults.child"])


def start(argv: list[str], log: Path) -> multiprocessing.Process:
    """train.py with these flags in a process of its own, whose output goes to `log`."""
    process = _server.Process(target=_run, args=(argv, str(log)))
    process.start()
    return process


def _run(argv: list[str], log: str) -> None:
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    train.main(argv)


def inject(kind: str, value: str, step: str, rank: str) -> None:
    """Makes one rank's loss, gradient or hhat `value` (nan, inf) in one step, or stops it there."""
    now = None
    poison = float(value)
    mine = os.environ.get("RANK", "0") == rank
    original_step, original_forward = train.train_step, train.GPT.forward
    original_clip = torch.nn.utils.clip_grad_norm_
    original_curvature = train.update_curvature

    def train_step(run, t):
        nonlocal now
        now = t
        if hit("stop"):
            os.kill(os.getpid(), signal.SIGUSR1)
        return original_step(run, t)

    def hit(what: str) -> bool:
        return mine and kind == what and now == int(step)

    def forward(self, idx, targets=None, caches=None, sample_labels_fn=None):
        out = original_forward(self, idx, targets, caches, sample_labels_fn)
        trains = targets is not None and sample_labels_fn is None and self.training
        return out * poison if trains and hit("loss") else out

    def clip(parameters, *args, **kwargs):
        parameters = list(parameters)
        if hit("gradient"):
            parameters[0].grad.view(-1)[0] = poison
        return original_clip(parameters, *args, **kwargs)

    def update_curvature(run, t):
        estimator = run.estimator

        def estimate(*args):
            found = estimator.estimate(*args)
            found[0].view(-1)[0] = poison
            return found

        if hit("hhat"):
            run.estimator = estimator._replace(estimate=estimate)
        original_curvature(run, t)
        run.estimator = estimator

    train.train_step, train.GPT.forward = train_step, forward
    torch.nn.utils.clip_grad_norm_ = clip
    train.update_curvature = update_curvature


if __name__ == "__main__":
    if sys.argv[1].startswith("--fault="):
        inject(*sys.argv.pop(1).removeprefix("--fault=").split(":"))
    torch.set_num_threads(1)
    train.main(sys.argv[1:])
