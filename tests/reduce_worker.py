"""Run by test_installation.py under torchrun: the estimate on ranks with rows of their own."""

import torch
import torch.distributed as dist
import torch.nn as nn

from sophia import gauss_newton_bartlett, sampled_cross_entropy

dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model, x, u = nn.Linear(4, 3), torch.randn(10, 4), torch.rand(10)
rows = slice(0, 7) if rank == 0 else slice(7, 10)  # of the ten


def estimate(part: slice, **options) -> list[torch.Tensor]:
    """The estimate on some rows, whose labels do not depend on the ranks."""
    return gauss_newton_bartlett(
        [lambda: sampled_cross_entropy(model(x[part]), uniforms=u[part])],
        list(model.parameters()), **options)


whole = estimate(slice(0, 10), all_reduce=None)
torch.testing.assert_close(estimate(rows), whole)
alone = estimate(rows, all_reduce=None)
assert not torch.allclose(alone[0], whole[0])
dist.destroy_process_group()
