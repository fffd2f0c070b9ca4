"""Decay groups, the cosine schedule, and (optimizer, estimator) by name.

Adding an optimizer is an entry in BUILDERS and a config; train.py stays as it is.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
import torch.nn as nn
from torch import Tensor

from configurator import Config
from sophia import Sophia, gauss_newton_bartlett


class Estimator(Protocol):
    """Curvature estimates for the optimizer's parameters, at the current ones."""

    def __call__(self, logits: Callable[[Tensor], Tensor], inputs: Tensor, targets: Tensor,
                 first_row: int, seed: int) -> list[Tensor]:
        """`logits` maps ids (b, T) to (b, T, V); `inputs` and `targets` (rows, T) are this rank's
        rows, the first of which is row `first_row` of the step's batch; `seed` depends on the step
        alone."""


class Training(NamedTuple):
    """What the loop is handed."""

    optimizer: torch.optim.Optimizer
    estimator: Estimator | None  # None: the optimizer takes no curvature


def build(config: Config, model: nn.Module, *, num_classes: int,
          all_reduce: Callable[[list[Tensor]], None] | None = None) -> Training:
    """The optimizer that `config.optimizer` names, on the model's parameters, and its estimator.

    `num_classes` is the number of real classes among the logits. `all_reduce` sums tensors over
    ranks in place.
    """
    groups = decay_groups(model, config.weight_decay)
    return BUILDERS[config.optimizer](config, groups, num_classes=num_classes,
                                      all_reduce=all_reduce)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices and embeddings decay; biases and layer norms do not. Each parameter once."""
    params = [p for p in model.parameters() if p.requires_grad]
    return [dict(params=[p for p in params if p.dim() >= 2], weight_decay=weight_decay),
            dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0)]


def cosine_lr(config: Config, step: int) -> float:
    """Learning rate of a 0-based step: linear warm-up, then cosine to min_lr_ratio of the peak."""
    if step < config.warmup_iters:
        return config.learning_rate * (step + 1) / config.warmup_iters
    span = max(1, config.max_iters - config.warmup_iters)
    progress = min(1.0, (step - config.warmup_iters) / span)
    ratio = config.min_lr_ratio
    return config.learning_rate * (ratio + (1 - ratio) * 0.5 * (1 + math.cos(math.pi * progress)))


def _adamw(config: Config, groups: list[dict], **_) -> Training:
    device = groups[0]["params"][0].device
    return Training(torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps,
        fused=device.type in ("cuda", "cpu")), None)


def _sophiag(config: Config, groups: list[dict], *, num_classes, all_reduce) -> Training:
    optimizer = Sophia(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2),
                       gamma=config.gamma, eps=config.eps)
    return Training(optimizer, gnb_estimator(config, optimizer.parameters(), num_classes,
                                             all_reduce))


def gnb_estimator(config: Config, params: list[Tensor], num_classes: int,
                  all_reduce: Callable[[list[Tensor]], None] | None) -> Estimator:
    """Gauss-Newton-Bartlett with labels that are the same for any number of ranks."""
    chunk_size = (config.hessian_batch_size // config.hessian_chunks
                  if config.hessian_chunks > 1 else None)

    def estimate(logits, inputs, targets, first_row, seed) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(config.hessian_batch_size, targets.size(1), generator=generator)
        return gauss_newton_bartlett(
            logits, inputs, params, uniforms=uniforms[first_row:first_row + len(inputs)],
            mask=targets != -100, num_classes=num_classes, chunk_size=chunk_size,
            micro_batch_size=config.batch_size, all_reduce=all_reduce)

    return estimate


BUILDERS: dict[str, Callable[..., Training]] = {"adamw": _adamw, "sophiag": _sophiag}
