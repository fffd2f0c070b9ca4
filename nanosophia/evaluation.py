"""The validation loss: over windows, over the whole split, and in bits per byte."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn as nn

from nanosophia.dataloader import Dataset, ValidationWindows, gather, inputs_and_targets
from nanosophia.distributed import Ranks, reshard, sum_over_ranks
from nanosophia.tokenizer import TokenizerError, byte_lengths

Autocast = Callable[[], AbstractContextManager]  # the context of every forward pass


@torch.no_grad()
def evaluate(model: nn.Module, windows: ValidationWindows, ranks: Ranks, batch_size: int,
             autocast: Autocast) -> float:
    """Returns the mean loss in nats per token over the windows, shared over ranks (host sync)."""
    model.eval()
    first, last = ranks.share(len(windows))
    losses, sizes = [], []
    # As many forward passes on every rank: sharded models gather their parameters in step.
    for start in range(first, first + -(-len(windows) // ranks.world_size), batch_size):
        stop = min(start + batch_size, last)
        rows = windows.rows(start, stop) if start < stop else windows.rows(0, 1)
        idx, targets = inputs_and_targets(rows, ranks.device)
        with autocast():
            losses.append(model(idx, targets))
        sizes.append(max(0, stop - start))
    reshard(model)
    model.train()
    total = sum(loss * n for loss, n in zip(torch.stack(losses).tolist(), sizes, strict=True))
    total_and_count = torch.tensor([total, sum(sizes)], dtype=torch.float64)
    if ranks.world_size > 1:
        total_and_count = total_and_count.to(ranks.device)
        sum_over_ranks([total_and_count])
    total, count = total_and_count.tolist()
    return total / count


@torch.no_grad()
def evaluate_split(model: nn.Module, data: Dataset, ranks: Ranks, block_size: int,
                   batch_size: int, autocast: Autocast) -> float:
    """Returns the mean loss in nats over every token of the validation split but its first."""
    T, num_targets = block_size, len(data.val) - 1
    windows = ValidationWindows(data.val, block_size=T, limit=0, vocab_size=data.vocab_size)
    mean, rest = evaluate(model, windows, ranks, batch_size, autocast), num_targets % T
    if rest == 0:
        return mean
    # The tokens that fill no window: the last ones of a window that reaches back.
    idx, targets = inputs_and_targets(
        gather(data.val, [num_targets - T], T, data.vocab_size), ranks.device)
    targets = targets.clone()  # of one row, both are views of the same ids
    targets[:, :T - rest] = -100
    model.eval()
    with autocast():
        tail = model(idx, targets).item()
    reshard(model)
    model.train()
    return (mean * (num_targets - rest) + tail * rest) / num_targets


def describe_loss(loss: float, data: Dataset) -> str:
    """Returns a loss over the whole split as nats per token, perplexity, and bits per byte."""
    ids, counts = np.unique(data.val[1:], return_counts=True)
    parts = [f"loss {loss:.5f} nats per token, perplexity {math.exp(loss):.2f}"]
    try:
        lengths = np.array(byte_lengths(data.encoding()))
        size = int((lengths[ids] * counts).sum())
        parts.append(f"{loss / math.log(2) * (len(data.val) - 1) / size:.5f} bits per byte, over "
                     f"{size:,} bytes")
    except TokenizerError as error:
        parts.append(f"bits per byte are not known: {error}")
    return f"{', '.join(parts)} in {len(data.val) - 1:,} tokens of {data.folder}"
