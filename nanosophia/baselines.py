"""The optimizers that Sophia is compared with, and the ablations of the paper's Fig. 7."""

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from sophia import Sophia, state_dtype


class Lion(torch.optim.Optimizer):
    """Implements Lion, evolved sign momentum (Chen et al. 2023, arXiv:2302.06675, Algorithm 2):

        c = beta1 m + (1 - beta1) g;  theta -= lr (sign(c) + weight_decay theta)
        m = beta2 m + (1 - beta2) g

    State, in float32 (float64 for float64 parameters): `exp_avg` (m).
    """

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.95, 0.98),
                 weight_decay: float = 0.2):
        require(type(self), lr=(lr, lr >= 0), weight_decay=(weight_decay, weight_decay >= 0),
                 betas=(betas, all(0 <= b < 1 for b in betas)))
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """Updates the parameters from `.grad`; returns closure's loss."""
        loss = call_closure(closure)
        for group, p in with_gradient(self):
            m = _momentum(self.state[p], p)
            g, (beta1, beta2) = p.grad.to(m.dtype), group["betas"]
            apply_update(p, m.lerp(g, 1 - beta1).sign_(), group)
            m.lerp_(g, 1 - beta2)
        return loss


class Normalize(torch.optim.Optimizer):
    """Divides momentum by its root mean square over all parameters (Normalize of Fig. 7c).

    theta -= lr m / rms(m), after decoupled decay. The paper gives no scale; the root mean square
    makes the typical coordinate move lr, as clipping does.
    """

    def __init__(self, params, lr: float = 4e-4, beta1: float = 0.96, weight_decay: float = 0.2):
        require(type(self), lr=(lr, lr >= 0), beta1=(beta1, 0 <= beta1 < 1),
                 weight_decay=(weight_decay, weight_decay >= 0))
        super().__init__(params, dict(lr=lr, beta1=beta1, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """Updates the parameters from `.grad`; returns closure's loss."""
        loss = call_closure(closure)
        items = [(group, p, _momentum(self.state[p], p)) for group, p in with_gradient(self)]
        if not items:
            return loss
        for group, p, m in items:
            m.lerp_(p.grad.to(m.dtype), 1 - group["beta1"])
        squares = torch.stack([m.square().sum() for _, _, m in items]).sum()
        rms = (squares / sum(m.numel() for _, _, m in items)).sqrt() + 1e-12
        for group, p, m in items:
            apply_update(p, m / rms, group)
        return loss


class AdaHessian(Sophia):
    """Implements AdaHessian, Adam with the squared Hutchinson estimate (Yao et al.,
    arXiv:2006.00719), as the paper runs it, without spatial averaging:

        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) hhat^2 at each estimate
        theta -= lr mhat / (sqrt(vhat) + eps), after decoupled decay

    mhat counts steps, vhat estimates. State: `exp_avg` (m), `hessian` (v), `steps`, `estimates`.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.92, 0.99),
                 eps: float = 1e-8, weight_decay: float = 0.1):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _curvature(self, hhat: Tensor) -> Tensor:
        return hhat * hhat

    def _update(self, p: Tensor, state: dict, group: dict, skip: None) -> None:
        m, v, (beta1, beta2) = state["exp_avg"], state["hessian"], group["betas"]
        state["steps"] = state.get("steps", torch.zeros_like(state["estimates"])) + 1
        m.lerp_(p.grad.to(m.dtype), 1 - beta1)
        m_hat = m / (1 - beta1 ** state["steps"].item())
        v_hat = v / (1 - beta2 ** max(1, state["estimates"].item()))
        apply_update(p, m_hat / (v_hat.sqrt() + group["eps"]), group)

    def statistics(self) -> dict[str, Tensor]:
        """Returns `Sophia.statistics` without what concerns clipping."""
        return _without_clipping(super().statistics())


class AdaHessianClip(Sophia):
    """Clips as Sophia does, with AdaHessian's curvature (AH+clip of Fig. 7b):

    clip(m / max(gamma sqrt(v), eps), -1, 1) with v the average of hhat^2.
    """

    def _curvature(self, hhat: Tensor) -> Tensor:
        return hhat * hhat

    def _update(self, p: Tensor, state: dict, group: dict, skip: None) -> None:
        m = state["exp_avg"].lerp_(p.grad.to(state["exp_avg"].dtype), 1 - group["betas"][0])
        floor = (group["gamma"] * state["hessian"].sqrt()).clamp_min_(group["eps"])
        apply_update(p, (m / floor).clamp_(-1, 1), group)

    def statistics(self) -> dict[str, Tensor]:
        """Returns `Sophia.statistics` without what concerns clipping."""
        return _without_clipping(super().statistics())


class SophiaUnclipped(Sophia):
    """Updates as Sophia does, without the clip (GNB of Fig. 7c): m / max(gamma h, eps)."""

    def statistics(self) -> dict[str, Tensor]:
        """Returns `Sophia.statistics` without what concerns clipping, and `curvature_fraction`: the
        share of coordinates where gamma h > eps, so that curvature and not the floor decides."""
        found = _without_clipping(super().statistics())
        above = [((group["gamma"] * self.state[p]["hessian"] > group["eps"]).sum(), p.numel())
                 for group, p in self._items() if p in self.state]
        if above:
            found["curvature_fraction"] = sum(n for n, _ in above) / sum(size for _, size in above)
        return found

    def _update(self, p: Tensor, state: dict, group: dict, skip: None) -> None:
        m = state["exp_avg"].lerp_(p.grad.to(state["exp_avg"].dtype), 1 - group["betas"][0])
        apply_update(p, m / (group["gamma"] * state["hessian"]).clamp_min_(group["eps"]), group)


class Chained(torch.optim.Optimizer):
    """Runs several optimizers as one, whose param groups and state are saved like any other's."""

    def __init__(self, parts: list[torch.optim.Optimizer]):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part in self.parts:
            part.param_groups = [next(groups) for _ in part.param_groups]
            part.state = self.state

    @torch.no_grad()
    def step(self, closure=None):
        """Updates the parameters of every part; returns closure's loss."""
        loss = call_closure(closure)
        for part in self.parts:
            part.step()
        return loss

    def parameters(self) -> list[Tensor]:
        """Returns the parameters of the parts that take curvature, in the order of estimates."""
        return [p for part in self._curved() for p in part.parameters()]

    def update_hessian(self, estimates: Iterable[Tensor | None]) -> None:
        """Gives each part that takes curvature its estimates."""
        estimates = iter(estimates)
        for part in self._curved():
            part.update_hessian([next(estimates) for _ in part.parameters()])

    def _curved(self) -> list[torch.optim.Optimizer]:
        return [part for part in self.parts if hasattr(part, "update_hessian")]

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores `state_dict()`."""
        super().load_state_dict(state_dict)
        self._share()
        for part in self.parts:
            part.__setstate__({})  # what follows from the state


def _without_clipping(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = ("hessian_norm", "momentum_norm", "parameter_norm")
    return {key: value for key, value in statistics.items() if key in kept}


def apply_update(p: Tensor, update: Tensor, group: dict) -> None:
    """Decays p, then subtracts lr * update, in the update's precision; modifies both in place."""
    precise = p.to(update.dtype)  # p itself unless its precision is lower
    precise.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.mul_(group["lr"]))
    if precise is not p:
        p.copy_(precise)


def _momentum(state: dict, p: Tensor) -> Tensor:
    if "exp_avg" not in state:
        state["exp_avg"] = torch.zeros_like(p, dtype=state_dtype(p))
    return state["exp_avg"]


def with_gradient(optimizer: torch.optim.Optimizer) -> Iterator[tuple[dict, Tensor]]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(optimizer).__name__} does not take sparse gradients")
                yield group, p


def call_closure(closure: Callable | None):
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def require(cls: type, **values: tuple[object, bool]) -> None:
    for name, (value, is_legal) in values.items():
        if not is_legal:
            raise ValueError(f"{cls.__name__}: {name} = {value} is out of range")
