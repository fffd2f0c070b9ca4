"""Optimizers that treat a hidden matrix as a matrix: Muon in a diagonal metric, SOAP and PSGD-Kron.

They take 2-dimensional parameters; embeddings, norms and biases need another optimizer. State is in
float32 (float64 for float64 parameters).
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nanosophia.baselines import apply_update, call_closure, require, with_gradient
from nanosophia.distributed import full_tensor, shard_like
from sophia import state_dtype

SMALLEST_RATIO = 1e-4  # of a row's mean square to the mean over rows
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, https://kellerjordan.github.io/posts/muon


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Returns about U V^T of a matrix x = U S V^T, in x's precision; zeros give zeros.

    By Muon's quintic Newton-Schulz iteration: singular values end between about 0.7 and 1.2, and
    those that are tiny beside the largest stay below. x is (m, n), or (batch, m, n).
    """
    a, b, c = NEWTON_SCHULZ
    wide = x if x.size(-2) <= x.size(-1) else x.mT
    norm = wide.norm(dim=(-2, -1), keepdim=True)
    y = wide / norm.clamp_min(torch.finfo(x.dtype).tiny)
    for _ in range(steps):
        gram = y @ y.mT
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y if x.size(-2) <= x.size(-1) else y.mT


class MatrixOptimizer(torch.optim.Optimizer):
    """What the optimizers of this module share: they take matrices; each says where a step goes.

    A gradient that is a shard reaches `_direction` as it is; the whole update is cut to the shard.
    """

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group as torch's optimizers do; raises ValueError on what is no hidden matrix."""
        super().add_param_group(param_group)
        group, name = self.param_groups[-1], type(self).__name__
        wrong = next((p for p in group["params"] if p.dim() != 2 or p.is_complex()), None)
        if wrong is not None or group.get("kind", "matrix") != "matrix":
            self.param_groups.pop()
            what = f"a parameter of shape {tuple(wrong.shape)}" if wrong is not None else \
                f"a group of kind {group['kind']}"
            raise ValueError(f"{name} takes real matrices (m, n), not {what}; give those to AdamW")

    @torch.no_grad()
    def step(self, closure: Callable | None = None):
        """Updates the parameters from `.grad`; returns closure's loss."""
        loss = call_closure(closure)
        for group, p in with_gradient(self):
            update = self._direction(p.grad.to(state_dtype(p)), self.state[p], group)
            if update is not None:
                apply_update(p, shard_like(update, p), group)
        return loss

    def _direction(self, g: Tensor, state: dict, group: dict) -> Tensor | None:
        """Returns what is subtracted, times lr, for a gradient (m, n); None: no change at all.

        Each optimizer has its own.
        """
        raise NotImplementedError


class MetricMuon(MatrixOptimizer):
    r"""Muon in a diagonal metric (beyond the paper): per matrix, with g its gradient (m, n),

        M = momentum M + (1 - momentum) g;   N = momentum M + (1 - momentum) g
        r = (a / mean a)^-power, c = (b / mean b)^-power
        D = r * orthogonalise(r * N * c) * c
        theta -= lr * 0.2 sqrt(max(m / parts, n)) |O| D / |D|,  O orthogonalised, after decay

    where a (m) and b (n) are moving averages of the row and column means of g^2, or, where
    `update_hessian` is called, of a curvature estimate. With power 0 it is Muon, scaled to AdamW's
    root mean square as `torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`.

    Why: r and c stand for the diagonal scaling R, C under which the loss is about as curved in
    every direction. The steepest descent under a bound on the spectral norm of R^-1 W C^-1
    maximises <g, W> = <R g C, V> for W = R V C with |V| <= 1 in the spectral norm, so that V is
    orthogonalised R g C: Muon's step, taken in coordinates scaled by R and C.

    Args:
        betas: of the momentum, and of a and b.
        power: of the ratios, which are kept above 1e-4; 0.25 makes r N c what Shampoo with
            diagonal factors has.
        sides: `both`, or `rows` or `columns` alone.
        parts: a matrix is so many of equal height below each other, as q, k and v are in one of
            (3 n, n); each is orthogonalised apart.
        from_estimates: a and b are averaged by `update_hessian`, and not from the gradient.
        precision: of the orthogonalisation; None is that of the state.

    State: `momentum_buffer` (m, n), `row_square` (m), `column_square` (n). Of a matrix that FSDP2
    has split, the momentum is split alike; N is gathered, one matrix at a time, and every rank
    computes the whole update and takes its part.
    """

    orthogonalise = staticmethod(orthogonalise)  # may be set to a compiled form

    def __init__(self, params, lr: float = 0.02, betas: tuple[float, float] = (0.95, 0.95),
                 weight_decay: float = 0.1, power: float = 0.25, sides: str = "both",
                 parts: int = 1, from_estimates: bool = False,
                 precision: torch.dtype | None = None):
        require(type(self), lr=(lr, lr >= 0), weight_decay=(weight_decay, weight_decay >= 0),
                betas=(betas, all(0 <= b < 1 for b in betas)), power=(power, power >= 0),
                sides=(sides, sides in ("both", "rows", "columns")), parts=(parts, parts >= 1))
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay, power=power,
                                      sides=sides, parts=parts, from_estimates=from_estimates))
        self.precision = precision

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group; raises ValueError on what is no hidden matrix, or not of equal parts."""
        super().add_param_group(param_group)
        parts = self.param_groups[-1]["parts"]
        if uneven := [tuple(p.shape) for p in self.param_groups[-1]["params"] if len(p) % parts]:
            self.param_groups.pop()
            raise ValueError(f"MetricMuon cannot cut the rows of a matrix {uneven[0]} into "
                             f"{parts} equal parts; give it to a group with parts=1")

    def parameters(self) -> list[Tensor]:
        """Returns every parameter once, in the order of estimates."""
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def update_hessian(self, estimates: Iterable[Tensor | None]) -> None:
        """Averages the row and column means of one estimate (m, n) per parameter; None: none."""
        items = [(group, p) for group in self.param_groups for p in group["params"]]
        for (group, p), estimate in zip(items, estimates, strict=True):
            if estimate is not None:
                self._average(estimate, self.state[p], group, state_dtype(p))

    def _average(self, squares: Tensor, state: dict, group: dict, dtype: torch.dtype) -> None:
        for name, dim in (("row_square", 1), ("column_square", 0)):
            mean = full_tensor(squares.to(dtype).mean(dim))
            if name not in state:
                state[name] = torch.zeros_like(mean)
            state[name].lerp_(mean, 1 - group["betas"][1])

    def _direction(self, g: Tensor, state: dict, group: dict) -> Tensor:
        beta = group["betas"][0]
        if not group["from_estimates"]:
            self._average(g * g, state, group, g.dtype)
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(g)
        momentum = state["momentum_buffer"].lerp_(g, 1 - beta)
        row, column = (_scale(state.get(name), group["power"], dim) if side in group["sides"] or
                       group["sides"] == "both" else 1.0 for name, side, dim in (
                           ("row_square", "rows", 1), ("column_square", "columns", 0)))
        n = full_tensor(momentum.lerp(g, 1 - beta)) * row * column
        parts = n.to(self.precision or n.dtype).chunk(group["parts"])
        orthogonal = torch.cat([self.orthogonalise(part) for part in parts]).to(n.dtype)
        update = orthogonal * row * column
        size = 0.2 * max(parts[0].shape) ** 0.5 * orthogonal.norm()
        return update * (size / update.norm().clamp_min(torch.finfo(g.dtype).tiny))


def _scale(mean_square: Tensor | None, power: float, dim: int) -> Tensor | float:
    """Returns (a / mean a)^-power, to be multiplied with a matrix; 1 where nothing is known."""
    if mean_square is None or power == 0:
        return 1.0
    mean = mean_square.mean()
    ratio = torch.where(mean > 0, mean_square / mean, 1.0)
    return ratio.clamp_min(SMALLEST_RATIO).pow(-power).unsqueeze(dim)


class SOAP(MatrixOptimizer):
    """Implements SOAP: Adam in the eigenbasis of Shampoo's factors (Vyas et al. 2024,
    arXiv:2409.11321, Algorithm 3).

        L = beta3 L + (1 - beta3) g g^T;  R likewise of g^T g;  Q_L, Q_R their eigenvectors
        M = beta1 M + (1 - beta1) g;  g', M' = Q_L^T g Q_R, Q_L^T M Q_R
        V = beta2 V + (1 - beta2) g'^2
        theta -= lr Q_L (Mhat' / (sqrt(Vhat) + eps)) Q_R^T, after decay

    The first gradient makes the bases and moves nothing. Every `frequency` steps the bases are
    renewed by one power iteration and a QR decomposition. A side longer than `largest` has none.

    State: `exp_avg`, `exp_avg_sq` (in the basis), and per side `left`, `right` (L, R) and
    `left_basis`, `right_basis`; `step` counts on the CPU.
    """

    def __init__(self, params, lr: float = 3e-3, betas: tuple[float, float] = (0.95, 0.95),
                 eps: float = 1e-8, weight_decay: float = 0.1, frequency: int = 10,
                 largest: int = 10_000, shampoo_beta: float | None = None):
        require(type(self), lr=(lr, lr >= 0), eps=(eps, eps > 0), frequency=(frequency,
                                                                            frequency >= 1),
                weight_decay=(weight_decay, weight_decay >= 0), largest=(largest, largest >= 0),
                betas=(betas, all(0 <= b < 1 for b in betas)),
                shampoo_beta=(shampoo_beta, shampoo_beta is None or 0 <= shampoo_beta < 1))
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay,
                                      frequency=frequency, largest=largest,
                                      shampoo_beta=shampoo_beta))

    def _direction(self, g: Tensor, state: dict, group: dict) -> Tensor | None:
        (beta1, beta2), t = group["betas"], self._count(g, state)
        if t == 0:
            self._average(g, state, group)
            for side in _sides(state):
                state[f"{side}_basis"] = torch.linalg.eigh(state[side]).eigenvectors.flip(1)
            return None
        m = state["exp_avg"].lerp_(g, 1 - beta1)
        v = state["exp_avg_sq"].lerp_(_turn(g, state).square(), 1 - beta2)
        v_hat = v / (1 - beta2 ** t)
        m_hat = _turn(m, state) / (1 - beta1 ** t)
        update = _turn(m_hat / (v_hat.sqrt() + group["eps"]), state, back=True)
        self._average(g, state, group)
        if t % group["frequency"] == 0:
            for side in _sides(state):
                self._renew(state, side)
        return update

    @staticmethod
    def _count(g: Tensor, state: dict) -> int:
        """Returns the number of steps before this one."""
        if not state:
            state.update(exp_avg=torch.zeros_like(g), exp_avg_sq=torch.zeros_like(g),
                         step=torch.zeros((), dtype=torch.int64))
            return 0
        state["step"] += 1
        return int(state["step"])  # on the CPU: no sync

    @staticmethod
    def _average(g: Tensor, state: dict, group: dict) -> None:
        beta = group["betas"][1] if group["shampoo_beta"] is None else group["shampoo_beta"]
        for side, x in (("left", g), ("right", g.mT)):
            if len(x) <= group["largest"]:
                if side not in state:
                    state[side] = torch.zeros(len(x), len(x), dtype=g.dtype, device=g.device)
                state[side].lerp_(x @ x.mT, 1 - beta)

    @staticmethod
    def _renew(state: dict, side: str) -> None:
        """Turns a basis by one power iteration, its vectors in the order of their eigenvalues."""
        factor, basis, dim = state[side], state[f"{side}_basis"], int(side == "right")
        product = factor @ basis
        order = (basis * product).sum(0).argsort(descending=True)
        state["exp_avg_sq"] = state["exp_avg_sq"].index_select(dim, order)
        state[f"{side}_basis"] = torch.linalg.qr(product[:, order]).Q.contiguous()


def _sides(state: dict) -> list[str]:
    return [side for side in ("left", "right") if side in state]


def _turn(x: Tensor, state: dict, *, back: bool = False) -> Tensor:
    """Returns Q_L^T x Q_R, or with `back` Q_L x Q_R^T."""
    if (left := state.get("left_basis")) is not None:
        x = (left if back else left.mT) @ x
    if (right := state.get("right_basis")) is not None:
        x = x @ (right.mT if back else right)
    return x


class Kron(MatrixOptimizer):
    """Implements PSGD with triangular Kronecker factors (Li, arXiv:1512.04202; Pooladzandi & Li
    2024, arXiv:2402.04553), whitening the momentum.

        M = momentum M + (1 - momentum) g;  Mhat = M / (1 - momentum^t)
        theta -= lr clip(P), P = Q_L^T Q_L Mhat Q_R^T Q_R, after decay

    where clip scales P down to a root mean square of 1.1, and `scale` multiplies it. Now and then,
    with a probability that falls from 1 to 0.03 after the first 500 steps, the upper triangular
    factors follow Mhat:

        A = Q_L Mhat Q_R^T,  B = Q_L^-T V Q_R^-1 with V ~ N(0, I)
        Q_L -= rate triu(A A^T - B B^T) Q_L / |A A^T + B B^T|, Q_R likewise of A^T A and B^T B

    V is drawn from torch's default generator. State: `exp_avg`, `left`, `right` (Q_L, Q_R), `step`,
    and `wait`, the steps since the last update of the factors.
    """

    def __init__(self, params, lr: float = 1e-3, momentum: float = 0.9, weight_decay: float = 0.1,
                 rate: float = 0.1, probability: Callable[[int], float] | float | None = None,
                 scale: float = 1.0):
        require(type(self), lr=(lr, lr >= 0), momentum=(momentum, 0 <= momentum < 1),
                weight_decay=(weight_decay, weight_decay >= 0), rate=(rate, 0 < rate < 1),
                scale=(scale, scale > 0), probability=(probability, probability is None or callable(
                    probability) or 0 < probability <= 1))
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay,
                                      rate=rate, probability=probability, scale=scale))

    def _direction(self, g: Tensor, state: dict, group: dict) -> Tensor:
        if not state:
            state.update(exp_avg=torch.zeros_like(g),
                         left=torch.eye(len(g), dtype=g.dtype, device=g.device),
                         right=torch.eye(g.size(1), dtype=g.dtype, device=g.device),
                         step=torch.zeros((), dtype=torch.int64),
                         wait=torch.zeros((), dtype=torch.int64))
        t, left, right = int(state["step"]), state["left"], state["right"]
        m = state["exp_avg"].lerp_(g, 1 - group["momentum"])
        m_hat = m / (1 - group["momentum"] ** (t + 1))
        state["step"] += 1
        state["wait"] += 1
        if int(state["wait"]) >= 1 / _probability(group["probability"], t):
            state["wait"].zero_()
            self._follow(m_hat, left, right, group["rate"])
        update = left.mT @ (left @ m_hat @ right.mT) @ right
        rms = update.square().mean().sqrt()
        return update * (group["scale"] * (1.1 / (rms + 1e-6)).clamp_max(1))

    @staticmethod
    def _follow(m_hat: Tensor, left: Tensor, right: Tensor, rate: float) -> None:
        a = left @ m_hat @ right.mT
        solve = torch.linalg.solve_triangular
        b = solve(left.mT, solve(right, torch.randn_like(m_hat), upper=True, left=False),
                  upper=False)
        for q, x, y in ((left, a, b), (right, a.mT, b.mT)):
            first, second = x @ x.mT, y @ y.mT
            size = _spectral_norm_bound(first + second) + torch.finfo(torch.bfloat16).tiny
            q.sub_(torch.triu(rate * (first - second)) / size @ q)
        scale = (left.abs().max() / right.abs().max()).sqrt()  # neither grows without the other
        left.div_(scale)
        right.mul_(scale)


def _probability(given: Callable[[int], float] | float | None, step: int) -> float:
    if given is None:
        return min(1.0, max(0.03, math.exp(-0.001 * (step - 500))))
    return given(step) if callable(given) else given


def _spectral_norm_bound(a: Tensor) -> Tensor:
    """Returns a lower bound of a symmetric matrix's spectral norm, near it: one power iteration
    from its longest row."""
    largest = a.abs().max().clamp_min(torch.finfo(a.dtype).tiny)
    a = a / largest
    row = a.index_select(0, a.square().sum(1).argmax().reshape(1)).flatten()
    x = a @ (row / row.norm().clamp_min(torch.finfo(a.dtype).tiny))
    return largest * (a @ (x / x.norm().clamp_min(torch.finfo(a.dtype).tiny))).norm()
