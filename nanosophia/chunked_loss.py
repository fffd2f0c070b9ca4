"""The cross-entropy of `model.GPT`, with logits computed for some positions at a time.

The logits of a micro-batch are the largest tensor of a step. Computed in chunks they take little
memory, and on a CPU they stay where malloc can use it again.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model import SampleLabels


def chunked_cross_entropy(x: Tensor, head: Tensor, targets: Tensor,
                          sample_labels_fn: SampleLabels | None = None, *, chunk: int) -> Tensor:
    """Returns what `model.cross_entropy` does, computing logits `chunk` positions at a time."""
    return ChunkedCrossEntropy.apply(x, head, targets, sample_labels_fn, chunk,
                                     torch.is_grad_enabled())


class ChunkedCrossEntropy(torch.autograd.Function):
    """The mean cross-entropy whose gradient is taken chunk by chunk while the logits exist.

    Nothing is computed twice; kept for the backward pass are the gradients with respect to x and
    head. Under autocast matrix products are in its precision; all else is in float32.
    """

    @staticmethod
    def forward(ctx, x: Tensor, head: Tensor, targets: Tensor, sample_labels_fn, chunk: int,
                needs_gradient: bool) -> Tensor:
        """Returns the mean loss; with `needs_gradient` keeps the gradients for `backward`."""
        device, accum_dtype = x.device.type, torch.promote_types(x.dtype, torch.float32)
        compute_dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) \
            else x.dtype
        loss, count = x.new_zeros((), dtype=accum_dtype), targets.new_zeros((), dtype=torch.long)
        dx = torch.empty_like(x) if needs_gradient else None
        dhead = torch.empty_like(head, dtype=accum_dtype) if needs_gradient else None
        with torch.autocast(device, enabled=False):
            cast_head = head.to(compute_dtype)
            for rows in _slices(len(x), chunk):
                chunk_x = x[rows].to(compute_dtype)
                logits = F.linear(chunk_x, cast_head)  # (chunk, V)
                chunk_loss, counted, dlogits = _chunk_loss(
                    logits, targets[rows], sample_labels_fn, accum_dtype, needs_gradient)
                loss += chunk_loss
                count += counted.sum()
                if needs_gradient:
                    dx[rows] = (dlogits @ cast_head) * counted
                    _add_product(dhead, dlogits.t(), chunk_x * counted, first=rows.start == 0)
                del logits, dlogits  # before the next chunk's
        ctx.gradients, ctx.count = (dx, dhead), count
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss can be differentiated once")
        dx, dhead = ctx.gradients
        ctx.gradients = None  # they are modified in place
        scale = gradient / ctx.count
        return dx.mul_(scale), dhead.mul_(scale), None, None, None, None


def _chunk_loss(logits: Tensor, targets: Tensor, sample_labels_fn, accum_dtype,
                needs_gradient: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns one chunk's summed loss, whether each position counts (chunk, 1), and dlogits.

    dlogits (chunk, V), in the precision of the logits, whose memory it may take, is the gradient
    with respect to them, except that positions which do not count are not zeroed: callers mask the
    smaller products instead. Under a lower precision the probabilities exist for as many positions
    at a time as take the memory of the logits.
    """
    ratio = accum_dtype.itemsize // logits.dtype.itemsize
    losses, counts, dlogits = [], [], None
    for rows in _slices(len(logits), -(-len(logits) // ratio)):
        part, labels = logits[rows], targets[rows]
        probabilities = F.softmax(part, dim=-1, dtype=accum_dtype)
        if sample_labels_fn is not None:
            labels = sample_labels_fn(probabilities, labels)
        counted = (labels != -100).unsqueeze(1)
        index = labels.unsqueeze(1).clamp_min(0)  # (n, 1)
        # -log p of a label as log(sum exp) - logit, finite even where p is 0
        log_sum = part.amax(1, keepdim=True) - probabilities.amax(1, keepdim=True).log()
        losses.append(((log_sum - part.gather(1, index)) * counted).sum())
        counts.append(counted)
        if needs_gradient:
            minus_one = torch.full_like(index, -1, dtype=accum_dtype)
            dlogits = probabilities.scatter_add_(1, index, minus_one)
            if ratio > 1:
                part.copy_(dlogits)
                dlogits = logits
    return torch.stack(losses).sum(), torch.cat(counts), dlogits


def _add_product(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """Adds a @ b to `total`, which may have a higher precision, or overwrites it at the first."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, beta=0 if first else 1)
        return
    # On a CPU a product of all rows and its copy in the higher precision would leave the cache.
    for rows in _slices(len(total), 4096 if total.device.type == "cpu" else len(total)):
        product = a[rows] @ b
        total[rows].copy_(product) if first else total[rows].add_(product)


def _slices(size: int, step: int) -> list[slice]:
    return [slice(i, min(i + step, size)) for i in range(0, size, step)]
