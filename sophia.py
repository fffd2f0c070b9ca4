"""Sophia: clipped momentum preconditioned by a running estimate of the Hessian's diagonal.

Source: Liu, Li, Hall, Liang, Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language
Model Pre-training", arXiv:2305.14342. `Sophia` is Algorithm 3, `gauss_newton_bartlett` Algorithm 2.
One file that needs torch alone; it knows nothing of models, schedules or ranks. Use:

    optimizer = Sophia(model.parameters(), lr=4e-4)
    for t, (x, y) in enumerate(batches):
        if t % 10 == 0:                         # k = 10; before the gradient of the same step
            optimizer.update_hessian(gauss_newton_bartlett(model, x, optimizer.parameters()))
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

Names: the paper's gamma is called rho in the authors' code, which divides by rho * bs * h; their bs
is the number of label positions, here a factor of the estimate itself.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class Sophia(torch.optim.Optimizer):
    r"""Algorithm 3 of the paper, between two calls of `update_hessian`:

        m     = beta1 m + (1 - beta1) g
        theta = theta (1 - lr weight_decay)
        theta = theta - lr clip(m / max(gamma h, eps), -1, 1)

    and at `update_hessian(hhat)`: h = beta2 h + (1 - beta2) hhat. Neither moment is bias-corrected;
    h may be negative (the coordinate then moves by lr sign(m)). Every coordinate moves at most lr.

    Args:
        params: parameters or param groups; each group may have its own value of all that follows.
        lr: learning rate.
        betas: decay of m (per step) and of h (per estimate).
        gamma: larger values clip fewer coordinates; the paper tunes it until 10-50 % are unclipped.
        eps: floor of gamma * h, not added to it.
        weight_decay: decoupled, times lr.

    State, in float32 (float64 for float64 parameters): `exp_avg` (m), `hessian` (h).
    Raises ValueError naming the value that is out of range; RuntimeError on sparse gradients.
    """

    def __init__(self, params, lr: float = 4e-4, betas: tuple[float, float] = (0.96, 0.99),
                 gamma: float = 0.05, eps: float = 1e-12, weight_decay: float = 0.2):
        super().__init__(params, dict(lr=lr, betas=betas, gamma=gamma, eps=eps,
                                      weight_decay=weight_decay))

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group as torch's optimizers do; raises ValueError on values out of range."""
        _check_group(self.defaults | param_group)
        super().add_param_group(param_group)

    def parameters(self) -> list[Tensor]:
        """Every parameter once, in the order of the param groups: the order of estimates."""
        return [p for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def update_hessian(self, estimates: Iterable[Tensor | None]) -> None:
        """Feeds h with one estimate per parameter, in the order of `parameters()`.

        None leaves that parameter's h as it is. Raises ValueError on another count or shape.
        """
        estimates = list(estimates)
        if len(estimates) != len(self.parameters()):
            raise ValueError(f"update_hessian got {len(estimates)} estimates for "
                             f"{len(self.parameters())} parameters; give one each, in the order of "
                             "Sophia.parameters()")
        remaining = iter(estimates)
        for group in self.param_groups:
            for p in group["params"]:
                hhat = next(remaining)
                if hhat is None:
                    continue
                if hhat.shape != p.shape:
                    raise ValueError(f"update_hessian got an estimate of shape {tuple(hhat.shape)} "
                                     f"for a parameter of shape {tuple(p.shape)}")
                h = self._state(p)["hessian"]
                h.lerp_(hhat.to(h.dtype), 1 - group["betas"][1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update from the gradients in `.grad`, which stay untouched; returns closure's loss.

        A parameter whose gradient is None is left alone, decay included.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError("Sophia does not take sparse gradients; make the embedding "
                                       "with sparse=False")
                state = self._state(p)
                sophia_update(p, p.grad, state["exp_avg"], state["hessian"], lr=group["lr"],
                              beta1=group["betas"][0], gamma=group["gamma"], eps=group["eps"],
                              weight_decay=group["weight_decay"])
        return loss

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """Diagnostics of the last step as 0-dim tensors on the parameters' device (no sync).

        `unclipped_fraction`: share of coordinates with |m| < max(gamma h, eps); `hessian_norm` and
        `momentum_norm`: 2-norms of h and m over all parameters.
        """
        groups = [(group, self.state[p]) for group in self.param_groups
                  for p in group["params"] if p in self.state]
        if not groups:
            return {}
        unclipped = [(s["exp_avg"].abs() < (group["gamma"] * s["hessian"]).clamp_min(group["eps"]))
                     .sum() for group, s in groups]
        count = sum(s["exp_avg"].numel() for _, s in groups)
        return {
            "unclipped_fraction": torch.stack(unclipped).sum() / count,
            "hessian_norm": _norm([s["hessian"] for _, s in groups]),
            "momentum_norm": _norm([s["exp_avg"] for _, s in groups]),
        }

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores `state_dict()`, keeping the state's own precision under bf16 parameters."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(order, self.parameters(), strict=True):
            for name, value in saved.get(i, {}).items():
                self.state[p][name] = value.to(p.device, _wide_dtype(p), copy=True)

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            for name in ("exp_avg", "hessian"):
                state[name] = torch.zeros_like(p, dtype=_wide_dtype(p),
                                               memory_format=torch.preserve_format)
        return state


def sophia_update(p: Tensor, g: Tensor, m: Tensor, h: Tensor, *, lr, beta1: float, gamma: float,
                  eps: float, weight_decay: float) -> None:
    """The update rule, in place on parameter p and momentum m; all tensors of one shape."""
    m.lerp_(g.to(m.dtype), 1 - beta1)
    update = m / (gamma * h).clamp_min_(eps)
    update.clamp_(-1, 1)
    p.copy_(p.to(m.dtype) * (1 - lr * weight_decay) - lr * update)


def gauss_newton_bartlett(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    params: Sequence[Tensor],
    *,
    uniforms: Tensor | None = None,
    mask: Tensor | None = None,
    num_classes: int | None = None,
    chunk_size: int | None = None,
    micro_batch_size: int | None = None,
    all_reduce: Callable[[list[Tensor]], None] | None = None,
) -> list[Tensor]:
    """Gauss-Newton-Bartlett estimate of the Hessian's diagonal (Algorithm 2): one tensor per param.

    Labels y_i are drawn from the model's own softmax at n positions; S is the gradient of the
    summed cross-entropy on them; hhat = S * S / n, which is the paper's n * ghat * ghat for the
    mean's gradient ghat = S / n. `.grad` is neither read nor written.

    Args:
        model: maps inputs (rows, ...) to logits (rows, ..., V), one label position per leading
            index; compiled or wrapped in autocast as the caller likes, without gradient hooks.
        inputs: (rows, ...).
        params: what to differentiate by, usually `optimizer.parameters()`.
        uniforms: numbers in [0, 1), one per label position (the logits' shape without V); drawn
            from torch's global generator when None.
        mask: booleans like `uniforms`; False positions have no label (padding, ignored targets).
        num_classes: only the first so many classes are drawn (the rest of V is padding).
        chunk_size: rows squared together. None: all rows of all ranks in one square, the paper's
            way. Otherwise hhat = sum_c S_c * S_c / n over chunks c of so many rows: the same
            expectation, and with C chunks a relative deviation of sqrt(2/C) instead of sqrt(2).
        micro_batch_size: rows per forward pass, to bound memory; no effect on the result.
        all_reduce: sums a list of tensors over ranks in place, when each rank has its own rows.

    Raises ValueError without rows. Where no position is left to label, hhat is 0.
    """
    params = list(params)
    rows = inputs.size(0)
    if rows == 0:
        raise ValueError("gauss_newton_bartlett needs at least one row of inputs")
    squares: list[Tensor] | None = None
    count = torch.zeros((), dtype=torch.int64, device=params[0].device)
    for first in range(0, rows, chunk_size or rows):
        chunk = slice(first, min(first + (chunk_size or rows), rows))
        gradient, n = _sampled_gradient(model, inputs, params, chunk, micro_batch_size or rows,
                                        uniforms, mask, num_classes)
        count += n
        if all_reduce is not None and chunk_size is None:
            all_reduce([*gradient, count])
        torch._foreach_mul_(gradient, gradient)
        if squares is None:
            squares = gradient
        else:
            torch._foreach_add_(squares, gradient)
    if all_reduce is not None and chunk_size is not None:
        all_reduce([*squares, count])
    torch._foreach_div_(squares, count.to(squares[0].dtype).clamp_min(1))
    return squares


def _sampled_gradient(model, inputs, params, chunk: slice, micro_batch_size: int, uniforms, mask,
                      num_classes) -> tuple[list[Tensor], Tensor]:
    """Gradient of the summed loss on sampled labels of the rows `chunk`; number of labels."""
    total, count = None, 0
    for first in range(chunk.start, chunk.stop, micro_batch_size):
        rows = slice(first, min(first + micro_batch_size, chunk.stop))
        with torch.enable_grad():
            logits = model(inputs[rows])
            logits = logits.reshape(-1, logits.size(-1))  # (n, V)
            with torch.no_grad():
                u = (torch.rand(logits.size(0), device=logits.device) if uniforms is None
                     else uniforms[rows].reshape(-1).to(logits.device))
                labels = sample_labels(logits, u, num_classes)  # (n,)
                if mask is not None:
                    labels.masked_fill_(~mask[rows].reshape(-1).to(labels.device), -100)
                count = count + (labels != -100).sum()
            loss = F.cross_entropy(logits.to(_wide_dtype(logits)), labels, reduction="sum")
        gradient = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        if total is None:
            total = _separate(gradient)
        else:
            torch._foreach_add_(total, gradient)
    return total, count


def _separate(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients safe to work on in place: autograd may return one tensor for two parameters."""
    seen, own = set(), []
    for g in gradients:
        if not g.is_contiguous() or g.data_ptr() in seen:
            g = g.clone(memory_format=torch.contiguous_format)
        seen.add(g.data_ptr())
        own.append(g)
    return own


@torch.no_grad()
def sample_labels(logits: Tensor, uniforms: Tensor, num_classes: int | None = None) -> Tensor:
    """Exact draws from softmax(logits): class ids (n,) for logits (n, V) and uniforms (n,).

    Inverse CDF in float32 (float64 for float64 logits): the first class whose cumulative
    probability exceeds the uniform. Only the first `num_classes` classes can be drawn.
    """
    logits = logits[:, :num_classes]
    cdf = F.softmax(logits, dim=-1, dtype=_wide_dtype(logits)).cumsum_(dim=-1)
    threshold = uniforms.to(cdf.dtype).unsqueeze(1) * cdf[:, -1:]  # (n, 1)
    labels = torch.searchsorted(cdf, threshold, right=True).squeeze(1)
    return labels.clamp_max_(logits.size(1) - 1)


def _check_group(group: dict) -> None:
    beta1, beta2 = group["betas"]
    for name, value, legal, range_ in (
        ("lr", group["lr"], group["lr"] >= 0, "at least 0"),
        ("beta1", beta1, 0 <= beta1 < 1, "in [0, 1)"),
        ("beta2", beta2, 0 <= beta2 < 1, "in [0, 1)"),
        ("gamma", group["gamma"], group["gamma"] > 0, "above 0"),
        ("eps", group["eps"], group["eps"] > 0, "above 0"),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, "at least 0"),
    ):
        if not legal:
            raise ValueError(f"Sophia: {name} = {value} must be {range_}")


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
