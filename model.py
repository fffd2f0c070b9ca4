"""GPT-2 in one file: token ids (B, T) in, logits (B, T, V) or the mean cross-entropy out.

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; parameter names
as in OpenAI's release. Differences that are options: no biases and no dropout by default (as in the
Sophia paper, arXiv:2305.14342), attention logits divided by the layer index. Needs torch alone;
knows nothing of optimizers, ranks or files.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Shape of the model; defaults are GPT-2 small without biases."""

    block_size: int = 1024  # longest context, tokens
    vocab_size: int = 50304  # rows of the embedding: 50257 classes, padded to a multiple of 64
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    activation: Literal["gelu_tanh", "gelu"] = "gelu_tanh"
    scale_attn_by_inverse_layer_idx: bool = False


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

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        q, k, v = (
            part.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, n_head, T, hs)
            for part in self.c_attn(x).split(C, dim=2)
        )
        y = F.scaled_dot_product_attention(
            q, k, v, dropout_p=self.dropout if self.training else 0.0, is_causal=True,
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

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """GPT-2 with the head tied to the token embedding.

    `activation_checkpointing`, off at first, recomputes each block in the backward pass instead of
    keeping what is inside it.
    """

    activation_checkpointing = False

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

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (B, T, V) for ids `idx` (B, T), or with `targets` (B, T) the mean loss in nats.

        Targets of -100 are ignored. Raises ValueError when T exceeds block_size.
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
        logits = self.head(self.transformer.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits
        # Under autocast cross_entropy itself works in float32.
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

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

    @torch.inference_mode()
    def generate(self, idx: Tensor, max_new_tokens: int, *, temperature: float = 1.0,
                 top_k: int | None = None, num_classes: int | None = None,
                 generator: torch.Generator | None = None) -> Tensor:
        """Continues ids (B, T) by `max_new_tokens` sampled ones: (B, T + max_new_tokens).

        Only the first `num_classes` ids are drawn (the rest of the vocabulary is padding). Contexts
        longer than block_size slide. Temperature 0 takes the likeliest token.
        """
        was_training = self.training
        self.eval()
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size:]
            logits = self.forward(context)[:, -1, :num_classes].float()  # (B, num_classes)
            idx = torch.cat([idx, draw_token(logits, temperature, top_k, generator)], dim=1)
        self.train(was_training)
        return idx


def draw_token(logits: Tensor, temperature: float, top_k: int | None,
               generator: torch.Generator | None) -> Tensor:
    """One id per row, (B, 1), from logits (B, V) at a temperature, among the top_k likeliest."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    if top_k is not None and top_k < logits.size(-1):
        floor = logits.topk(top_k).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -math.inf)
    # Taking the maximum off first keeps the smallest temperatures finite.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    probabilities = F.softmax(logits, dim=-1)
    return torch.multinomial(probabilities, num_samples=1, generator=generator)
