"""Implements Sophia with a gamma per tensor or row that follows a target (beyond the paper).

The paper tunes one gamma for all parameters until 10-50 % of the coordinates are unclipped. Here
each parameter tensor, or each row of a matrix, has its own, set after every estimate so that a
fraction of it is unclipped. The effect is measured in results/controlled_gamma.md.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nanosophia.distributed import full_tensor
from sophia import Sophia

GAMMA_DECAY = 0.8  # of the moving average of log gamma
SAMPLE_PER_ROW, SAMPLE_PER_TENSOR = 64, 4096  # coordinates in the quantile's sample


class ControlledSophia(Sophia):
    """Sophia with a controlled gamma or a bias-corrected h.

    Args, each also of a param group, beside those of Sophia:
        gamma_target: above 0, the fraction of each tensor's coordinates with positive h that its
            own gamma, in place of `gamma`, keeps unclipped (`control_gamma`).
        gamma_rows: with gamma_target, one gamma per row of a matrix instead of one per tensor.
        bias_correction: divide h by 1 - beta2^(number of estimates).

    State, beside Sophia's: under gamma_target `gamma`, shape (rows, 1, ...) or (), and `gamma_due`,
    1.0 between an estimate and the step that sets gamma.
    """

    update_reads_skip = True  # except in the step after an estimate (_skip_flag)
    _new_estimate = False  # since the last step

    def __init__(self, params, *args, gamma_target: float = 0.0, gamma_rows: bool = False,
                 bias_correction: bool = False, **kwargs):
        super().__init__(params, *args, gamma_target=gamma_target, gamma_rows=gamma_rows,
                         bias_correction=bias_correction, **kwargs)

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group as torch's optimizers do; raises ValueError on values out of range."""
        target = (self.defaults | param_group)["gamma_target"]
        if not 0 <= target < 1:
            raise ValueError(f"{type(self).__name__}: gamma_target = {target} must be in [0, 1)")
        super().add_param_group(param_group)

    def update_hessian(self, estimates: Iterable[Tensor | None]) -> None:
        """Averages the estimates into h as Sophia does; the next step sets gamma anew."""
        was_new, self._new_estimate = self._new_estimate, True
        refused = self.nonfinite_estimates
        super().update_hessian(estimates)
        taken = self._skip_flag() is not True and bool(self.nonfinite_estimates == refused)
        self._set_due(was_new or taken)

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates the parameters as Sophia does."""
        loss = super().step(closure)
        if self._new_estimate and self._skip_flag() is not True:
            self._set_due(False)
        return loss

    def _set_due(self, due: bool) -> None:
        self._new_estimate = due
        for group, p in self._items():
            if group["gamma_target"] and p in self.state:
                self.state[p]["gamma_due"] = torch.tensor(float(due))

    def __setstate__(self, state: dict) -> None:
        """Restores what copy, pickle and load_state_dict carry, a pending estimate included."""
        super().__setstate__(state)
        self._new_estimate = any(s["gamma_due"].item() for s in self.state.values()
                                 if "gamma_due" in s)

    def _skip_flag(self, bad: Tensor | None = None) -> Tensor | bool | None:
        # After an estimate the host must know: gamma and the number of estimates change there too.
        flag = super()._skip_flag(bad)
        if isinstance(flag, Tensor) and self._new_estimate:
            return bool(flag) or flag  # host sync
        return flag

    def _update(self, p: Tensor, state: dict, group: dict, skip: Tensor | None) -> None:
        if group["gamma_target"] and self._new_estimate and p.numel():
            state["gamma"] = control_gamma(
                state.get("gamma"), p.grad, state["exp_avg"], state["hessian"],
                beta1=group["betas"][0], target=group["gamma_target"],
                rows=group["gamma_rows"] and p.dim() >= 2)
        super()._update(p, state, group, skip)

    def _gamma(self, state: dict, group: dict) -> float | Tensor:
        if group["gamma_target"] and "gamma" in state:  # has the bias correction in it
            return state["gamma"]
        count = state["estimates"].item() if group["bias_correction"] else 0  # on the CPU: no sync
        return group["gamma"] / (1 - group["betas"][1] ** count) if count else group["gamma"]

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """Returns Sophia's statistics and `gamma`: its geometric mean over parameters and rows."""
        found = super().statistics()
        gammas = [full_tensor(self.state[p]["gamma"]).flatten() for group, p in self._items()
                  if group["gamma_target"] and "gamma" in self.state.get(p, {})]
        if gammas:
            gamma = torch.cat(gammas)
            found["gamma"] = torch.where(gamma > 0, gamma.log(), 0).sum().div(
                (gamma > 0).sum().clamp_min(1)).exp()
        return found


def control_gamma(old: Tensor | None, g: Tensor, m: Tensor, h: Tensor, *, beta1: float,
                  target: float, rows: bool) -> Tensor:
    """Returns the gamma under which a fraction `target` of the coming step is unclipped.

    It is the target-quantile of |m| / h over coordinates with positive h, m as the coming step will
    have it, averaged in the logarithm with the `old` one. It is taken over a sample of coordinates,
    so that the cost does not grow with the tensor. The bias correction that h lacks cancels. One
    per tensor has shape (), one per row (`rows`) shape (rows, 1, ...). Until there has been a
    positive curvature it is 0.
    """
    shape = (-1, *[1] * (g.dim() - 1)) if rows else ()
    g, m, h = (_sample(x, rows) for x in (g, m, h))  # (rows, n) or (1, n)
    ratio = torch.where(h > 0, m.lerp(g.to(m.dtype), 1 - beta1).abs() / h, math.inf)
    positive = (h > 0).sum(dim=1, keepdim=True)
    rank = (target * positive).ceil().long().sub_(1).clamp_min_(0)
    new = ratio.sort(dim=1).values.gather(1, rank).view(shape)
    if old is None or old.shape != new.shape:  # the first, or of another granularity
        old = torch.zeros_like(new)
    smooth = torch.exp(GAMMA_DECAY * old.log() + (1 - GAMMA_DECAY) * new.log())
    usable = torch.isfinite(new) & (new > 0)
    return torch.where(usable, torch.where(old > 0, smooth, new), old)


def _sample(x: Tensor, rows: bool) -> Tensor:
    """Returns evenly spaced coordinates: (rows, n) of every row, or (1, n) of the whole tensor."""
    x = x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
    x = x[:, ::-(-x.size(1) // SAMPLE_PER_ROW)]  # (rows, n)
    if rows:
        return x
    x = full_tensor(x)  # of a shard, the sample of all ranks: a small part of the tensor
    return x[::-(-x.numel() // SAMPLE_PER_TENSOR)].reshape(1, -1)
