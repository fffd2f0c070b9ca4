"""Ranks: joining, wrapping, leaving."""

from tests.conftest import torchrun


def test_leaving_the_group_ends_its_threads(tiny):
    result = torchrun(2, "tests/exit_worker.py", *tiny("--max_iters=2"))
    assert result.returncode == 0, result.stderr
    assert "no thread is left" in result.stdout
