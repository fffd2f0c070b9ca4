"""What Apple's GPUs lack, looked for on the CPU: float64, and a host that waits for its copies.

No such GPU was at hand. What a step computes on the device is computed here on the CPU, and every
operation is looked at.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from nanosophia import hellaswag, metrics
from nanosophia.distributed import host_copy, widest_float
from nanosophia.metrics import Clock, measure
from nanosophia.optimizer_state import flatten_state
from nanosophia.optimizers import OPTIMIZERS
from tests.test_compile import build


class Unknown(TorchDispatchMode):
    """Collects operations that MPS refuses, and copies that it would not wait for."""

    def __init__(self):
        super().__init__()
        self.wide, self.not_waited_for = set(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **kwargs or {})
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64
               for x in tree_leaves(found)):
            self.wide.add(str(func))
        blocking = (kwargs or {}).get("non_blocking", args[2] if func in (
            torch.ops.aten.copy_.default,) and len(args) > 2 else False)
        if blocking:
            self.not_waited_for.add(str(func))
        return found


def test_apples_gpus_have_float32_at_most():
    assert widest_float(torch.device("mps")) == torch.float32
    assert widest_float(torch.device("cuda")) == widest_float(torch.device("cpu")) == torch.float64


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_a_step_and_its_record_need_no_float64_and_wait_for_copies(tiny, monkeypatch, optimizer):
    monkeypatch.setattr(metrics, "widest_float", lambda device: torch.float32)
    own = [] if OPTIMIZERS[optimizer].is_sophia else ["--gamma=1"]
    flags = [flag for flag in tiny(f"--optimizer={optimizer}", "--vocab_size=320")
             if flag not in own]
    if OPTIMIZERS[optimizer].estimator is None:
        flags = [flag for flag in flags if not flag.startswith("--hessian")]
    run, _ = build(flags)
    clock = Clock(0)
    with Unknown() as unknown:
        for step in range(2):
            loss, norm = train.train_step(run, step)
            measure(run, step, 1e-3, loss, norm, clock)
        host_copy(run.model.state_dict(), {})
    flatten_state(run.optimizer, run.beginning)
    assert not unknown.not_waited_for
    assert not unknown.wide, unknown.wide


def test_scores_need_no_float64(monkeypatch):
    from model import GPT, GPTConfig
    monkeypatch.setattr(hellaswag, "widest_float", lambda device: torch.float32)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=64))
    endings = [hellaswag.Ending(0, [1, 2, 3, 4], 2), hellaswag.Ending(0, [1, 2, 5], 1)]
    with Unknown() as unknown, torch.no_grad():
        found = hellaswag.log_likelihoods(model, endings, 2, torch.device("cpu"))
    assert all(x < 0 for x in found) and not unknown.wide


def test_the_look_sees_both():
    with Unknown() as unknown:
        torch.zeros(2).double()
        torch.zeros(2).copy_(torch.ones(2), non_blocking=True)
    assert unknown.wide and unknown.not_waited_for
