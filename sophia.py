"""Sophia: clipped momentum preconditioned by a running estimate of the Hessian's diagonal.

Source: Liu et al., "Sophia: A Scalable Stochastic Second-order Optimizer for Language Model
Pre-training", arXiv:2305.14342. `Sophia` is Algorithm 3, `hutchinson` Algorithm 1 and
`gauss_newton_bartlett` Algorithm 2. The file needs torch alone. Use:

    optimizer = SophiaG(model.parameters(), lr=4e-4)
    for t, (x, y) in enumerate(batches):
        if t % 10 == 0:                         # k = 10; before the gradient of the same step
            losses = [lambda: sampled_cross_entropy(model(x))]
            optimizer.update_hessian(gauss_newton_bartlett(losses, optimizer.parameters()))
        F.cross_entropy(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

The paper's gamma is called rho in the authors' code, which divides by rho * bs * h; their bs is the
number of labels, which here is a factor of the estimate itself.
"""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

Losses = Iterable[Callable[[], tuple[Tensor, Tensor]]]  # each gives a summed loss, and of how many
AllReduce = Callable[[list[Tensor]], None] | None  # sums tensors over ranks, in place


def sum_over_process_group(tensors: list[Tensor]) -> None:
    """Sums tensors in place over the ranks of torch's default process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        for tensor in tensors:
            dist.all_reduce(tensor)


def sophia_update(theta: Tensor, g: Tensor, m: Tensor, h: Tensor, gamma, lr, decay, beta1: float,
                  eps: float, skip: Tensor | None = None) -> None:
    """Applies the update rule in place on theta and m; `decay` is 1 - lr * weight_decay.

    theta, g, m, h have one shape; gamma is a number or a tensor that broadcasts; lr and decay are
    numbers or 0-dim tensors. Where `skip`, 0-dim, is not 0, theta and m stay as they are.
    """
    g = g.to(m.dtype)
    if skip is not None:
        g, lr, decay = (torch.where(skip != 0, neutral, x)
                        for neutral, x in ((m, g), (0, lr), (1, decay)))
    m.lerp_(g, 1 - beta1)
    denominator = (h * gamma).clamp_min_(eps)
    clipped = torch.div(m, denominator, out=denominator).clamp_(-1, 1)  # reuses its memory
    precise = theta.to(m.dtype)  # theta itself unless its precision is lower
    precise.mul_(decay).sub_(clipped.mul_(lr))
    if precise is not theta:
        theta.copy_(precise)


class Sophia(torch.optim.Optimizer):
    r"""Implements Algorithm 3 of the paper. Each step computes

        m     = beta1 m + (1 - beta1) g
        theta = theta (1 - lr weight_decay)
        theta = theta - lr clip(m / max(gamma h, eps), -1, 1)

    and each `update_hessian(hhat)` h = beta2 h + (1 - beta2) hhat. Moments are not bias-corrected;
    h may be negative, the coordinate then moves by lr sign(m); none moves by more than lr.

    Args:
        params: parameters or param groups; each group may have its own value of all that follows.
        lr: learning rate.
        betas: decay of m (per step) and of h (per estimate).
        gamma: larger values clip fewer coordinates; the paper tunes it until 10-50 % are unclipped.
        eps: floor of gamma * h, not added to it.
        weight_decay: decoupled, times lr.

    State, in float32 (float64 for float64 parameters): `exp_avg` (m), `hessian` (h), `estimates`
    (their number, on the CPU). Raises ValueError on values out of range and complex parameters,
    RuntimeError on sparse gradients. Where the attribute `found_inf` (as torch calls it, a 0-dim
    tensor) is not 0, nothing but the number of estimates changes; where it is None, so it is after
    an estimate that is not finite, which `nonfinite_estimates` counts. `rule` may be set to a
    faster form of `sophia_update`.
    """

    found_inf: Tensor | None = None
    nonfinite_estimates: int | Tensor = 0
    rule = staticmethod(sophia_update)
    update_reads_skip = False  # of a subclass whose own _update does nothing where `skip` is not 0

    def __init__(self, params, lr: float = 4e-4, betas: tuple[float, float] = (0.96, 0.99),
                 gamma: float = 0.05, eps: float = 1e-12, weight_decay: float = 0.2, **kwargs):
        super().__init__(params, dict(lr=lr, betas=betas, gamma=gamma, eps=eps,
                                      weight_decay=weight_decay, **kwargs))

    def add_param_group(self, param_group: dict) -> None:
        """Adds a group as torch's optimizers do; raises ValueError on values out of range."""
        group, name = self.defaults | param_group, type(self).__name__
        if not isinstance(group["betas"], tuple | list) or len(group["betas"]) != 2:
            raise ValueError(f"{name}: betas = {group['betas']!r} must be a pair of numbers")
        values = dict(zip(("beta1", "beta2"), group["betas"], strict=True)) | group
        for keys, is_legal, legal_range in (
                (("beta1", "beta2"), lambda x: 0 <= x < 1, "in [0, 1)"),
                (("lr", "weight_decay"), lambda x: 0 <= x < math.inf, "at least 0"),
                (("gamma", "eps"), lambda x: 0 < x < math.inf, "above 0")):
            for key in keys:
                if isinstance(values[key], str | list | tuple | None) or not is_legal(values[key]):
                    raise ValueError(f"{name}: {key} = {values[key]!r} must be {legal_range}")
        super().add_param_group(param_group)
        if any(p.is_complex() for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError(f"{name} takes no complex parameters; give torch.view_as_real(p)")

    def parameters(self) -> list[Tensor]:
        """Returns every parameter once, in the order of the groups, which is that of estimates."""
        return [p for _, p in self._items()]

    def _items(self) -> list[tuple[dict, Tensor]]:
        return [(group, p) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def update_hessian(self, estimates: Iterable[Tensor | None]) -> None:
        """Updates h = beta2 h + (1 - beta2) hhat, one hhat per parameter in `parameters()` order.

        None leaves that parameter's h as it is. Raises ValueError on another count or shape.
        """
        items, estimates = self._items(), list(estimates)
        if len(estimates) != len(items):
            raise ValueError(f"update_hessian got {len(estimates)} estimates for {len(items)} "
                             "parameters; give one each, in the order of parameters()")
        given = [(*item, x) for item, x in zip(items, estimates, strict=True) if x is not None]
        for _, p, hhat in given:
            if hhat.shape != p.shape:
                raise ValueError(f"update_hessian got an estimate of shape {tuple(hhat.shape)} "
                                 f"for a parameter of shape {tuple(p.shape)}")
        skip = self._skip_flag(self._any_nonfinite(given) if self.found_inf is None else None)
        for group, p, hhat in given if skip is not True else ():
            state = self._state(p)
            state["estimates"] += 1
            h, (_, beta2) = state["hessian"], group["betas"]
            hhat = self._curvature(hhat.to(h.dtype))
            h.lerp_(hhat if skip is None else torch.where(skip != 0, h, hhat), 1 - beta2)

    def _any_nonfinite(self, given: list[tuple[dict, Tensor, Tensor]]) -> Tensor | None:
        """Returns whether an estimate's largest or least value is not finite, and counts it."""
        ends = [self._curvature(torch.stack(hhat.to(state_dtype(p)).aminmax()))
                for _, p, hhat in given if hhat.numel() and not hhat.is_meta]  # meta: a dry run
        if not ends:
            return None
        bad = ~torch.cat([x.to(ends[0].device) for x in ends]).isfinite().all()
        self.nonfinite_estimates = self.nonfinite_estimates + bad.long()
        return bad

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        """Updates the parameters from `.grad`, which stays untouched; returns closure's loss.

        A parameter whose gradient is None is left alone, decay included.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        skip = self._skip_flag()
        for group, p in self._items():
            if p.grad is not None and skip is not True:
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(self).__name__} does not take sparse gradients; "
                                       "make the embedding with sparse=False")
                self._update(p, self._state(p), group, skip)
        return loss

    def _skip_flag(self, bad: Tensor | None = None) -> Tensor | bool | None:
        """Returns whether found_inf or `bad` skips an update: None for no, True, or a 0-dim tensor
        where updates read it on the device."""
        if (flag := self.found_inf if bad is None else bad) is None:
            return None
        if (type(self)._update is Sophia._update or self.update_reads_skip) and (
                flag.is_cuda or getattr(self.rule, "skips_on_device", False)):
            return flag
        return bool(flag) or None  # host sync

    def _update(self, p: Tensor, state: dict, group: dict, skip: Tensor | None) -> None:
        self.rule(p, p.grad, state["exp_avg"], state["hessian"], self._gamma(state, group),
                  group["lr"], 1 - group["lr"] * group["weight_decay"], group["betas"][0],
                  group["eps"], skip)

    def _gamma(self, state: dict, group: dict) -> float | Tensor:
        return group["gamma"]  # what multiplies h: a number, or a tensor that broadcasts

    def _curvature(self, hhat: Tensor) -> Tensor:
        """Returns the quantity that h averages: hhat, or in AdaHessian its square."""
        return hhat

    @torch.no_grad()
    def statistics(self) -> dict[str, Tensor]:
        """Returns diagnostics of the last step: 0-dim tensors on the device, without a host sync.

        Shares of coordinates: `unclipped_fraction` and, over the groups with a `kind`,
        `unclipped/KIND`, where |m| < max(gamma h, eps); `hessian_floor_fraction`, where h <= eps.
        2-norms: `hessian_norm`, `momentum_norm`, `update_norm`, `parameter_norm`.
        """
        sums, sizes = {}, {}

        def add(name: str, value: Tensor, size: int) -> None:
            sums[name], sizes[name] = sums.get(name, 0) + value, sizes.get(name, 0) + size

        for group, p in self._items():
            if p in self.state:
                m, h = self.state[p]["exp_avg"], self.state[p]["hessian"]
                denominator = (self._gamma(self.state[p], group) * h).clamp_min_(group["eps"])
                # A controlled gamma puts one coordinate on its threshold: rounding must not decide.
                unclipped = (m.abs() < denominator * (1 + 1e-6)).sum()
                add("unclipped_fraction", unclipped, p.numel())
                add(f"unclipped/{group.get('kind')}", unclipped, p.numel())
                add("hessian_floor_fraction", (h <= group["eps"]).sum(), p.numel())
                update = torch.div(m, denominator, out=denominator).clamp_(-1, 1).mul_(group["lr"])
                for name, x in dict(hessian=h, momentum=m, update=update, parameter=p).items():
                    add(f"{name}_norm", torch.linalg.vector_norm(x, dtype=m.dtype).square(), 1)
        sums.pop("unclipped/None", None)
        return {name: x.sqrt() if "norm" in name else x / sizes[name] for name, x in sums.items()}

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores `state_dict()`, keeping the state's own precision under bf16 parameters.

        Options that it lacks, of an older version, have this optimizer's defaults. Raises
        ValueError, and changes nothing, on the state of another optimizer or model.
        """
        if any("rho" in group for group in state_dict["param_groups"]):
            raise ValueError("a state of the authors' SophiaG: its h lacks the number of labels as "
                             "a factor and its rho is our gamma; make a new optimizer, and copy "
                             "exp_avg and h times that number if they matter")
        state_dict = state_dict | dict(param_groups=[
            self.defaults | group for group in state_dict["param_groups"]])
        saved, params = state_dict["state"], [p for _, p in self._items()]
        order = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(order, params, strict=False):  # torch compares their numbers
            needed = dict(exp_avg=p.shape, hessian=p.shape, estimates=()) if saved.get(i) else {}
            for name, shape in needed.items():
                found = saved[i][name].shape if name in saved[i] else None
                if found != shape:
                    raise ValueError(f"a state of another optimizer or model: {name} of parameter "
                                     f"{i} must be {tuple(shape)}, is {found and tuple(found)}")
        super().load_state_dict(state_dict)
        for i, p in zip(order, params, strict=True):
            for name, value in saved.get(i, {}).items():
                device = "cpu" if name == "estimates" else p.device
                self.state[p][name] = value.to(device, state_dtype(p), copy=True)

    def _state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            for name in ("exp_avg", "hessian"):
                state[name] = torch.zeros_like(p, dtype=state_dtype(p))
            state["estimates"] = torch.zeros((), dtype=state_dtype(p))
        return state


class SophiaG(Sophia):
    """Sophia with the paper's gamma for `gauss_newton_bartlett`, of 240 examples every 10 steps."""


class SophiaH(Sophia):
    """Sophia with the paper's gamma for `hutchinson`, of 32 examples every 10 steps."""

    def __init__(self, params, lr: float = 4e-4, betas=(0.96, 0.99), gamma: float = 0.01, **kwargs):
        super().__init__(params, lr, betas, gamma, **kwargs)


def hutchinson(losses: Iterable[Callable[[], Tensor]], params: Sequence[Tensor], *,
               generator: torch.Generator | None = None) -> list[Tensor | None]:
    """Returns Hutchinson's estimate of the Hessian's diagonal (Algorithm 1), one tensor per param.

    hhat = u * (H u) with u ~ N(0, I) drawn from `generator`, on the params' device (ranks that
    average their results must use one seed); its expectation is diag(H), which may be negative. H
    is the Hessian of the sum of `losses`, functions that each compute a scalar: one per micro-batch
    (a mean loss divided by their number), to bound memory. A param that requires no gradient gets
    None. `.grad` is neither read nor written.
    Attention inside runs on the math kernel, the only one with a second derivative. Raises
    RuntimeError where the loss has none (a fused kernel forced inside, a compiled module).
    """
    params = list(params)
    trained = [p for p in params if p.requires_grad]
    u = [torch.randn(p.shape, generator=generator, device=p.device, dtype=state_dtype(p))
         for p in trained]
    total = [torch.zeros_like(x) for x in u]
    for loss in losses:
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            try:
                gradient = torch.autograd.grad(loss(), trained, create_graph=True,
                                               materialize_grads=True, allow_unused=True)
                slope = sum((g * x).sum() for g, x in zip(gradient, u, strict=True))
                product = torch.autograd.grad(slope, trained, materialize_grads=True,
                                              allow_unused=True)
            except RuntimeError as error:
                error.add_note("hutchinson needs second derivatives, which fused kernels and "
                               "compiled modules do not have")
                raise
        torch._foreach_add_(total, [x.to(t.dtype) for x, t in zip(product, total, strict=True)])
    torch._foreach_mul_(total, u)
    estimates = dict(zip(trained, total, strict=True))
    return [estimates.get(p) for p in params]


def gauss_newton_bartlett(losses: Losses, params: Sequence[Tensor], *,
                          all_reduce: AllReduce = sum_over_process_group) -> list[Tensor | None]:
    """Returns the Gauss-Newton-Bartlett estimate of the Hessian's diagonal (Algorithm 2).

    With labels drawn from the model's own distribution at n positions, and S the gradient of the
    summed loss on them, hhat = S * S / n: the paper's n * ghat * ghat for the mean loss's gradient
    ghat = S / n. `.grad` is neither read nor written.

    `losses` are functions that each compute the summed loss on sampled labels and their number, as
    `sampled_cross_entropy(model(x))` does on the bare model: one per micro-batch, to bound memory.
    `all_reduce` sums a list of tensors over ranks in place, where each rank has its own rows; by
    default over torch's process group, so that ranks stay alike, with None not at all. Where there
    is no label, hhat is 0; a param that requires no gradient gets None. Raises ValueError without
    losses.
    """
    params = list(params)
    trained = [p for p in params if p.requires_grad]
    S, n = summed_gradient(losses, trained)
    if all_reduce is not None:
        all_reduce([*S, n])
    torch._foreach_mul_(S, S)
    torch._foreach_div_(S, n.to(S[0].dtype).clamp_min(1))
    estimates = dict(zip(trained, S, strict=True))
    return [estimates.get(p) for p in params]


# With summed losses on the true labels the same computation is the paper's ablation E-F (Fig. 7).
empirical_fisher = gauss_newton_bartlett


def summed_gradient(losses: Losses, params: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Returns the gradient of the sum of all losses, safe to modify in place, and their count.

    In float32 under half-precision parameters, since its squares leave the range of float16.
    """
    params, gradient, count = list(params), [], 0
    for loss_fn in losses:
        with torch.enable_grad():
            loss, n = loss_fn()
        part = torch.autograd.grad(loss, params, allow_unused=True, materialize_grads=True)
        part = [g.to(state_dtype(g)) for g in part]
        if gradient:
            torch._foreach_add_(gradient, part)
        else:
            gradient = _unalias(part)
        count = count + n
    if not gradient:
        raise ValueError("a curvature estimate needs at least one loss")
    return gradient, count


def sampled_cross_entropy(logits: Tensor, *, num_classes: int | None = None,
                          uniforms: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy summed over labels drawn from softmax(logits), and their number.

    logits (B, V) or (B, T, V), classes last, have one label per leading index, so leave out
    positions that have none. Only the first `num_classes` classes are drawn. `uniforms` in [0, 1),
    one per label, decide the draw. Raises ValueError on other shapes and counts.
    """
    if logits.dim() not in (2, 3) or logits.size(-1) < 2:
        raise ValueError(f"logits of shape {tuple(logits.shape)} are not (B, V) or (B, T, V); for "
                         "one logit per label use sampled_binary_cross_entropy")
    logits = logits.reshape(-1, logits.size(-1))  # (n, V)
    if num_classes is not None and not 2 <= num_classes <= logits.size(1):
        raise ValueError(f"num_classes = {num_classes} must be from 2 to {logits.size(1)}")
    if uniforms is not None and uniforms.numel() != len(logits):
        raise ValueError(f"{uniforms.numel()} uniforms were given for {len(logits)} labels")
    labels = sample_labels(logits.detach()[:, :num_classes], uniforms)
    loss = F.cross_entropy(logits.to(state_dtype(logits)), labels, reduction="sum")
    return loss, torch.tensor(len(labels), device=loss.device)


def sample_labels(logits: Tensor, uniforms: Tensor | None = None) -> Tensor:
    """Draws class ids (n,) from softmax(logits), logits (n, V), by the inverse of the CDF."""
    cdf = F.softmax(logits, dim=-1, dtype=state_dtype(logits)).cumsum(-1)
    total = cdf[:, -1:]
    u = torch.rand_like(total) if uniforms is None else uniforms.reshape(-1, 1).to(cdf)
    below_total = total * (1 - torch.finfo(cdf.dtype).eps)  # so that no index reaches V
    return torch.searchsorted(cdf, (u * total).minimum(below_total), right=True).squeeze(1)


def sampled_binary_cross_entropy(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the cross-entropy summed over labels drawn from sigmoid(logits), and their number.

    logits of any shape have one label each: the head of a two-class or a multi-label classifier.
    """
    logits = logits.flatten()
    return sampled_cross_entropy(torch.stack((torch.zeros_like(logits), logits), dim=1))


def sampled_squared_error(means: Tensor) -> tuple[Tensor, Tensor]:
    """Returns half the squared error summed over targets drawn from N(means, I), and their number.

    For regression (the paper, section 2.3): means (..., V) have one target per leading index.
    Raises ValueError without a leading one, which would make a batch one target.
    """
    if means.dim() < 2:
        raise ValueError(f"means of shape {tuple(means.shape)} are not (n, V); of one value per "
                         "target write means.unsqueeze(-1)")
    means = means.reshape(-1, means.size(-1)).to(state_dtype(means))  # (n, V)
    targets = means.detach() + torch.randn_like(means)
    return 0.5 * (means - targets).square().sum(), torch.tensor(len(means), device=means.device)


def _unalias(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Copies what shares memory: autograd may return one tensor for two parameters."""
    seen, own = set(), []
    for g in gradients:
        if not g.is_contiguous() or g.data_ptr() in seen:
            g = g.clone(memory_format=torch.contiguous_format)
        seen.add(g.data_ptr())
        own.append(g)
    return own


def state_dtype(x: Tensor) -> torch.dtype:
    """Returns the precision of the state of a parameter: float32, or float64 for float64."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
