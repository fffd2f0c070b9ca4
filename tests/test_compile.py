"""What a GPU would wait for: recompilations, and reads by the host, neither of which may recur.

torch.compile runs here with a backend that traces as usual and generates no code, so that the test
needs no C++ compiler.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import train
from nanosophia import update_rules
from nanosophia.configurator import load
from nanosophia.dataloader import ValidationWindows, open_dataset
from nanosophia.distributed import start_ranks
from nanosophia.evaluation import evaluate
from nanosophia.optimizers import with_own_defaults
from nanosophia.options import Config
from sophia import sophia_update


def build(flags, device="cpu"):
    config, sources = load(Config, flags, "")
    config = with_own_defaults(config, sources)
    data = open_dataset(config.dataset, config.block_size)
    torch.manual_seed(0)
    return train.build_run(config, start_ranks(device), data), data


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that torch.compile made."""
    from torch._dynamo.backends.debugging import aot_eager
    made, compile = [], torch.compile

    def backend(graph, inputs, **kwargs):
        made.append(graph)
        return aot_eager(graph, inputs)

    torch._dynamo.reset()
    update_rules._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", lambda f, **options: compile(
        f, **options | dict(backend=backend)))
    yield made
    torch._dynamo.reset()
    update_rules._compiled.cache_clear()


# At most: the model in training and in an estimate, each once more for micro-batches of two sizes;
# Sophia's update of vectors, matrices, and matrices whose gradient is transposed.
@pytest.mark.parametrize("flags, at_most", [
    (["--optimizer=adamw"], 1),
    (["--optimizer=adamw", "--batch_size=4", "--total_batch_size=7"], 2),
    (["--optimizer=sophiag"], 5),
    (["--optimizer=sophiag", "--dtype=bfloat16", "--hessian_chunks=2"], 5),
    (["--optimizer=sophiag", "--dtype=float16"], 5),
    (["--optimizer=sophiag", "--gamma_target=0.5"], 5),
    (["--optimizer=sophiag", "--batch_size=4", "--total_batch_size=7"], 7),
    (["--optimizer=sophiah", "--gamma=0.1"], 4),  # its estimate is not compiled
], ids=lambda x: " ".join(x) if isinstance(x, list) else None)
def test_three_hessian_cycles_compile_nothing_after_their_first_steps(tiny, graphs, flags,
                                                                      at_most):
    run, data = build(tiny("--compile=on", "--compile_optimizer=auto", "--hessian_interval=3",
                           "--vocab_size=320", *flags, *(
                               ["--compile_optimizer=on"] if "sophia" in flags[0] else [])))
    windows = ValidationWindows(data.val, block_size=16, limit=6, vocab_size=data.vocab_size)
    counts = []
    for step in range(9):  # other rates, labels, rows and seeds at each
        train.train_step(run, step)
        counts.append(len(graphs))
        if step in (1, 4, 7):
            evaluate(run.model, windows, run.ranks, run.config.batch_size, run.autocast)
    first = counts[0]
    assert 1 <= first <= at_most and counts == [first] * 2 + [first + 1] * 7
    assert not torch._dynamo.utils.counters["graph_break"]


class HostReads(TorchDispatchMode):
    """Counts reads of a tensor's value by the host: .item(), float(), an `if`, a mask's nonzero."""

    READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default,
             torch.ops.aten.masked_select.default, torch.ops.aten.equal.default)

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in self.READS:
            self.found.append(func)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("flags", [
    ["--optimizer=sophiag"], ["--optimizer=sophiag", "--dtype=float16", "--hessian_chunks=2"],
    ["--optimizer=sophiah", "--gamma=0.1"], ["--optimizer=adamw"],
    ["--optimizer=sophiag", "--gamma_target=0.5"]], ids=" ".join)
def test_the_host_reads_nothing_between_two_records(tiny, monkeypatch, flags):
    monkeypatch.setattr(update_rules, "_compiled", lambda: sophia_update)  # what a GPU would run
    run, _ = build(tiny("--hessian_interval=2", "--vocab_size=320", *flags, *(
        ["--compile_optimizer=on"] if "sophia" in flags[0] else [])))
    train.train_step(run, 0)  # makes the state
    controls_gamma = "--gamma_target=0.5" in flags  # which needs to know of refused estimates
    for step in range(1, 5):
        with HostReads() as reads:
            train.train_step(run, step)
        assert not reads.found or (controls_gamma and run.estimates(step))
    with HostReads() as reads:
        run.guard.report.tolist()
        run.guard.report[0].item()
    assert reads.found, "the count sees no reads"
