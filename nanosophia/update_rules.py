"""Faster forms of `sophia.sophia_update`, for an optimizer's `rule`: equal up to rounding."""

from functools import cache
from itertools import repeat

import torch
from torch import Tensor

from nanosophia.distributed import to_local
from sophia import sophia_update

SLICE = 2**16  # coordinates, which fit a CPU core's cache


def sliced_update(theta: Tensor, g: Tensor, m: Tensor, h: Tensor, gamma, *args) -> None:
    """Updates slices of rows one after the other on a CPU, so that each stays in the cache.

    `args` are lr, decay, beta1, eps and skip.
    """
    theta, g, m, h, gamma = map(to_local, (theta, g, m, h, gamma))
    if theta.device.type != "cpu" or theta.dim() == 0 or theta.numel() <= SLICE:
        sophia_update(theta, g, m, h, gamma, *args)
        return
    rows = max(1, SLICE // theta[0].numel())
    gammas = gamma.split(rows) if isinstance(gamma, Tensor) and gamma.dim() else repeat(gamma)
    for *parts, part_gamma in zip(*(x.split(rows) for x in (theta, g, m, h)), gammas, strict=False):
        sophia_update(*parts, part_gamma, *args)


def compiled_update(theta: Tensor, g: Tensor, m: Tensor, h: Tensor, gamma, lr, decay,
                    beta1: float, eps: float, skip: Tensor | None = None) -> None:
    """Updates by one compiled kernel per tensor; it is compiled once for all sizes and steps."""
    if not isinstance(gamma, Tensor):
        gamma = torch.tensor(gamma, dtype=torch.float64)
    *tensors, gamma = map(to_local, (theta.detach(), g, m, h, gamma))
    if gamma.dim() == 0 and all(x.is_contiguous() for x in tensors):
        tensors = [x.view(-1) for x in tensors]
    lr, decay = (torch.as_tensor(x, dtype=torch.float64) for x in (lr, decay))
    _compiled()(*tensors, gamma, lr, decay, beta1, eps, skip)


compiled_update.skips_on_device = True  # reads found_inf in its kernel, without a host sync


@cache
def _compiled():
    return torch.compile(sophia_update, dynamic=True)
