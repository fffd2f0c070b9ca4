"""Decay groups, the cosine schedule, the baselines, and (optimizer, estimator) by name.

Adding an optimizer is an entry in OPTIMIZERS and a config; train.py stays as it is.
"""

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn as nn
from torch import Tensor

from nanosophia.configurator import ConfigError
from nanosophia.options import Config
from sophia import Sophia, empirical_fisher, gauss_newton_bartlett, hutchinson

Reduce = Callable[[list[Tensor]], None] | None  # sums tensors over ranks, in place
# Of losses on sharded parameters: see sophia.gauss_newton_bartlett.
Accumulate = Callable[[Tensor, bool], list[Tensor] | None] | None


class Estimator(NamedTuple):
    """Curvature estimates for the optimizer's parameters, at the current ones.

    `estimate(forward, inputs, targets, first_row, seed)` gives one tensor per parameter.
    `forward` is called as the model is, with ids (b, T) and more (`model.GPT.forward`); `inputs`
    and `targets` (rows, T) are this rank's rows, the first of which is row `first_row` of the
    step's batch; `seed` depends on the step alone.
    """

    estimate: Callable[[Callable[..., Tensor], Tensor, Tensor, int, int], list[Tensor]]
    second_derivatives: bool = False  # `forward` must not be compiled


class Training(NamedTuple):
    """What the loop is handed."""

    optimizer: torch.optim.Optimizer
    estimator: Estimator | None  # None: the optimizer takes no curvature


def build(config: Config, model: nn.Module, *, num_classes: int, all_reduce: Reduce = None,
          sharded: Callable[[list[Tensor]], Accumulate] | None = None) -> Training:
    """The optimizer that `config.optimizer` names, on the model's parameters, and its estimator.

    `num_classes` is the number of real classes among the logits. `all_reduce` sums tensors over
    ranks in place. `sharded` makes the gradient accumulation of parameters split over ranks.
    """
    entry = OPTIMIZERS[config.optimizer]
    optimizer = entry.build(config, parameter_groups(model, config))
    if entry.estimator is None:
        return Training(optimizer, None)
    params = optimizer.parameters()
    return Training(optimizer, entry.estimator(config, params, num_classes, all_reduce,
                                               sharded(params) if sharded else None))


def check(config: Config, world_size: int) -> None:
    """Raises ConfigError unless the optimizer is known and its settings fit it and the ranks."""
    if config.optimizer not in OPTIMIZERS:
        near = difflib.get_close_matches(config.optimizer, OPTIMIZERS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(f"optimizer = {config.optimizer!r} is none of {', '.join(OPTIMIZERS)}"
                          f"{hint}", "optimizer")
    entry = OPTIMIZERS[config.optimizer]
    for key, set_ in (("gamma_target", config.gamma_target > 0),
                      ("hessian_bias_correction", config.hessian_bias_correction),
                      ("compile_optimizer", config.compile_optimizer == "on")):
        if set_ and not entry.is_sophia:
            raise ConfigError(f"{key} = {getattr(config, key)} has no effect on optimizer = "
                              f"{config.optimizer}; leave it out", key, "optimizer")
    if config.gamma_rows != "none" and not config.gamma_target:
        raise ConfigError(f"gamma_rows = {config.gamma_rows} has no effect without gamma_target; "
                          "set both or none", "gamma_rows")
    if config.parallel == "fsdp" and entry.unsharded:
        raise ConfigError(f"parallel = fsdp cannot serve optimizer = {config.optimizer}: "
                          f"{entry.unsharded}; use --parallel=ddp", "parallel", "optimizer")
    if entry.estimator is None:
        return
    rows, chunks = config.hessian_batch_size, config.hessian_chunks
    if rows > config.total_batch_size:
        raise ConfigError(f"hessian_batch_size = {rows} is more than total_batch_size = "
                          f"{config.total_batch_size}: the estimate uses rows of the same batch; "
                          "lower it", "hessian_batch_size", "total_batch_size")
    if rows % world_size:
        raise ConfigError(f"hessian_batch_size = {rows} does not divide over {world_size} ranks; "
                          "choose a multiple", "hessian_batch_size")
    if chunks > 1 and chunks % world_size:
        raise ConfigError(f"hessian_chunks = {chunks} is neither 1 nor a multiple of the "
                          f"{world_size} ranks; choose one", "hessian_chunks")
    if config.parallel == "fsdp" and world_size > 1 and chunks > 1:
        raise ConfigError(f"hessian_chunks = {chunks} with parallel = fsdp: the ranks reduce each "
                          "chunk's gradients together, so that chunks would depend on their "
                          "number; leave it at 1, or use --parallel=ddp", "hessian_chunks",
                          "parallel")
    if rows % chunks:
        raise ConfigError(f"hessian_batch_size = {rows} does not divide into hessian_chunks = "
                          f"{chunks}; choose a divisor", "hessian_chunks", "hessian_batch_size")


def with_own_defaults(config: Config, sources: dict[str, str]) -> Config:
    """The config with the optimizer's own value of each setting that was not given."""
    if config.optimizer not in OPTIMIZERS:
        return config
    own = OPTIMIZERS[config.optimizer].defaults
    return replace(config, **{key: value for key, value in own.items() if key not in sources})


def advice(config: Config) -> list[str]:
    """Settings that are legal and known to go wrong, in words."""
    if config.warmup_iters >= config.max_iters:
        return [f"warmup_iters = {config.warmup_iters} is not shorter than max_iters = "
                f"{config.max_iters}: the learning rate only rises"]
    if (OPTIMIZERS[config.optimizer].estimator is not None and config.warmup_iters < 2000
            and config.tokens_per_step >= 480 * 1024):
        return [f"warmup_iters = {config.warmup_iters} is shorter than the 2000 steps that Sophia "
                "needs at the paper's batch size"]
    return []


def unless(refused: Tensor, optimizer: torch.optim.Optimizer, action: Callable[[], object]) -> None:
    """Runs `action`, a step or an `update_hessian`, that changes nothing where `refused` is not 0.

    `refused` is a 0-dim float32 tensor on the device. Optimizers that can (compiled Sophia, fused
    AdamW) look at it there; for others the host does, once per call.
    """
    if isinstance(optimizer, Sophia) or optimizer.defaults.get("fused"):
        optimizer.found_inf = refused
        try:
            action()
        finally:
            optimizer.found_inf = None
    elif not refused.item():  # host sync
        action()


def parameter_groups(model: nn.Module, config: Config) -> list[dict]:
    """Param groups by kind: embeddings, matrices, vectors. Vectors do not decay. Each once."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    kinds: dict[str, list[Tensor]] = dict(embedding=[], matrix=[], vector=[])
    for p in model.parameters():
        if p.requires_grad:
            kinds["embedding" if id(p) in embeddings else "matrix" if p.dim() >= 2
                  else "vector"].append(p)
    return [dict(params=params, kind=kind,
                 weight_decay=0.0 if kind == "vector" else config.weight_decay)
            for kind, params in kinds.items()]


def cosine_lr(config: Config, step: int) -> float:
    """Learning rate of a 0-based step: linear warm-up, then cosine to min_lr_ratio of the peak."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    span = max(1, config.max_iters - config.warmup_iters)
    progress = min(1.0, (step - config.warmup_iters) / span)
    ratio = config.min_lr_ratio
    return config.learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


# The estimators, on the rows and labels that are the same for any number of ranks. ---------------


def _chunk_size(config: Config) -> int | None:
    chunks = config.hessian_chunks
    return config.hessian_batch_size // chunks if chunks > 1 else None


def gnb_estimator(config: Config, params: list[Tensor], num_classes: int,
                  all_reduce: Reduce, accumulate: Accumulate = None) -> Estimator:
    """Gauss-Newton-Bartlett (Algorithm 2)."""
    def estimate(forward, inputs, targets, first_row, seed) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(config.hessian_batch_size, targets.size(1), generator=generator)
        return gauss_newton_bartlett(
            forward, inputs, params, uniforms=uniforms[first_row:first_row + len(inputs)],
            mask=targets != -100, num_classes=num_classes, own_loss=True,
            chunk_size=_chunk_size(config), micro_batch_size=config.batch_size,
            all_reduce=all_reduce, accumulate=accumulate)

    return Estimator(estimate)


def empirical_fisher_estimator(config: Config, params: list[Tensor], num_classes: int,
                               all_reduce: Reduce, accumulate: Accumulate = None) -> Estimator:
    """n times the squared gradient on the true labels (E-F of Fig. 7)."""
    def estimate(forward, inputs, targets, first_row, seed) -> list[Tensor]:
        return empirical_fisher(forward, inputs, targets, params, own_loss=True,
                                chunk_size=_chunk_size(config), micro_batch_size=config.batch_size,
                                all_reduce=all_reduce, accumulate=accumulate)

    return Estimator(estimate)


def hutchinson_estimator(config: Config, params: list[Tensor], num_classes: int,
                         all_reduce: Reduce, accumulate: Accumulate = None) -> Estimator:
    """Hutchinson (Algorithm 1) on the mean loss; one probe, the same on all ranks."""
    def estimate(forward, inputs, targets, first_row, seed) -> list[Tensor]:
        def summed_loss(rows: slice) -> Tensor:
            logits = forward(inputs[rows]).flatten(0, 1)  # (n, V)
            return nn.functional.cross_entropy(logits, targets[rows].flatten(), reduction="sum")

        starts = range(0, len(inputs), config.batch_size)
        hhat = hutchinson(
            [lambda s=s: summed_loss(slice(s, s + config.batch_size)) for s in starts], params,
            generator=torch.Generator(params[0].device).manual_seed(seed))
        count = (targets != -100).sum()
        if all_reduce is not None:
            all_reduce([*hhat, count])
        torch._foreach_div_(hhat, count.to(hhat[0].dtype).clamp_min(1))
        return hhat

    return Estimator(estimate, second_derivatives=True)


# The baselines and ablations. --------------------------------------------------------------------


class Lion(torch.optim.Optimizer):
    """Evolved sign momentum (Chen et al. 2023, arXiv:2302.06675, Algorithm 2):

        c = beta1 m + (1 - beta1) g;  theta -= lr (sign(c) + weight_decay theta)
        m = beta2 m + (1 - beta2) g

    State, in float32 (float64 for float64 parameters): `exp_avg` (m).
    """

    def __init__(self, params, lr: float = 1e-4, betas: tuple[float, float] = (0.95, 0.98),
                 weight_decay: float = 0.2):
        _require(type(self), lr=(lr, lr >= 0), weight_decay=(weight_decay, weight_decay >= 0),
                 betas=(betas, all(0 <= b < 1 for b in betas)))
        super().__init__(params, dict(lr=lr, betas=betas, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """One update from `.grad`; returns closure's loss."""
        loss = _evaluate(closure)
        for group, p in _with_gradient(self):
            m = _momentum(self.state[p], p)
            g, (beta1, beta2) = p.grad.to(m.dtype), group["betas"]
            _move(p, m.lerp(g, 1 - beta1).sign_(), group)
            m.lerp_(g, 1 - beta2)
        return loss


class Normalize(torch.optim.Optimizer):
    """Momentum divided by its root mean square over all parameters (Normalize of Fig. 7c).

    theta -= lr m / rms(m), after decoupled decay. The paper gives no scale; the root mean square
    makes the typical coordinate move lr, as clipping does.
    """

    def __init__(self, params, lr: float = 4e-4, beta1: float = 0.96, weight_decay: float = 0.2):
        _require(type(self), lr=(lr, lr >= 0), beta1=(beta1, 0 <= beta1 < 1),
                 weight_decay=(weight_decay, weight_decay >= 0))
        super().__init__(params, dict(lr=lr, beta1=beta1, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure=None):
        """One update from `.grad`; returns closure's loss."""
        loss = _evaluate(closure)
        used = [(group, p, _momentum(self.state[p], p)) for group, p in _with_gradient(self)]
        if not used:
            return loss
        for group, p, m in used:
            m.lerp_(p.grad.to(m.dtype), 1 - group["beta1"])
        squares = torch.stack([m.square().sum() for _, _, m in used]).sum()
        rms = (squares / sum(m.numel() for _, _, m in used)).sqrt() + 1e-12
        for group, p, m in used:
            _move(p, m / rms, group)
        return loss


class AdaHessian(Sophia):
    """Adam with the squared Hutchinson estimate (Yao et al., arXiv:2006.00719), as the paper runs
    it, without spatial averaging:

        m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) hhat^2 at each estimate
        theta -= lr mhat / (sqrt(vhat) + eps), after decoupled decay

    mhat counts steps, vhat estimates. State: `exp_avg` (m), `hessian` (v), `steps`, `estimates`.
    """

    def __init__(self, params, lr: float = 1e-3, betas: tuple[float, float] = (0.92, 0.99),
                 eps: float = 1e-8, weight_decay: float = 0.1):
        super().__init__(params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    def _curvature(self, hhat: Tensor) -> Tensor:
        return hhat * hhat

    def _update(self, p: Tensor, state: dict, group: dict, refused: None) -> None:
        m, v, (beta1, beta2) = state["exp_avg"], state["hessian"], group["betas"]
        state["steps"] = state.get("steps", torch.zeros_like(state["estimates"])) + 1
        m.lerp_(p.grad.to(m.dtype), 1 - beta1)
        m_hat = m / (1 - beta1 ** state["steps"].item())
        v_hat = v / (1 - beta2 ** max(1, state["estimates"].item()))
        _move(p, m_hat / (v_hat.sqrt() + group["eps"]), group)

    def statistics(self) -> dict[str, Tensor]:
        """`Sophia.statistics` without what concerns clipping."""
        return _without_clipping(super().statistics())


class AdaHessianClip(Sophia):
    """AdaHessian's curvature under Sophia's clipping (AH+clip of Fig. 7b):

    clip(m / max(gamma sqrt(v), eps), -1, 1) with v the average of hhat^2.
    """

    def _curvature(self, hhat: Tensor) -> Tensor:
        return hhat * hhat

    def _update(self, p: Tensor, state: dict, group: dict, refused: None) -> None:
        m = state["exp_avg"].lerp_(p.grad.to(state["exp_avg"].dtype), 1 - group["betas"][0])
        floor = (group["gamma"] * state["hessian"].sqrt()).clamp_min_(group["eps"])
        _move(p, (m / floor).clamp_(-1, 1), group)

    def statistics(self) -> dict[str, Tensor]:
        """`Sophia.statistics` without what concerns clipping."""
        return _without_clipping(super().statistics())


class SophiaUnclipped(Sophia):
    """Sophia without the clip (GNB of Fig. 7c): m / max(gamma h, eps)."""

    def statistics(self) -> dict[str, Tensor]:
        """`Sophia.statistics` without what concerns clipping."""
        return _without_clipping(super().statistics())

    def _update(self, p: Tensor, state: dict, group: dict, refused: None) -> None:
        m = state["exp_avg"].lerp_(p.grad.to(state["exp_avg"].dtype), 1 - group["betas"][0])
        _move(p, m / (group["gamma"] * state["hessian"]).clamp_min_(group["eps"]), group)


class Chained(torch.optim.Optimizer):
    """Several optimizers as one: shared param groups and state, so that it saves like any other."""

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
        """One update of every part; returns closure's loss."""
        loss = _evaluate(closure)
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores `state_dict()`."""
        super().load_state_dict(state_dict)
        self._share()


def _without_clipping(statistics: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = ("hessian_norm", "momentum_norm", "parameter_norm")
    return {key: value for key, value in statistics.items() if key in kept}


def _move(p: Tensor, update: Tensor, group: dict) -> None:
    """Decoupled decay, then -lr * update, in the update's precision; `update` is used up."""
    wide = p.to(update.dtype)  # p itself unless its precision is lower
    wide.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update.mul_(group["lr"]))
    if wide is not p:
        p.copy_(wide)


def _momentum(state: dict, p: Tensor) -> Tensor:
    if "exp_avg" not in state:
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        state["exp_avg"] = torch.zeros_like(p, dtype=dtype)
    return state["exp_avg"]


def _with_gradient(optimizer: torch.optim.Optimizer) -> Iterable[tuple[dict, Tensor]]:
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.grad is not None:
                if p.grad.is_sparse:
                    raise RuntimeError(f"{type(optimizer).__name__} does not take sparse gradients")
                yield group, p


def _evaluate(closure):
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def _require(cls: type, **values: tuple[object, bool]) -> None:
    for name, (value, legal) in values.items():
        if not legal:
            raise ValueError(f"{cls.__name__}: {name} = {value} is out of range")


# Names. ------------------------------------------------------------------------------------------


def _adamw(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    device = groups[1]["params"][0].device.type
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                             eps=config.eps, fused=device in ("cuda", "cpu"))


def _lion(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    return Lion(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))


def _muon(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise ConfigError(f"optimizer = muon is not in torch {torch.__version__}; use torch 2.9 "
                          "or newer", "optimizer")
    hidden = [group for group in groups if group["kind"] == "matrix"]
    rest = [group for group in groups if group["kind"] != "matrix"]
    # Scaled so that its updates are as large as AdamW's, and one learning rate serves both.
    muon = torch.optim.Muon(hidden, lr=config.learning_rate, adjust_lr_fn="match_rms_adamw",
                            momentum=config.muon_momentum, weight_decay=config.weight_decay)
    return Chained([muon, torch.optim.AdamW(rest, lr=config.learning_rate, eps=config.eps,
                                            betas=(config.beta1, config.beta2))])


def _normalize(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    return Normalize(groups, lr=config.learning_rate, beta1=config.beta1)


def _adahessian(config: Config, groups: list[dict]) -> torch.optim.Optimizer:
    return AdaHessian(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                      eps=config.eps)


def _sophia(cls: type[Sophia]) -> Callable[[Config, list[dict]], torch.optim.Optimizer]:
    rows = dict(none=(), embedding=("embedding",), matrices=("embedding", "matrix"))

    def make(config: Config, groups: list[dict]) -> Sophia:
        device = groups[1]["params"][0].device.type
        compiled = config.compile_optimizer
        for group in groups:
            group["gamma_rows"] = group["kind"] in rows[config.gamma_rows]
        return cls(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                   gamma=config.gamma, eps=config.eps, gamma_target=config.gamma_target,
                   bias_correction=config.hessian_bias_correction,
                   compiled=compiled == "on" or (compiled == "auto" and device == "cuda"))

    return make


class Entry(NamedTuple):
    """How an optimizer is built, the estimator that feeds it (None: it takes no curvature), and
    its own values of settings whose defaults are Sophia-G's."""

    build: Callable[[Config, list[dict]], torch.optim.Optimizer]
    estimator: Callable[[Config, list[Tensor], int, Reduce, Accumulate], Estimator] | None = None
    defaults: dict[str, float] = {}  # noqa: RUF012 (never written)
    is_sophia: bool = False  # knows gamma_target, bias correction and compilation
    unsharded: str = ""  # why its parameters cannot be split over ranks


_SECOND_DERIVATIVES = "Hutchinson's estimate differentiates twice, which FSDP2 does not"
_ADAMW = dict(beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
_HUTCHINSON = dict(gamma=0.01, hessian_batch_size=32)

OPTIMIZERS: dict[str, Entry] = {
    "adamw": Entry(_adamw, None, _ADAMW),
    "lion": Entry(_lion, None, dict(beta1=0.95, beta2=0.98)),
    "muon": Entry(_muon, None, _ADAMW, unsharded="it orthogonalises whole matrices"),
    "adahessian": Entry(_adahessian, hutchinson_estimator,
                        dict(beta1=0.92, eps=1e-8, weight_decay=0.1, hessian_batch_size=32),
                        unsharded=_SECOND_DERIVATIVES),
    "sophiag": Entry(_sophia(Sophia), gnb_estimator, is_sophia=True),
    "sophiah": Entry(_sophia(Sophia), hutchinson_estimator, _HUTCHINSON, is_sophia=True,
                     unsharded=_SECOND_DERIVATIVES),
    # Fig. 7 of the paper
    "clip": Entry(_sophia(Sophia)),  # without an estimate h stays 0: sign momentum
    "normalize": Entry(_normalize),
    "ef_clip": Entry(_sophia(Sophia), empirical_fisher_estimator, is_sophia=True),
    "ah_clip": Entry(_sophia(AdaHessianClip), hutchinson_estimator, _HUTCHINSON,
                     unsharded=_SECOND_DERIVATIVES),
    "gnb_unclipped": Entry(_sophia(SophiaUnclipped), gnb_estimator,
                           dict(gamma=1.0, eps=1e-2, hessian_interval=2)),
}
