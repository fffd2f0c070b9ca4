"""Estimates curvature in training, on rows and labels that do not depend on the number of ranks.

The estimators are those of sophia.py. Here they run on the model's own fused loss, micro-batch by
micro-batch, with labels drawn by a faster two-level search.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nanosophia.attention import TwiceDifferentiableAttention
from nanosophia.options import Config
from sophia import AllReduce, Losses, hutchinson, summed_gradient

# Computes what sophia.summed_gradient does for parameters that are split over ranks, summed over
# ranks as well.
ShardedGradient = Callable[[Losses, Sequence[Tensor]], tuple[list[Tensor], Tensor]] | None
BLOCK = 128  # classes that the label draw sums before it looks at single ones


Chunks = list[list[slice]]


class Estimator(NamedTuple):
    """Estimates the curvature of an optimizer's parameters at their current values.

    `estimate(forward, inputs, targets, chunks, seed, scale)` returns one tensor per parameter.
    `forward` is called as the model is (`model.GPT.forward`); `inputs` and `targets` (rows, T) are
    the rows from this rank's first to its last, and `chunks` its own rows' places in the step's
    batch: lists of micro-batches, in order (`Ranks.chunks`), none where the rank has no rows.
    `seed` depends on the step alone. `scale`, None for 1, is a factor on the summed losses while
    they are differentiated (float16).
    """

    estimate: Callable[[Callable[..., Tensor], Tensor, Tensor, Chunks, int, Tensor | None],
                       list[Tensor]]
    second_derivatives: bool = False  # `forward` must not be compiled


def gnb_estimator(config: Config, params: list[Tensor], num_classes: int,
                  all_reduce: AllReduce = None,
                  sharded_gradient: ShardedGradient = None) -> Estimator:
    """Returns the Gauss-Newton-Bartlett estimator (Algorithm 2)."""
    sample_labels_fn = partial(sample_labels_two_level, num_classes=num_classes)

    def estimate(forward, inputs, targets, chunks, seed, scale=None) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        uniforms = torch.rand(config.hessian_batch_size, targets.size(1), generator=generator)
        first, _ = row_range(chunks)
        uniforms = uniforms[first:first + len(inputs)]
        if inputs.is_cuda:  # a copy of other memory would wait for all that the device has to do
            uniforms = uniforms.pin_memory()
        uniforms = uniforms.to(inputs.device, non_blocking=inputs.is_cuda)
        uniforms = uniforms.masked_fill(targets == -100, -1)  # no label is drawn there

        def sampled_loss(rows: slice) -> tuple[Tensor, Tensor]:
            n = (uniforms[rows] >= 0).sum()
            return forward(inputs[rows], uniforms[rows], sample_labels_fn=sample_labels_fn) * n, n

        return chunked_squares(_losses(sampled_loss, chunks), params, all_reduce=all_reduce,
                               one_square=config.hessian_chunks == 1, scale=scale,
                               sharded_gradient=sharded_gradient)

    return Estimator(estimate)


def empirical_fisher_estimator(config: Config, params: list[Tensor], num_classes: int,
                               all_reduce: AllReduce = None,
                               sharded_gradient: ShardedGradient = None) -> Estimator:
    """Returns the estimator that squares the gradient on the true labels (E-F of Fig. 7)."""
    def estimate(forward, inputs, targets, chunks, seed, scale=None) -> list[Tensor]:
        def loss(rows: slice) -> tuple[Tensor, Tensor]:
            n = (targets[rows] != -100).sum()
            return forward(inputs[rows], targets[rows]) * n, n

        return chunked_squares(_losses(loss, chunks), params, all_reduce=all_reduce,
                               one_square=config.hessian_chunks == 1, scale=scale,
                               sharded_gradient=sharded_gradient)

    return Estimator(estimate)


def hutchinson_estimator(config: Config, params: list[Tensor], num_classes: int,
                         all_reduce: AllReduce = None,
                         sharded_gradient: ShardedGradient = None) -> Estimator:
    """Returns Hutchinson's estimator (Algorithm 1) on the mean loss; all ranks share one probe."""
    def estimate(forward, inputs, targets, chunks, seed, scale=None) -> list[Tensor]:
        def summed_loss(rows: slice) -> Tensor:
            logits = forward(inputs[rows]).flatten(0, 1)  # (n, V)
            loss = F.cross_entropy(logits, targets[rows].flatten(), reduction="sum")
            return loss if scale is None else loss * scale

        with TwiceDifferentiableAttention():
            hhat = hutchinson(chain(*_losses(summed_loss, chunks)), params,
                              generator=torch.Generator(params[0].device).manual_seed(seed))
        if scale is not None:
            torch._foreach_div_(hhat, scale)
        count = (targets != -100).sum()
        if all_reduce is not None:
            all_reduce([*hhat, count])
        torch._foreach_div_(hhat, count.to(hhat[0].dtype).clamp_min(1))
        return hhat

    return Estimator(estimate, second_derivatives=True)


def row_range(chunks: Chunks) -> tuple[int, int]:
    """Returns start and stop of a rank's rows in the step's batch."""
    parts = [part for chunk in chunks for part in chunk]
    return (parts[0].start, parts[-1].stop) if parts else (0, 0)


def _losses(loss: Callable[[slice], object], chunks: Chunks) -> list[list[Callable]]:
    """Returns functions that compute the loss of each micro-batch of a rank's rows."""
    first, _ = row_range(chunks)
    return [[partial(loss, slice(part.start - first, part.stop - first)) for part in chunk]
            for chunk in chunks]


def _scaled(loss: Callable, scale: Tensor) -> Callable:
    """Returns a function that computes the loss times `scale`, and the number of its labels."""
    def scaled_loss() -> tuple[Tensor, Tensor]:
        value, n = loss()
        return value * scale, n

    return scaled_loss


def chunked_squares(chunks: Iterable[Losses], params: Sequence[Tensor], *, one_square: bool = False,
                    all_reduce: AllReduce = None, scale: Tensor | None = None,
                    sharded_gradient: ShardedGradient = None) -> list[Tensor]:
    """Returns sum_c S_c * S_c / n for the gradient S_c of chunk c's summed losses, n all labels.

    The expectation is `gauss_newton_bartlett`'s; with C chunks its relative deviation is sqrt(2/C)
    instead of sqrt(2). With `one_square` the single chunks of all ranks are squared together, the
    paper's way; otherwise each rank's chunks are squared on their own. A rank may have no rows.
    Losses are multiplied by `scale`, and gradients divided by it before they are squared.
    """
    squares, count = None, torch.zeros((), dtype=torch.int64, device=params[0].device)
    for losses in list(chunks) or [[]]:
        if scale is not None:
            losses = [_scaled(loss, scale) for loss in losses]
        S, n = (sharded_gradient or summed_gradient)(losses, params) if losses else (
            [torch.zeros_like(p) for p in params], torch.zeros_like(count))
        if scale is not None:
            torch._foreach_div_(S, scale)
        if all_reduce is not None and one_square and sharded_gradient is None:
            all_reduce([*S, n])
        torch._foreach_mul_(S, S)
        count = count + n
        if squares is None:
            squares = S
        else:
            torch._foreach_add_(squares, S)
    if all_reduce is not None and sharded_gradient is not None:
        all_reduce([count])
    elif all_reduce is not None and not one_square:
        all_reduce([*squares, count])
    torch._foreach_div_(squares, count.to(squares[0].dtype).clamp_min(1))
    return squares


@torch.no_grad()
def sample_labels_two_level(probabilities: Tensor, uniforms: Tensor,
                            num_classes: int | None = None) -> Tensor:
    """Samples class ids (n,) in proportion to `probabilities` (n, V), which need not sum to 1.

    By the inverse of the cumulative distribution at `uniforms` (n,) in [0, 1): first the block of
    classes, then the class in it, which costs less than one long cumulative sum. Only the first
    `num_classes` classes can be drawn. Negative uniforms draw nothing and give -100.
    """
    K = num_classes or probabilities.size(1)
    blocks = K // BLOCK
    sums = probabilities[:, :blocks * BLOCK].unflatten(1, (blocks, BLOCK)).sum(-1)  # (n, blocks)
    if K % BLOCK:
        sums = torch.cat([sums, probabilities[:, blocks * BLOCK:K].sum(1, keepdim=True)], dim=1)
    cdf = sums.cumsum(1)
    block, before = _first_above(cdf, uniforms.to(cdf.dtype).unsqueeze(1) * cdf[:, -1:])
    classes = block * BLOCK + torch.arange(BLOCK, device=probabilities.device)  # (n, BLOCK)
    inside = probabilities.gather(1, classes.clamp_max(K - 1))
    inside = inside.masked_fill_(classes >= K, 0).cumsum(1)
    within, _ = _first_above(inside, uniforms.unsqueeze(1) * cdf[:, -1:] - before)
    # K where probabilities are not finite; the guard skips such an estimate.
    labels = (block * BLOCK + within).squeeze(1).clamp_max_(K - 1)
    return torch.where(uniforms < 0, -100, labels)


def _first_above(cdf: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Returns where each row (n, K) first exceeds the threshold, (n, 1), and the value before it.

    Whatever the rounding the index is below K; in a row that is not finite it may be K.
    """
    below_all = cdf[:, -1:] * (1 - torch.finfo(cdf.dtype).eps)
    threshold = threshold.to(cdf.dtype).clamp_min(0).minimum(below_all)
    index = torch.searchsorted(cdf, threshold, right=True)
    before = torch.where(index > 0, cdf.gather(1, (index - 1).clamp_min(0)), 0)
    return index, before
