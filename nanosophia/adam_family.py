"""Descendants of Adam that Sophia is compared with: AdEMAMix, MARS and Schedule-Free AdamW.

All decay decoupled, times lr. State is in float32 (float64 for float64 parameters); counts are
entries of the param groups.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from nanosophia.baselines import apply_update, call_closure, require, with_gradient
from sophia import state_dtype


class AdamRelative(torch.optim.Optimizer):
    """What the optimizers of this module share: a count of steps per group, and named states."""

    def __init__(self, params, lr: float, betas: tuple[float, ...], eps: float,
                 weight_decay: float, **more):
        require(type(self), lr=(lr, lr >= 0), eps=(eps, eps > 0),
                weight_decay=(weight_decay, weight_decay >= 0),
                betas=(betas, all(0 <= b < 1 for b in betas)))
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      steps=0, **more))

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Updates the parameters from `.grad`; returns closure's loss."""
        loss = call_closure(closure)
        for group in self.param_groups:
            group["steps"] += 1
            self._begin(group)
        for group, p in with_gradient(self):
            self._update(p, p.grad.to(state_dtype(p)), self.state[p], group)
        return loss

    def _begin(self, group: dict) -> None:
        """Prepares what all of a group's parameters share in this step."""

    def _update(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        """Updates one parameter and its state; each optimizer has its own."""
        raise NotImplementedError


def _zeros(state: dict, g: Tensor, *names: str) -> list[Tensor]:
    """Returns named parts of a parameter's state, zeros at first."""
    for name in names:
        if name not in state:
            state[name] = torch.zeros_like(g)
    return [state[name] for name in names]


class AdEMAMix(AdamRelative):
    """Implements AdEMAMix, Adam with a second, slow momentum (Pagliardini et al. 2024,
    arXiv:2409.03137, Algorithm 1).

        M1 = beta1 M1 + (1 - beta1) g;  M2 = beta3 M2 + (1 - beta3) g;  V as Adam's
        theta -= lr (M1hat + alpha M2) / (sqrt(Vhat) + eps), after decay

    Over the first `warmup` steps alpha grows in a line from 0, and beta3 from beta1 so that its
    half-life does. State: `exp_avg`, `exp_avg_slow`, `exp_avg_sq`; group entry `steps`.
    """

    def __init__(self, params, lr: float = 1e-3,
                 betas: tuple[float, float, float] = (0.9, 0.999, 0.9999), eps: float = 1e-8,
                 weight_decay: float = 0.1, alpha: float = 5.0, warmup: int = 0):
        require(type(self), alpha=(alpha, alpha >= 0), warmup=(warmup, warmup >= 0))
        super().__init__(params, lr, betas, eps, weight_decay, alpha=alpha, warmup=warmup)

    def _update(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        fast, slow, v = _zeros(state, g, "exp_avg", "exp_avg_slow", "exp_avg_sq")
        (beta1, beta2, beta3), t = group["betas"], group["steps"]
        done = min(1.0, t / group["warmup"]) if group["warmup"] else 1.0
        fast.lerp_(g, 1 - beta1)
        slow.lerp_(g, 1 - _slow_beta(beta1, beta3, done))
        v.lerp_(g * g, 1 - beta2)
        update = fast / (1 - beta1 ** t) + group["alpha"] * done * slow
        update /= (v / (1 - beta2 ** t)).sqrt_() + group["eps"]
        apply_update(p, update, group)


def _slow_beta(first: float, last: float, done: float) -> float:
    """Returns a beta with a log between two, so that 1 / log beta goes in a line; `done` in
    [0, 1]."""
    if done >= 1 or first == 0 or last <= first:
        return last
    return min(last, math.exp(1 / ((1 - done) / math.log(first) + done / math.log(last))))


class MARS(AdamRelative):
    """Implements MARS-AdamW: Adam on a gradient corrected by the last one (Yuan et al. 2024,
    arXiv:2411.10438, Algorithm 2, its approximate form).

        C = g + gamma beta1 / (1 - beta1) (g - g_last), scaled down to a norm of 1 per tensor
        Adam's step on C, after decay

    Parameters of one dimension take Adam's step on g. State: `exp_avg`,
    `exp_avg_sq`, `last_grad`; group entry `steps`.
    """

    def __init__(self, params, lr: float = 3e-3, betas: tuple[float, float] = (0.95, 0.99),
                 eps: float = 1e-8, weight_decay: float = 0.1, gamma: float = 0.025):
        require(type(self), gamma=(gamma, gamma >= 0))
        super().__init__(params, lr, betas, eps, weight_decay, gamma=gamma)

    def _update(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        m, v = _zeros(state, g, "exp_avg", "exp_avg_sq")
        (beta1, beta2), t, c = group["betas"], group["steps"], g
        if p.dim() >= 2:
            last, = _zeros(state, g, "last_grad")
            c = g + (group["gamma"] * beta1 / (1 - beta1)) * (g - last)
            c = c / c.norm().clamp_min(1)
            last.copy_(g)
        m.lerp_(c, 1 - beta1)
        v.lerp_(c * c, 1 - beta2)
        update = m / (1 - beta1 ** t)
        update /= (v / (1 - beta2 ** t)).sqrt_() + group["eps"]
        apply_update(p, update, group)


class ScheduleFreeAdamW(AdamRelative):
    """Implements Schedule-Free AdamW (Defazio et al. 2024, arXiv:2405.15682, Algorithm 1).

    Gradients are taken at y, between z, which moves as AdamW does, and x, an average of z that is
    to be evaluated and saved:

        d = g / (sqrt(Vhat) + eps) + weight_decay y;  z -= lr d
        x = (1 - c) x + c z;  y = beta1 x + (1 - beta1) z

    where c is the share of lr^2 in its sum so far, lr the largest so far: the rate stays constant
    after a warm-up. Parameters are y while training; `eval` makes
    them x, `train` y again, to the bit. State: `z`, `exp_avg_sq`, between eval and train `y`; group
    entries `steps`, `weight_sum`, `lr_max`. Raises RuntimeError on a step between the two.
    """

    def __init__(self, params, lr: float = 2.5e-3, betas: tuple[float, float] = (0.9, 0.95),
                 eps: float = 1e-8, weight_decay: float = 0.1):
        require(type(self), betas=(betas, betas[0] > 0))
        super().__init__(params, lr, betas, eps, weight_decay, weight_sum=0.0, lr_max=0.0)

    def _begin(self, group: dict) -> None:
        group["lr_max"] = max(group["lr_max"], group["lr"])
        group["weight_sum"] += group["lr_max"] ** 2

    def _update(self, p: Tensor, g: Tensor, state: dict, group: dict) -> None:
        if "y" in state:
            raise RuntimeError("ScheduleFreeAdamW steps on the weights of training; call train() "
                               "after eval()")
        if "z" not in state:
            state["z"] = p.to(g.dtype, copy=True)
        v, = _zeros(state, g, "exp_avg_sq")
        (beta1, beta2), lr = group["betas"], group["lr"]
        share = group["lr_max"] ** 2 / group["weight_sum"] if group["weight_sum"] else 0.0
        v.lerp_(g * g, 1 - beta2)
        d = g / ((v / (1 - beta2 ** group["steps"])).sqrt_() + group["eps"])
        y = p.to(g.dtype)  # p itself unless its precision is lower
        d.add_(y, alpha=group["weight_decay"])
        y.lerp_(state["z"], share).add_(d, alpha=lr * (beta1 * (1 - share) - 1))
        state["z"].sub_(d, alpha=lr)
        if y is not p:
            p.copy_(y)

    @torch.no_grad()
    def eval(self) -> None:
        """Makes the parameters x, if they are y."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state.get(p, {})
                if "z" in state and "y" not in state:
                    state["y"] = p.detach().clone()
                    p.copy_(p.to(state["z"].dtype).lerp(state["z"], 1 - 1 / group["betas"][0]))

    @torch.no_grad()
    def train(self) -> None:
        """Makes the parameters y again, if they are x."""
        for group in self.param_groups:
            for p in group["params"]:
                if "y" in self.state.get(p, {}):
                    p.copy_(self.state[p].pop("y"))
