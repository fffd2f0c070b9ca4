"""Generates token ids: sampling, streaming, key-value caches."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from model import GPT
from nanosophia.configurator import UserError


class LayerCache:
    """Holds keys and values of the positions that one layer has seen: (B, n_head, length, hs)."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends keys and values of new positions; returns those of all positions."""
        if self.length == 0:
            B, H, _, hs = k.shape
            self.k, self.v = (x.new_empty(B, H, self.capacity, hs) for x in (k, v))
        first, self.length = self.length, self.length + k.size(2)
        self.k[:, :, first:self.length], self.v[:, :, first:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


def lay_out_for_decoding(model: GPT) -> None:
    """Stores the model's matrices column by column; what it computes stays the same.

    A CPU multiplies one vector by them twice as fast then, at the rate of its memory.
    """
    for p in model.parameters():
        if p.dim() == 2:
            p.data = p.data.t().contiguous().t()


@torch.inference_mode()
def stream(model: GPT, idx: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
           top_k: int | None = None, top_p: float = 1.0, repetition_penalty: float = 1.0,
           num_classes: int | None = None, stop_token: int | None = None,
           generator: torch.Generator | None = None) -> Iterator[Tensor]:
    """Yields sampled ids (B, 1) that continue ids (B, T), one position after the other.

    Only the first `num_classes` ids are drawn (the rest of the vocabulary is padding); the other
    settings are `sample_token`'s. Ends when every row has had `stop_token`; rows that had it before
    repeat it. Keys and values are cached until the context exceeds block_size; from then on it
    slides by one token, and each step is a full pass. Raises UserError where logits are not finite.
    """
    was_training, size = model.training, model.config.block_size
    model.eval()
    caches, new = None, None
    ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
    try:
        for n in range(max_new_tokens):
            if idx.size(1) > size or caches is None:
                caches = [LayerCache(min(size, idx.size(1) + max_new_tokens - n))
                          for _ in model.transformer.h]
                new = idx[:, -size:]
            logits = model(new, caches=caches)[:, -1, :num_classes].float()
            if not logits.isfinite().all():
                raise UserError("the model's logits are not finite, so nothing can be sampled; its "
                                "weights are damaged, or too large for this dtype")
            new = sample_token(logits, temperature, top_k, top_p=top_p, seen=idx,
                             repetition_penalty=repetition_penalty, generator=generator)
            if stop_token is not None:
                new = new.masked_fill(ended, stop_token)
                ended |= new == stop_token
            idx = torch.cat([idx, new], dim=1)
            yield new
            if stop_token is not None and ended.all():
                return
    finally:
        model.train(was_training)


def generate(model: GPT, idx: Tensor, max_new_tokens: int, **settings) -> Tensor:
    """Returns ids (B, T) with what `stream` continues them by: (B, T + max_new_tokens or fewer)."""
    return torch.cat([idx, *stream(model, idx, max_new_tokens, **settings)], dim=1)


def sample_token(logits: Tensor, temperature: float, top_k: int | None = None, *,
                 top_p: float = 1.0, seen: Tensor | None = None, repetition_penalty: float = 1.0,
                 generator: torch.Generator | None = None) -> Tensor:
    """Samples one id per row, (B, 1), from logits (B, V) at a temperature; 0 takes the most likely.

    Only the `top_k` most likely ids can be drawn, and of these only the most likely ones that
    together reach probability `top_p` (Holtzman et al., arXiv:1904.09751). Ids in `seen` (B, T)
    have positive logits divided and negative ones multiplied by `repetition_penalty` (Keskar et
    al., arXiv:1909.05858).
    """
    if repetition_penalty != 1 and seen is not None:
        old = logits.gather(1, seen)
        old = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
        logits = logits.scatter(1, seen, old)
    if temperature < 1e-6:  # where float32 would divide by nothing
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # (B, top_k), most likely first
    elif top_p < 1:
        logits, ids = logits.sort(descending=True)
    # Taking the maximum off first keeps small temperatures finite.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probabilities = F.softmax(logits, dim=-1)
    if top_p < 1:
        before = probabilities.cumsum(dim=-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0)
    drawn = torch.multinomial(probabilities, num_samples=1, generator=generator)
    return drawn if ids is None else ids.gather(1, drawn)
