"""GPT-2 in one file: token ids (B, T) in, logits (B, T, V) or the mean cross-entropy out.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; parameter names
as in OpenAI's release. Differences that are options: no biases and no dropout by default (as in the
Sophia paper, arXiv:2305.14342), attention logits divided by the layer index. Needs torch alone;
knows nothing of optimizers, ranks or files.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint


def option(default: Any, meaning: str, **limits: Any) -> Any:
    """A field with what `train.py --help` says of it and the limits that are checked."""
    return field(default=default, metadata=dict(meaning=meaning, **limits))


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the model; the defaults are GPT-2 small without biases.

    The only list of the model's options: flags, checkpoints and `sample.py` follow from it. An
    older checkpoint lacks a field that was added later and gets its default, so that default must
    compute what the code computed before.
    """

    block_size: int = option(1024, "longest context", unit="tokens", low=1, section="model")
    vocab_size: int = option(50304, "rows of the embedding: the classes padded to a multiple of 64",
                             low=1)
    n_layer: int = option(12, "transformer blocks", low=1)
    n_head: int = option(12, "attention heads", low=1)
    n_embd: int = option(768, "width", low=1)
    dropout: float = option(0.0, "dropout probability", low=0, below=1)
    bias: bool = option(False, "biases in linear layers and layer norms")
    activation: Literal["gelu_tanh", "gelu"] = option(
        "gelu_tanh", "tanh-approximate GELU (GPT-2's and the authors' code's) or the exact one")
    scale_attn_by_inverse_layer_idx: bool = option(
        False, "divide attention logits by the layer's index, from 1 (the paper: for AdamW and "
               "Lion at 355M and above)")


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention through torch's fused kernel."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, hs)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, n_head, all positions, hs)
        y = F.scaled_dot_product_attention(  # the last token alone may look at all positions
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=T > 1,
            scale=self.scale)
        y = y.transpose(1, 2).reshape(B, T, C)
        return self.resid_dropout(self.c_proj(y))


class MLP(nn.Module):
    """Position-wise feed-forward layer of width 4 * n_embd."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.act = nn.GELU(approximate="tanh" if config.activation == "gelu_tanh" else "none")
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class Block(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cache: "LayerCache | None" = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class LayerCache:
    """Keys and values of the positions that one layer has seen, each (B, n_head, length, hs)."""

    def __init__(self, capacity: int):
        self.capacity, self.length = capacity, 0

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Appends the keys and values of new positions; those of all."""
        if self.length == 0:
            B, H, _, hs = k.shape
            self.k, self.v = (x.new_empty(B, H, self.capacity, hs) for x in (k, v))
        first, self.length = self.length, self.length + k.size(2)
        self.k[:, :, first:self.length], self.v[:, :, first:self.length] = k, v
        return self.k[:, :, :self.length], self.v[:, :, :self.length]


class ChunkedCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits x W^T that exist for `chunk` positions at a time.

    x (n, C), W (V, C), targets and `label` as in `GPT.forward`. Each chunk's gradient is taken
    while its logits are there, so nothing is computed twice; what is kept for the backward pass is
    the gradient by x and by W. Matrix products under autocast are in its precision, all else is in
    float32. `gradients` False: the loss alone.
    """

    @staticmethod
    def forward(ctx, x: Tensor, W: Tensor, targets: Tensor, label, chunk: int,
                gradients: bool) -> Tensor:
        device, wide = x.device.type, torch.promote_types(x.dtype, torch.float32)
        low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        loss, count = x.new_zeros((), dtype=wide), targets.new_zeros((), dtype=torch.long)
        with torch.autocast(device, enabled=False):
            head = W.to(low)
            dx = torch.empty_like(x) if gradients else None
            dW = torch.empty_like(W, dtype=wide) if gradients else None
            for rows in (slice(i, i + chunk) for i in range(0, len(x), chunk)):
                hidden, wanted = x[rows].to(low), targets[rows]
                logits = F.linear(hidden, head)  # (chunk, V)
                p = F.softmax(logits, dim=-1, dtype=wide)
                labels = wanted if label is None else label(p, wanted)
                counts = (labels != -100).unsqueeze(1)
                place = labels.unsqueeze(1).clamp_min(0)  # (chunk, 1)
                # log p of a label, finite even where p is 0
                log_sum = logits.amax(1, keepdim=True) - p.amax(1, keepdim=True).log()
                loss += ((log_sum - logits.gather(1, place)) * counts).sum()
                count += counts.sum()
                if gradients:
                    p.scatter_add_(1, place, torch.full_like(place, -1, dtype=wide))
                    p = p.to(low)  # the gradient by the logits, but for rows that do not count
                    dx[rows] = (p @ head) * counts
                    hidden = hidden * counts
                    first = rows.start == 0
                    if low == wide:
                        dW.addmm_(p.t(), hidden, beta=0 if first else 1)
                    else:
                        torch.add(0 if first else dW, p.t() @ hidden, out=dW)
                del p  # before the next chunk's
        ctx.gradients, ctx.count = (dx, dW), count
        return loss / count

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor):
        if ctx.gradients is None:
            raise RuntimeError("the chunked loss can be differentiated once")
        dx, dW = ctx.gradients
        ctx.gradients = None  # they are used up
        scale = gradient / ctx.count
        return dx.mul_(scale), dW.mul_(scale), None, None, None, None


class GPT(nn.Module):
    """GPT-2 with the head tied to the token embedding.

    `activation_checkpointing`, off at first, recomputes each block in the backward pass instead of
    keeping what is inside it. `loss_chunk`, when not 0, has the loss computed by
    `ChunkedCrossEntropy` on so many positions at a time; 0 is the plain way, which torch.compile
    fuses.
    """

    activation_checkpointing = False
    loss_chunk = 0

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        self.init_weights()

    def init_weights(self) -> None:
        """GPT-2's initialisation: N(0, .02), residual projections .02/sqrt(2 n_layer), no bias."""
        residual_std = 0.02 / math.sqrt(2 * self.config.n_layer)
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=residual_std if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: Tensor, targets: Tensor | None = None,
                label: Callable[[Tensor, Tensor], Tensor] | None = None) -> Tensor:
        """Logits (B, T, V) for ids `idx` (B, T), or with `targets` (B, T) the mean loss in nats.

        Targets of -100 are ignored. With `label` they are what it makes labels of:
        `label(probabilities (n, V), targets (n,))` gives ids (n,), drawn from the model's own
        probabilities, say. Raises ValueError when T exceeds block_size.
        """
        B, T = idx.shape
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit the model's context of "
                             f"{self.config.block_size}; crop the input")
        pos = torch.arange(T, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = self.transformer.ln_f(x)
        if targets is None:
            return self.head(x)  # (B, T, V)
        targets = targets.flatten()
        if self.loss_chunk:
            return ChunkedCrossEntropy.apply(x.flatten(0, 1), self.transformer.wte.weight, targets,
                                             label, self.loss_chunk, torch.is_grad_enabled())
        logits = self.head(x).flatten(0, 1)  # (B * T, V)
        if label is not None:
            wide = torch.promote_types(logits.dtype, torch.float32)
            targets = label(F.softmax(logits.detach(), dim=-1, dtype=wide), targets)
        # Under autocast cross_entropy itself works in float32.
        return F.cross_entropy(logits, targets)

    def head(self, x: Tensor) -> Tensor:
        """Logits (..., V) of final hidden states (..., C)."""
        return F.linear(x, self.transformer.wte.weight)

    def num_params(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without the position embedding (nanoGPT's count)."""
        total = sum(p.numel() for p in self.parameters())
        return total - self.transformer.wpe.weight.numel() if non_embedding else total

    def flops_per_token(self) -> int:
        """Training FLOPs per token, forward and backward: 6N + 12 L d T (PaLM, appendix B).

        N counts the tied head once and not the positions; attention's causal half is not taken off.
        """
        c = self.config
        return 6 * self.num_params() + 12 * c.n_layer * c.n_embd * c.block_size

    def next_logits(self, idx: Tensor, caches: list[LayerCache]) -> Tensor:
        """Logits (B, V) of the token after ids `idx` (B, T), which follow what the caches hold.

        T is 1 unless the caches are empty. Extends the caches.
        """
        past = caches[0].length
        pos = torch.arange(past, past + idx.size(1), device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block, cache in zip(self.transformer.h, caches, strict=True):
            x = block(x, cache)
        return self.head(self.transformer.ln_f(x[:, -1]))

    @torch.inference_mode()
    def stream(self, idx: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
               top_k: int | None = None, top_p: float = 1.0, repetition_penalty: float = 1.0,
               num_classes: int | None = None, stop_token: int | None = None,
               generator: torch.Generator | None = None) -> Iterator[Tensor]:
        """Continues ids (B, T) by sampled ones, given one by one as (B, 1).

        Only the first `num_classes` ids are drawn (the rest of the vocabulary is padding); the
        other settings are `draw_token`'s. Ends when every row has had `stop_token`; rows that had
        it earlier repeat it. Contexts longer than block_size slide by one token, each then a full
        pass; until then keys and values are cached.
        """
        was_training, size = self.training, self.config.block_size
        self.eval()
        caches, fresh = None, None
        ended = torch.zeros(idx.size(0), 1, dtype=torch.bool, device=idx.device)
        try:
            for n in range(max_new_tokens):
                if idx.size(1) > size or caches is None:
                    caches = [LayerCache(min(size, idx.size(1) + max_new_tokens - n))
                              for _ in self.transformer.h]
                    fresh = idx[:, -size:]
                logits = self.next_logits(fresh, caches)[:, :num_classes].float()
                fresh = draw_token(logits, temperature, top_k, top_p=top_p, seen=idx,
                                   repetition_penalty=repetition_penalty, generator=generator)
                if stop_token is not None:
                    fresh = fresh.masked_fill(ended, stop_token)
                    ended |= fresh == stop_token
                idx = torch.cat([idx, fresh], dim=1)
                yield fresh
                if stop_token is not None and ended.all():
                    return
        finally:
            self.train(was_training)

    def generate(self, idx: Tensor, max_new_tokens: int, **settings) -> Tensor:
        """Ids (B, T) and what `stream` continues them by: (B, T + max_new_tokens or fewer)."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **settings)], dim=1)


def draw_token(logits: Tensor, temperature: float, top_k: int | None = None, *, top_p: float = 1.0,
               seen: Tensor | None = None, repetition_penalty: float = 1.0,
               generator: torch.Generator | None = None) -> Tensor:
    """One id per row, (B, 1), from logits (B, V) at a temperature; 0 takes the likeliest.

    Among the `top_k` likeliest, and of these the likeliest that together reach probability `top_p`
    (Holtzman et al., arXiv:1904.09751). Ids in `seen` (B, T) have positive logits divided and
    negative ones multiplied by `repetition_penalty` (Keskar et al., arXiv:1909.05858).
    """
    if repetition_penalty != 1 and seen is not None:
        old = logits.gather(1, seen)
        old = torch.where(old > 0, old / repetition_penalty, old * repetition_penalty)
        logits = logits.scatter(1, seen, old)
    if temperature < 1e-6:  # where float32 would divide by nothing
        return logits.argmax(dim=-1, keepdim=True)
    ids = None
    if top_k is not None and top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # (B, top_k), likeliest first
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
