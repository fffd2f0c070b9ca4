"""Sophia: clipped momentum preconditioned by a running estimate of the Hessian's diagonal.

Source: Liu, Li, Hall, Liang, Ma, "Sophia: A Scalable Stochastic Second-order Optimizer for Language
Model Pre-training", arXiv:2305.14342. `Sophia` is Algorithm 3, `hutchinson` Algorithm 1,
`gauss_newton_bartlett` Algorithm 2. One file that needs torch alone; it knows nothing of models,
schedules or ranks. Use:

    optimizer = SophiaG(model.parameters(), lr=4e-4)
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

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from itertools import repeat
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

# Of the controlled gamma: weight of the past, coordinates looked at per row and per tensor.
CONTROL_MEMORY, CONTROL_PER_ROW, CONTROL_PER_TENSOR = 0.8, 64, 4096


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
        compiled: run the update through torch.compile, one kernel per tensor; same numbers to
            rounding.

    Not in the paper, off by default:
        bias_correction: divide h by 1 - beta2^(number of estimates).
        gamma_target: above 0, each parameter tensor has its own gamma in place of `gamma`, set
            after every estimate so that this fraction of it is unclipped (`control_gamma`).
        gamma_rows: with gamma_target, one gamma per row of a matrix instead of one per tensor.

    State, in float32 (float64 for float64 parameters): `exp_avg` (m), `hessian` (h), `estimates`
    (their number, on the CPU), and under gamma_target `gamma`, shape (rows, 1, ...) or (). Raises
    ValueError naming the value that is out of range; RuntimeError on sparse gradients.

    Where the attribute `found_inf` (torch's name for it, a 0-dim tensor set from outside) is not
    0, `step` and `update_hessian` change no parameter, m, h or gamma; a compiled step finds that
    out on the device, without a host sync (and then still counts the estimate).
    """

    found_inf: Tensor | None = None

    def __init__(self, params, lr: float = 4e-4, betas: tuple[float, float] = (0.96, 0.99),
                 gamma: float = 0.05, eps: float = 1e-12, weight_decay: float = 0.2, *,
                 compiled: bool = False, bias_correction: bool = False, gamma_target: float = 0.0,
                 gamma_rows: bool = False):
        super().__init__(params, dict(
            lr=lr, betas=betas, gamma=gamma, eps=eps, weight_decay=weight_decay, compiled=compiled,
            bias_correction=bias_correction, gamma_target=gamma_target, gamma_rows=gamma_rows))

    _estimated = False  # an estimate came since the last step

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group as torch's optimizers do; raises ValueError on values out of range."""
        _check_group(type(self).__name__, self.defaults | param_group)
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
                             "parameters()")
        for p, hhat in zip(self.parameters(), estimates, strict=True):
            if hhat is not None and hhat.shape != p.shape:
                raise ValueError(f"update_hessian got an estimate of shape {tuple(hhat.shape)} for "
                                 f"a parameter of shape {tuple(p.shape)}")
        refused = self._refused("bias_correction", "gamma_target")
        if refused is True:
            return
        remaining = iter(estimates)
        for group in self.param_groups:
            for p in group["params"]:
                hhat = next(remaining)
                if hhat is not None:
                    state = self._state(p)
                    state["estimates"] += 1
                    h = state["hessian"]
                    hhat = self._curvature(hhat.to(h.dtype))
                    if refused is not None:
                        hhat = torch.where(refused != 0, h, hhat)
                    h.lerp_(hhat, 1 - group["betas"][1])
        self._estimated = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """One update from the gradients in `.grad`, which stay untouched; returns closure's loss.

        A parameter whose gradient is None is left alone, decay included.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        refused = self._refused(*["gamma_target"] * self._estimated)
        if refused is True:
            return loss
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not take sparse gradients; "
                                       "make the embedding with sparse=False")
                state = self._state(p)
                if group["gamma_target"] and self._estimated and p.numel():
                    state["gamma"] = control_gamma(
                        state.get("gamma"), p.grad, state["exp_avg"], state["hessian"],
                        beta1=group["betas"][0], target=group["gamma_target"],
                        rows=group["gamma_rows"] and p.dim() >= 2)
                self._update(p, state, group, refused)
        self._estimated = False
        return loss

    def _refused(self, *unless: str) -> Tensor | bool | None:
        """`found_inf` for masking on the device; True or None where the host must know it: in an
        eager step, in a subclass with its own rule, and where one of the options is set."""
        if self.found_inf is None:
            return None
        if type(self)._update is Sophia._update and all(
                g["compiled"] and not any(g[option] for option in unless)
                for g in self.param_groups):
            return self.found_inf
        return bool(self.found_inf) or None  # host sync

    def _update(self, p: Tensor, state: dict, group: dict, refused: Tensor | None) -> None:
        update = _run_compiled if group["compiled"] else _run_eager
        tensors = (p, p.grad, state["exp_avg"], state["hessian"], _gamma(state, group))
        update(*map(_local, tensors), group["lr"], 1 - group["lr"] * group["weight_decay"],
               group["betas"][0], group["eps"], refused)

    def _curvature(self, hhat: Tensor) -> Tensor:
        """What h averages."""
        return hhat

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """Diagnostics of the last step, 0-dim tensors on the parameters' device (no host sync).

        `unclipped_fraction`: share of coordinates with |m| < max(gamma h, eps), over all, and as
        `unclipped/KIND` over the groups that carry a `kind`. `hessian_norm`, `momentum_norm`,
        `update_norm`, `parameter_norm`: 2-norms over all. `hessian_floor_fraction`: share with
        h <= eps. `gamma`: geometric mean over parameters and rows, under gamma_target.
        """
        seen = [(group, p, self.state[p]) for group in self.param_groups for p in group["params"]
                if p in self.state]
        if not seen:
            return {}
        unclipped, floor, updates, kinds, gammas = [], [], [], {}, []
        for group, p, state in seen:
            m, h = state["exp_avg"], state["hessian"]
            denominator = (_gamma(state, group) * h).clamp_min_(group["eps"])
            unclipped.append((m.abs() < denominator).sum())
            updates.append((m / denominator).clamp_(-1, 1).norm() * group["lr"])
            floor.append((h <= group["eps"]).sum())
            kinds.setdefault(group.get("kind"), []).append((unclipped[-1], p.numel()))
            if group["gamma_target"] and "gamma" in state:
                gammas.append(_whole(state["gamma"]).flatten())
        count = sum(p.numel() for _, p, _ in seen)
        found = {
            "unclipped_fraction": torch.stack(unclipped).sum() / count,
            **{f"unclipped/{kind}": torch.stack([c for c, _ in of]).sum() / sum(n for _, n in of)
               for kind, of in kinds.items() if kind},
            "hessian_norm": _norm([state["hessian"] for _, _, state in seen]),
            "momentum_norm": _norm([state["exp_avg"] for _, _, state in seen]),
            "update_norm": torch.linalg.vector_norm(torch.stack(updates)),
            "parameter_norm": _norm([p.detach() for _, p, _ in seen]),
            "hessian_floor_fraction": torch.stack(floor).sum() / count,
        }
        if gammas:
            gamma = torch.cat(gammas)
            found["gamma"] = torch.where(gamma > 0, gamma.log(), 0).sum().div(
                (gamma > 0).sum().clamp_min(1)).exp()
        return {name: _whole(value) for name, value in found.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores `state_dict()`, keeping the state's own precision under bf16 parameters."""
        super().load_state_dict(state_dict)
        saved = state_dict["state"]
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(order, self.parameters(), strict=True):
            for name, value in saved.get(i, {}).items():
                place = "cpu" if name == "estimates" else p.device
                self.state[p][name] = value.to(place, _wide_dtype(p), copy=True)

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            for name in ("exp_avg", "hessian"):
                state[name] = torch.zeros_like(p, dtype=_wide_dtype(p),
                                               memory_format=torch.preserve_format)
            state["estimates"] = torch.zeros((), dtype=_wide_dtype(p))
        return state


class SophiaG(Sophia):
    """Sophia as the paper runs it with `gauss_newton_bartlett`: gamma .05, 240 examples, k = 10."""


class SophiaH(Sophia):
    """Sophia as the paper runs it with `hutchinson`: gamma .01, 32 examples, k = 10."""

    def __init__(self, params, lr: float = 4e-4, betas: tuple[float, float] = (0.96, 0.99),
                 gamma: float = 0.01, eps: float = 1e-12, weight_decay: float = 0.2, **options):
        super().__init__(params, lr, betas, gamma, eps, weight_decay, **options)


def sophia_update(p: Tensor, g: Tensor, m: Tensor, h: Tensor, gamma, lr, decay, beta1: float,
                  eps: float, refused: Tensor | None = None) -> None:
    """The update rule, in place on p and m. `decay` is 1 - lr * weight_decay.

    p, g, m, h have one shape; gamma is a number or a tensor that broadcasts; lr and decay are
    numbers or 0-dim tensors (so that a compiled version serves every step). Where `refused`, 0-dim,
    is not 0, p and m stay as they are.
    """
    g = g.to(m.dtype)
    if refused is not None:  # then g becomes m, lr 0 and decay 1
        g = torch.where(refused != 0, m, g)
        lr = torch.where(refused != 0, 0, lr)
        decay = torch.where(refused != 0, 1, decay)
    m.lerp_(g, 1 - beta1)
    update = h * gamma
    update = torch.div(m, update.clamp_min_(eps), out=update).clamp_(-1, 1)
    wide = p.to(m.dtype)  # p itself unless its precision is lower
    wide.mul_(decay).sub_(update.mul_(lr))
    if wide is not p:
        p.copy_(wide)


def _run_eager(p: Tensor, g: Tensor, m: Tensor, h: Tensor, gamma, *numbers) -> None:
    """sophia_update; on a CPU by slices of rows, each in its cache from line to line."""
    if p.device.type != "cpu" or p.dim() == 0 or p.numel() <= _IN_CACHE:
        return sophia_update(p, g, m, h, gamma, *numbers)
    rows = max(1, _IN_CACHE // p[0].numel())
    gammas = gamma.split(rows) if isinstance(gamma, Tensor) and gamma.dim() else repeat(gamma)
    for *parts, part_gamma in zip(*(x.split(rows) for x in (p, g, m, h)), gammas, strict=False):
        sophia_update(*parts, part_gamma, *numbers)
    return None


_IN_CACHE = 2**16  # coordinates


@cache
def _compiled_update():
    return torch.compile(sophia_update, dynamic=True)


def _run_compiled(p, g, m, h, gamma, lr, decay, beta1: float, eps: float, refused) -> None:
    """sophia_update through one compiled function for tensors of all sizes and all steps."""
    if not isinstance(gamma, Tensor):
        gamma = torch.tensor(gamma, dtype=torch.float64)
    tensors = (p.detach(), g, m, h)
    if gamma.dim() == 0 and all(x.is_contiguous() for x in tensors):
        tensors = tuple(x.view(-1) for x in tensors)
    lr, decay = (torch.as_tensor(x, dtype=torch.float64) for x in (lr, decay))
    _compiled_update()(*tensors, gamma, lr, decay, beta1, eps, refused)


def control_gamma(old: Tensor | None, g: Tensor, m: Tensor, h: Tensor, *, beta1: float,
                  target: float, rows: bool) -> Tensor:
    """The gamma under which a fraction `target` of the coming step's coordinates is unclipped.

    It is the target-quantile of |m| / h over coordinates with positive h, m as the coming step will
    have it, averaged in the logarithm with the `old` one. A sample of coordinates serves: the cost
    does not grow with the tensor. h's missing bias correction cancels. One per tensor, shape (), or
    with `rows` one per row, shape (rows, 1, ...). 0 until there has been a positive curvature.
    """
    shape = (-1, *[1] * (g.dim() - 1)) if rows else ()
    g, m, h = (_sample(x, rows) for x in (g, m, h))  # (rows, n) or (1, n)
    ratio = torch.where(h > 0, m.lerp(g.to(m.dtype), 1 - beta1).abs() / h, math.inf)
    positive = (h > 0).sum(dim=1, keepdim=True)
    place = (target * positive).ceil().long().sub_(1).clamp_min_(0)
    new = ratio.sort(dim=1).values.gather(1, place).view(shape)
    if old is None or old.shape != new.shape:  # the first, or of another granularity
        old = torch.zeros_like(new)
    smooth = torch.exp(CONTROL_MEMORY * old.log() + (1 - CONTROL_MEMORY) * new.log())
    usable = torch.isfinite(new) & (new > 0)
    return torch.where(usable, torch.where(old > 0, smooth, new), old)


def _sample(x: Tensor, rows: bool) -> Tensor:
    """Evenly spaced coordinates: (rows, n) of every row, or (1, n) of the whole tensor."""
    x = x.flatten(1) if x.dim() > 1 else x.reshape(-1, 1)
    x = x[:, ::-(-x.size(1) // CONTROL_PER_ROW)]  # (rows, n)
    if rows:
        return x
    x = _whole(x)  # of a shard, the sample of all ranks: a small part of the tensor
    return x[::-(-x.numel() // CONTROL_PER_TENSOR)].reshape(1, -1)


def _local(x):
    """This rank's part of a sharded tensor (FSDP2); anything else as it is."""
    return x.to_local() if hasattr(x, "to_local") else x


def _whole(x: Tensor) -> Tensor:
    """A sharded tensor gathered on every rank; any other as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def _gamma(state: dict, group: dict):
    """What multiplies h: a number or a tensor that broadcasts."""
    if group["gamma_target"] and "gamma" in state:  # has the correction in it
        return state["gamma"]
    count = state["estimates"].item() if group["bias_correction"] else 0  # on the CPU: no sync
    return group["gamma"] / (1 - group["betas"][1] ** count) if count else group["gamma"]


def hutchinson(losses: Iterable[Callable[[], Tensor]], params: Sequence[Tensor], *,
               generator: torch.Generator | None = None) -> list[Tensor]:
    """Hutchinson's estimate of the Hessian's diagonal (Algorithm 1): one tensor per param.

    hhat = u * (H u) with u ~ N(0, I); its expectation is diag(H), which may be negative. `.grad` is
    neither read nor written.

    Args:
        losses: functions that each compute a scalar; H is the Hessian of their sum. Give one per
            micro-batch: each is differentiated twice and freed before the next is called.
        params: what to differentiate by, usually `optimizer.parameters()`.
        generator: of u, on the params' device. Ranks that average their results must use one seed.

    Attention inside runs on the math kernel, the only one with a second derivative. Raises
    RuntimeError where the loss has none (a fused kernel forced inside, a compiled module).
    """
    params = list(params)
    u = [torch.randn(p.shape, generator=generator, device=p.device, dtype=_wide_dtype(p))
         for p in params]
    total = [torch.zeros_like(x) for x in u]
    for loss in losses:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            try:
                gradient = torch.autograd.grad(loss(), params, create_graph=True,
                                               materialize_grads=True, allow_unused=True)
                slope = sum((g * x).sum() for g, x in zip(gradient, u, strict=True))
                product = torch.autograd.grad(slope, params, materialize_grads=True,
                                              allow_unused=True)
            except RuntimeError as error:
                if not any(words in str(error) for words in _NO_SECOND_DERIVATIVE):
                    raise
                raise RuntimeError("hutchinson needs second derivatives, which fused attention "
                                   "kernels and torch.compile do not have: give it the uncompiled "
                                   "module, without a forced attention kernel") from error
        torch._foreach_add_(total, [x.to(t.dtype) for x, t in zip(product, total, strict=True)])
    torch._foreach_mul_(total, u)
    return total


_NO_SECOND_DERIVATIVE = ("derivative for aten::", "is not implemented", "double backward",
                         "does not support", "No available kernel")


def gauss_newton_bartlett(
    model: Callable[[Tensor], Tensor],
    inputs: Tensor,
    params: Sequence[Tensor],
    *,
    uniforms: Tensor | None = None,
    mask: Tensor | None = None,
    num_classes: int | None = None,
    likelihood: Literal["categorical", "gaussian"] = "categorical",
    own_loss: bool = False,
    chunk_size: int | None = None,
    micro_batch_size: int | None = None,
    all_reduce: Callable[[list[Tensor]], None] | None = None,
    accumulate: Callable[[Tensor, bool], list[Tensor] | None] | None = None,
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
            from torch's global generator when None. For "gaussian" standard normal numbers, of the
            outputs' whole shape.
        mask: booleans like `uniforms`; False positions have no label (padding, ignored targets).
        num_classes: only the first so many classes are drawn (the rest of V is padding).
        likelihood: "categorical" for cross-entropy; "gaussian" for half the squared error summed
            over V, where the outputs are means of unit variance (the paper, section 2.3).
        own_loss: the model computes the categorical loss itself, in a compiled graph or without
            all logits at once: `model(inputs, uniforms, sample_labels_fn=f)` gives the mean loss on
            the labels `f(probabilities (n, V), uniforms (n,))` that are not -100. Needs `uniforms`,
            and a position that counts in every micro-batch.
        chunk_size: rows squared together. None: all rows of all ranks in one square, the paper's
            way. Otherwise hhat = sum_c S_c * S_c / n over chunks c of so many rows: the same
            expectation, and with C chunks a relative deviation of sqrt(2/C) instead of sqrt(2).
        micro_batch_size: rows per forward pass, to bound memory; no effect on the result.
        all_reduce: sums a list of tensors over ranks in place, when each rank has its own rows.
        accumulate: for parameters whose gradients only `backward` reaches (FSDP2's shards).
            `accumulate(loss, last)` adds up the gradients of losses, and at the last one returns
            their sum over all ranks and starts anew. A chunk then has the rows of all ranks.

    Raises ValueError without rows. Where no position is left to label, hhat is 0.
    """
    sampled_loss = dict(categorical=_categorical_loss, gaussian=_gaussian_loss)[likelihood]
    label = partial(draw_labels, num_classes=num_classes)

    def summed_loss(rows: slice) -> tuple[Tensor, Tensor]:
        if own_loss:
            noise = uniforms[rows].to(inputs.device)
            if mask is not None:
                noise = noise.masked_fill(~mask[rows].to(noise.device), -1)
            n = (noise >= 0).sum()
            return model(inputs[rows], noise, sample_labels_fn=label) * n, n
        outputs = model(inputs[rows])
        outputs = outputs.reshape(-1, outputs.size(-1))  # (n, V)
        noise = None if uniforms is None else uniforms[rows].to(outputs.device)
        kept = None if mask is None else mask[rows].reshape(-1).to(outputs.device)
        return sampled_loss(outputs, noise, kept, num_classes)

    return _squared_gradients(summed_loss, len(inputs), params, chunk_size, micro_batch_size,
                              all_reduce, accumulate)


def empirical_fisher(model: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor,
                     params: Sequence[Tensor], *, own_loss: bool = False,
                     chunk_size: int | None = None, micro_batch_size: int | None = None,
                     all_reduce: Callable[[list[Tensor]], None] | None = None,
                     accumulate: Callable[[Tensor, bool], list[Tensor] | None] | None = None,
                     ) -> list[Tensor]:
    """n * g * g for the gradient g of the mean cross-entropy on the true labels (E-F of Fig. 7).

    Not an estimate of the Gauss-Newton diagonal; the paper's ablation of it. `targets` are class
    ids of the shape of the logits without V, -100 where they do not count; the rest is as in
    `gauss_newton_bartlett`; with `own_loss` `model(inputs, targets)` gives the mean loss.
    """
    def summed_loss(rows: slice) -> tuple[Tensor, Tensor]:
        if own_loss:
            n = (targets[rows] != -100).sum()
            return model(inputs[rows], targets[rows]) * n, n
        logits = model(inputs[rows])
        labels = targets[rows].reshape(-1)
        logits = logits.reshape(-1, logits.size(-1))  # (n, V)
        loss = F.cross_entropy(logits.to(_wide_dtype(logits)), labels, reduction="sum")
        return loss, (labels != -100).sum()

    return _squared_gradients(summed_loss, len(inputs), params, chunk_size, micro_batch_size,
                              all_reduce, accumulate)


def _squared_gradients(summed_loss: Callable[[slice], tuple[Tensor, Tensor]], rows: int,
                       params: Sequence[Tensor], chunk_size: int | None,
                       micro_batch_size: int | None, all_reduce, accumulate) -> list[Tensor]:
    """sum_c S_c * S_c / n: S_c the gradient of `summed_loss` over chunk c, n all its counts."""
    params = list(params)
    if rows == 0:
        raise ValueError("a curvature estimate needs at least one row of inputs")
    summed_already = accumulate is not None
    accumulate = accumulate or _accumulator(params)
    squares: list[Tensor] | None = None
    count = torch.zeros((), dtype=torch.int64, device=params[0].device)
    step = chunk_size or rows
    for first in range(0, rows, step):
        last = min(first + step, rows)
        size = micro_batch_size or step
        for start in range(first, last, size):
            with torch.enable_grad():
                loss, n = summed_loss(slice(start, min(start + size, last)))
            gradient = accumulate(loss, start + size >= last)
            count += n
        if all_reduce is not None and chunk_size is None and not summed_already:
            all_reduce([*gradient, count])
        torch._foreach_mul_(gradient, gradient)
        if squares is None:
            squares = gradient
        else:
            torch._foreach_add_(squares, gradient)
    if all_reduce is not None and (chunk_size is not None or summed_already):
        all_reduce([count] if summed_already else [*squares, count])
    torch._foreach_div_(squares, count.to(squares[0].dtype).clamp_min(1))
    return squares


def _accumulator(params: list[Tensor]) -> Callable[[Tensor, bool], list[Tensor] | None]:
    """Adds up gradients of losses without touching `.grad`, on this rank alone."""
    gradient: list[Tensor] = []

    def accumulate(loss: Tensor, last: bool) -> list[Tensor] | None:
        nonlocal gradient
        part = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        if gradient:
            torch._foreach_add_(gradient, part)
        else:
            gradient = _separate(part)
        if not last:
            return None
        done, gradient = gradient, []
        return done

    return accumulate


def _categorical_loss(logits: Tensor, uniforms: Tensor | None, mask: Tensor | None,
                      num_classes: int | None) -> tuple[Tensor, Tensor]:
    """Cross-entropy summed over sampled labels, and their number; logits (n, V), mask (n,)."""
    if uniforms is None:
        uniforms = torch.rand(logits.size(0), device=logits.device)
    labels = sample_labels(logits.detach(), uniforms.reshape(-1), num_classes)  # (n,)
    if mask is not None:
        labels.masked_fill_(~mask, -100)
    loss = F.cross_entropy(logits.to(_wide_dtype(logits)), labels, reduction="sum")
    return loss, (labels != -100).sum()


def _gaussian_loss(means: Tensor, noise: Tensor | None, mask: Tensor | None,
                   num_classes: int | None) -> tuple[Tensor, Tensor]:
    """Half the squared error summed over sampled targets, and their number; means (n, V)."""
    means = means.to(_wide_dtype(means))
    noise = torch.randn_like(means) if noise is None else noise.reshape(means.shape)
    if mask is None:
        mask = torch.ones(means.size(0), dtype=torch.bool, device=means.device)
    # The residual mean - target of a target drawn around the mean is the noise itself.
    return -(means * noise.to(means.dtype) * mask.unsqueeze(1)).sum(), mask.sum()


def _separate(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Gradients safe to work on in place: autograd may return one tensor for two parameters."""
    seen, own = set(), []
    for g in gradients:
        if not g.is_contiguous() or g.data_ptr() in seen:
            g = g.clone(memory_format=torch.contiguous_format)
        seen.add(g.data_ptr())
        own.append(g)
    return own


def sample_labels(logits: Tensor, uniforms: Tensor, num_classes: int | None = None) -> Tensor:
    """Exact draws from softmax(logits): class ids (n,) for logits (n, V) and uniforms (n,).

    In float32 (float64 for float64 logits); the rest is `draw_labels`'.
    """
    return draw_labels(F.softmax(logits, dim=-1, dtype=_wide_dtype(logits)), uniforms, num_classes)


@torch.no_grad()
def draw_labels(weights: Tensor, uniforms: Tensor, num_classes: int | None = None) -> Tensor:
    """Class ids (n,) drawn with probabilities in the ratio of `weights` (n, V), at least 0.

    By the inverse of the cumulative distribution at `uniforms` (n,) in [0, 1): first the block of
    classes, then the class in it, which costs less than one long cumulative sum. Only the first
    `num_classes` classes can be drawn. Negative uniforms draw nothing and give -100.
    """
    K = num_classes or weights.size(1)
    blocks = K // _BLOCK
    sums = weights[:, :blocks * _BLOCK].unflatten(1, (blocks, _BLOCK)).sum(-1)  # (n, blocks)
    if K % _BLOCK:
        sums = torch.cat([sums, weights[:, blocks * _BLOCK:K].sum(1, keepdim=True)], dim=1)
    cdf = sums.cumsum(1)
    block, before = _first_above(cdf, uniforms.to(cdf.dtype).unsqueeze(1) * cdf[:, -1:])
    place = block * _BLOCK + torch.arange(_BLOCK, device=weights.device)  # (n, _BLOCK)
    inside = weights.gather(1, place.clamp_max(K - 1)).masked_fill_(place >= K, 0).cumsum(1)
    within, _ = _first_above(inside, uniforms.unsqueeze(1) * cdf[:, -1:] - before)
    labels = (block * _BLOCK + within).squeeze(1).clamp_max_(K - 1)  # where not finite
    return torch.where(uniforms < 0, -100, labels)


_BLOCK = 128  # classes


def _first_above(cdf: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """The first place (n, 1) of each row (n, K) above the threshold (n, 1), a possible one whatever
    the rounding, and the row's value before it. Of a row that is not finite, up to K."""
    below_all = cdf[:, -1:] * (1 - torch.finfo(cdf.dtype).eps)
    threshold = threshold.to(cdf.dtype).clamp_min(0).minimum(below_all)
    place = torch.searchsorted(cdf, threshold, right=True)
    before = torch.where(place > 0, cdf.gather(1, (place - 1).clamp_min(0)), 0)
    return place, before


def _check_group(name: str, group: dict) -> None:
    beta1, beta2 = group["betas"]
    for key, value, legal, range_ in (
        ("lr", group["lr"], group["lr"] >= 0, "at least 0"),
        ("beta1", beta1, 0 <= beta1 < 1, "in [0, 1)"),
        ("beta2", beta2, 0 <= beta2 < 1, "in [0, 1)"),
        ("gamma", group["gamma"], group["gamma"] > 0, "above 0"),
        ("eps", group["eps"], group["eps"] > 0, "above 0"),
        ("weight_decay", group["weight_decay"], group["weight_decay"] >= 0, "at least 0"),
        ("gamma_target", group["gamma_target"], 0 <= group["gamma_target"] < 1, "in [0, 1)"),
    ):
        if not legal:
            raise ValueError(f"{name}: {key} = {value} must be {range_}")


def _wide_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(tensors)))
