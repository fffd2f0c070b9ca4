"""GPT-2 in one file: token ids (B, T) in, logits (B, T, V) or the mean cross-entropy out.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; parameters have
the names of OpenAI's release. By default there are no biases and no dropout, as in the Sophia paper
(arXiv:2305.14342). `rotary_fraction`, `parallel_residual` and `tied_head` make it GPT-NeoX (Black
et al. 2022, arXiv:2204.06745). The file needs torch alone and knows nothing of optimizers, ranks or
files.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def option(default: Any, meaning: str, **limits: Any) -> Any:
    """Returns a field with what `train.py --help` says about it and the limits to check."""
    return field(default=default, metadata=dict(meaning=meaning, **limits))


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the model; the defaults are GPT-2 small without biases.

    The only list of the model's options: flags, checkpoints and `sample.py` follow from it. An
    older checkpoint lacks a field that was added later and gets its default, so that default must
    compute what the code computed before.
    """

    block_size: int = option(1024, "longest context", unit="tokens", low=1, high=1 << 20,
                             section="model")
    vocab_size: int = option(50304, "rows of the embedding: the classes padded to a multiple of 64",
                             low=1, high=1 << 20)
    n_layer: int = option(12, "transformer blocks", low=1, high=1000)
    n_head: int = option(12, "attention heads", low=1, high=1 << 16)
    n_embd: int = option(768, "width", low=1, high=1 << 16)
    dropout: float = option(0.0, "dropout probability", low=0, below=1)
    bias: bool = option(False, "biases in linear layers and layer norms")
    activation: Literal["gelu_tanh", "gelu"] = option(
        "gelu_tanh", "tanh-approximate GELU (GPT-2's and the authors' code's) or the exact one")
    scale_attn_by_inverse_layer_idx: bool = option(
        False, "divide attention logits by the layer's index, from 1 (the paper: for AdamW and "
               "Lion at 355M and above)")
    rotary_fraction: float = option(
        0.0, "share of each head's channels with rotary positions (GPT-NeoX: 0.25); 0 = learned "
             "position embeddings", low=0, high=1)
    parallel_residual: bool = option(
        False, "GPT-NeoX: attention and MLP of a block side by side on the same input")
    tied_head: bool = option(True, "the head is the token embedding; GPT-NeoX has one of its own")

    @property
    def rotary_channels(self) -> int:
        """Returns how many channels of each head rotary positions turn."""
        return int(self.n_embd // self.n_head * self.rotary_fraction)


def rotate(x: Tensor, pos: Tensor, channels: int, base: float = 10_000.0) -> Tensor:
    """Returns x (B, n_head, T, hs) with its first `channels` turned by its positions `pos` (T,).

    Channel i and channel i + channels/2 are a pair that position p turns by p / base^(2i/channels)
    radians (Su et al. 2021, arXiv:2104.09864, in GPT-NeoX's order of the channels).
    """
    half = channels // 2
    dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 could not tell positions apart
    frequency = base ** (-torch.arange(half, device=x.device, dtype=dtype) / half)
    angle = pos[:, None] * frequency  # (T, half)
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b, rest = x.split([half, half, x.size(-1) - channels], dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Returns causal attention (B, n_head, T, hs) of q (B, n_head, T, hs) to k and v, through
    torch's fused kernel; a single query (T = 1) sees every key."""
    T = q.size(2)
    options["is_causal"] = T > 1
    if q.device.type == "cpu" and 1 < T < 256:  # its backward pass in bfloat16 takes twice as long
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(*(
                x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)),
                **options).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, **options)


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention through torch's fused kernel."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.rotary_channels = config.rotary_channels
        self.scale = 1 / math.sqrt(config.n_embd // config.n_head)
        if config.scale_attn_by_inverse_layer_idx:
            self.scale /= layer + 1

    def forward(self, x: Tensor, pos: Tensor, cache=None) -> Tensor:
        """Returns (B, T, C) for x (B, T, C) at positions `pos` (T,), which follows the keys and
        values in `cache`."""
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, hs)
            for part in self.c_attn(x).split(C, dim=2)
        )
        if self.rotary_channels:
            q, k = (rotate(part, pos, self.rotary_channels) for part in (q, k))
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, n_head, all positions, hs)
        y = attend(q, k, v, dropout_p=self.dropout if self.training else 0.0, scale=self.scale)
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
    """Pre-norm residual block, attention and MLP one after the other or side by side."""

    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)
        self.parallel = config.parallel_residual

    def forward(self, x: Tensor, pos: Tensor, cache=None) -> Tensor:
        y = x + self.attn(self.ln_1(x), pos, cache)
        return y + self.mlp(self.ln_2(x if self.parallel else y))


SampleLabels = Callable[[Tensor, Tensor], Tensor]


def cross_entropy(x: Tensor, head: Tensor, targets: Tensor,
                  sample_labels_fn: SampleLabels | None = None) -> Tensor:
    """Returns the mean cross-entropy of the logits x head^T: x (n, C), head (V, C), targets (n,).

    Targets of -100 are ignored. With `sample_labels_fn` the labels are
    sample_labels_fn(probabilities (n, V), targets), whatever it takes as targets (estimators.py:
    uniform numbers).
    """
    logits = F.linear(x, head)  # (n, V)
    if sample_labels_fn is not None:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        targets = sample_labels_fn(F.softmax(logits.detach(), dim=-1, dtype=dtype), targets)
    return F.cross_entropy(logits, targets)  # under autocast itself in float32


class GPT(nn.Module):
    """GPT-2, or with its config's last three options GPT-NeoX.

    `activation_checkpointing` recomputes each block in the backward pass instead of keeping its
    activations. `loss_fn` may be set to another function with the signature of `cross_entropy`.
    """

    activation_checkpointing = False

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.loss_fn = cross_entropy
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd),
            **({} if config.rotary_channels else dict(
                wpe=nn.Embedding(config.block_size, config.n_embd))),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        ))
        if not config.tied_head:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights()

    def init_weights(self) -> None:
        """Draws initial weights as nanoGPT: N(0, .02), residual projections .02/sqrt(2 n_layer)."""
        for name, p in self.named_parameters():
            self.init_weight(name, p)

    def init_weight(self, name: str, p: Tensor) -> None:
        """Draws the parameter called `name`; those of norms keep torch's ones."""
        if p.dim() >= 2:
            is_residual = name.endswith("c_proj.weight")
            nn.init.normal_(p, std=0.02 / math.sqrt(2 * self.config.n_layer if is_residual else 1))
        elif name.endswith("bias"):
            nn.init.zeros_(p)

    def forward(self, idx: Tensor, targets: Tensor | None = None, caches: Sequence | None = None,
                sample_labels_fn: SampleLabels | None = None) -> Tensor:
        """Returns logits (B, T, V) for ids `idx` (B, T), or with `targets` (B, T) the mean loss.

        The loss is in nats per target that is not -100; `sample_labels_fn` is `cross_entropy`'s.
        With `caches`, one per block, `idx` follows the positions that they hold (T is 1 unless they
        are empty), they are extended, and only the last position's logits (B, 1, V) are computed.
        Raises ValueError when the positions exceed block_size.
        """
        past = caches[0].length if caches else 0
        T = past + idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"{T} tokens do not fit the model's context of "
                             f"{self.config.block_size}; crop the input")
        pos = torch.arange(past, T, device=idx.device)
        x = self.transformer.wte(idx)
        if not self.config.rotary_channels:
            x = x + self.transformer.wpe(pos)
        x = self.transformer.drop(x)
        for layer, block in enumerate(self.transformer.h):  # x is (B, T, C)
            if self.activation_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, pos, use_reentrant=False)
            else:
                x = block(x, pos, caches[layer] if caches else None)
        x = self.transformer.ln_f(x[:, -1:] if caches else x)
        head = (self.transformer.wte if self.config.tied_head else self.lm_head).weight
        if targets is None:
            return F.linear(x, head)  # (B, T, V)
        return self.loss_fn(x.flatten(0, 1), head, targets.flatten(), sample_labels_fn)

    def num_params(self, non_embedding: bool = True) -> int:
        """Returns the number of parameters, by default without the position embedding (nanoGPT)."""
        total = sum(p.numel() for p in self.parameters())
        if non_embedding and not self.config.rotary_channels:
            total -= self.transformer.wpe.weight.numel()
        return total

    def flops_per_token(self) -> int:
        """Returns training FLOPs per token, forward and backward: 6N + 12 L d T (PaLM, appendix B).

        N counts the head, tied or not, and no table that is only looked up; attention is counted
        without the saving of the causal mask.
        """
        c = self.config
        N = self.num_params() - (0 if c.tied_head else self.transformer.wte.weight.numel())
        return 6 * N + 12 * c.n_layer * c.n_embd * c.block_size
