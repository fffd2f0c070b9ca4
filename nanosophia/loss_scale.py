"""The factor on the loss that keeps float16's gradients within its range (6e-8 to 65504).

Micikevicius et al. 2018, arXiv:1710.03740, with the constants of torch.amp.GradScaler, which would
ask the device after every step whether there was an overflow; here nothing leaves the device.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from nanosophia.distributed import to_local

INITIAL, LEAST, MOST = 2.0**16, 1.0, 2.0**24
GROWTH_INTERVAL = 2000  # good steps in a row after which the factor doubles


class LossScale:
    """Multiplies losses, divides gradients, halves itself where they overflow, and doubles again.

    Unless `dynamic` it is 1 for good and none of its methods does anything. All factors are powers
    of two, so that scaling and unscaling round nothing.
    """

    def __init__(self, device: torch.device, *, dynamic: bool):
        self.dynamic = dynamic
        self.value = torch.full((), INITIAL if dynamic else LEAST, device=device)
        self.good = torch.zeros((), dtype=torch.int64, device=device)  # steps in a row

    def scaled(self, loss: Tensor) -> Tensor:
        """Returns the loss to differentiate."""
        return loss * self.value if self.dynamic else loss

    def unscale_(self, gradients: Iterable[Tensor | None]) -> None:
        """Divides gradients of a scaled loss, in place; parameters without one are passed over."""
        if self.dynamic:
            torch._foreach_div_([to_local(g) for g in gradients if g is not None], self.value)

    def of_sum(self, count: int) -> Tensor | None:
        """Returns a factor for losses summed over `count` positions, as the mean over them has."""
        return self.value / 2 ** (count.bit_length() - 1) if self.dynamic else None

    def may_fall(self) -> Tensor:
        """Returns whether an overflow can be helped by a lower factor, a bool on the device."""
        return self.value > LEAST

    def update(self, overflow: Tensor, *, grows: bool) -> None:
        """Halves the factor where `overflow`, the same on all ranks, is not 0; else counts a good
        step if it `grows`."""
        if not self.dynamic:
            return
        bad = overflow != 0
        self.good.copy_(torch.where(bad, 0, self.good + grows))
        grown = self.good >= GROWTH_INTERVAL
        factor = torch.where(bad, 0.5, torch.where(grown, 2.0, 1.0))
        self.value.mul_(factor).clamp_(LEAST, MOST)
        self.good.masked_fill_(grown, 0)

    def state(self) -> dict | None:
        """Returns what a resumed run needs to go on alike; None unless dynamic."""
        return dict(value=self.value.item(), good=int(self.good)) if self.dynamic else None

    def restore(self, state: dict) -> None:
        """Restores `state()`; a run that was not in float16 had none."""
        if self.dynamic:
            self.value.fill_(state["value"])
            self.good.fill_(state["good"])
