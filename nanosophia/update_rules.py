"""Faster forms of `sophia.sophia_update`, for an optimizer's `rule`: equal up to rounding."""

from functools import cache

import torch
from torch import Tensor

from nanosophia.distributed import to_local
from sophia import sophia_update

SLICE = 2**19  # coordinates: few enough for a CPU's cache, enough for the cost of a call


def sliced_update(theta: Tensor, g: Tensor, m: Tensor, h: Tensor, gamma, lr, decay,
                  beta1: float, eps: float, skip: Tensor | None = None) -> None:
    """Updates slices of rows one after the other on a CPU, so that each stays in the cache."""
    theta, g, m, h, gamma = map(to_local, (theta, g, m, h, gamma))
    args = lr, decay, beta1, eps, skip
    if theta.device.type != "cpu" or theta.dim() == 0:
        sophia_update(theta, g, m, h, gamma, *args)
        return
    if isinstance(gamma, Tensor) and gamma.numel() == 1:
        gamma = gamma.item()
    rows = max(1, SLICE // max(1, theta[0].numel()))
    slices = zip(*(x.split(rows) for x in (theta, g, m, h)), strict=True)
    if isinstance(gamma, Tensor):
        for parts, part_gamma in zip(slices, gamma.split(rows), strict=True):
            sophia_update(*parts, part_gamma, *args)
        return
    numbers = skip is None and not isinstance(lr, Tensor) and theta.dtype == m.dtype
    update = _update_slice if numbers and 1e-20 < gamma < 1e20 else sophia_update
    for parts in slices:
        update(*parts, gamma, *args)


def _update_slice(theta: Tensor, g: Tensor, m: Tensor, h: Tensor, gamma: float, lr: float,
                  decay: float, beta1: float, eps: float, _skip: None) -> None:
    """Updates with clip(m / max(h, eps / gamma), +-gamma) / gamma, two passes fewer over memory."""
    m.lerp_(g.to(m.dtype), 1 - beta1)
    clipped = h.clamp_min(eps / gamma)
    torch.div(m, clipped, out=clipped).clamp_(-gamma, gamma)
    theta.mul_(decay).add_(clipped, alpha=-lr / gamma)


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
