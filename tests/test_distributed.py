"""Ranks: joining, wrapping, leaving."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, torchrun


def test_leaving_the_group_ends_its_threads(tiny):
    result = torchrun(2, "tests/exit_worker.py", *tiny("--max_iters=2"))
    assert result.returncode == 0, result.stderr
    assert "no thread is left" in result.stdout


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow_from_one_evaluation_to_the_next():
    """Freed tensors are kept for the next ones; what is kept must not pile up."""
    script = """if True:
        import torch
        from distributed import start_ranks
        from model import GPT, GPTConfig
        start_ranks("cpu")
        model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=32, block_size=64, vocab_size=50304))
        model.loss_chunk = 119
        idx = torch.randint(50000, (16, 64))
        sizes = []
        for _ in range(6):
            with torch.no_grad():
                kept = [model(idx[:n], idx[:n]) for n in (16, 7, 16, 3)]
            model(idx, idx).backward()
            model.zero_grad()
            status = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
            sizes.append(int(status["VmRSS"].split()[0]))
        print(*sizes)
    """
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True,
                            text=True, timeout=240)
    sizes = [int(x) for x in result.stdout.split()]
    assert sizes[-1] < sizes[2] * 1.05, (sizes, result.stderr)
