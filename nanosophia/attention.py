"""Attention that can be differentiated twice without keeping its matrices of scores.

Torch's fused kernels have no second derivative, and its math kernel keeps about four float32
matrices of n_head T^2 scores per block and sequence until the second backward pass ends. Inside
`TwiceDifferentiableAttention` the forward and first backward pass use the fused kernels, and the
second backward pass computes the scores anew, one block and one sequence at a time.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

FIRST_ORDER = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q, k and v


class TwiceDifferentiableAttention(TorchFunctionMode):
    """Context in which F.scaled_dot_product_attention recomputes for its second derivative.

    Calls with dropout or a mask, whose random numbers and gradients would need more, and calls
    whose tensors are not (B, n_head, T, hs) with one B are left as they are.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is not F.scaled_dot_product_attention or len(args) != 3 \
                or kwargs.get("dropout_p") or kwargs.get("attn_mask") is not None \
                or any(x.dim() != 4 for x in args) or len({len(x) for x in args} - {0}) != 1:
            return func(*args, **kwargs)
        device = args[0].device.type
        if torch.is_autocast_enabled(device):  # it does not reach the backward passes
            dtype = torch.get_autocast_dtype(device)
            args = tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in args)
        return _Attention.apply(*args, lambda q, k, v: func(q, k, v, **kwargs))


class _Attention(torch.autograd.Function):
    """Attention; its gradient is `_AttentionGradient`."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.attention = attention
        with sdpa_kernel(FIRST_ORDER):
            return attention(q, k, v)

    @staticmethod
    def backward(ctx, dy: Tensor):
        return *_AttentionGradient.apply(*ctx.saved_tensors, dy, ctx.attention), None


class _AttentionGradient(torch.autograd.Function):
    """The gradient of attention with respect to q, k and v, which can be differentiated once."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, dy: Tensor, attention: Attention):
        ctx.save_for_backward(q, k, v, dy)
        ctx.attention = attention
        with torch.enable_grad(), sdpa_kernel(FIRST_ORDER):
            inputs = _leaves(q, k, v)
            return torch.autograd.grad(attention(*inputs), inputs, dy)

    @staticmethod
    def backward(ctx, *cotangents: Tensor):
        if torch.is_grad_enabled():  # create_graph
            raise RuntimeError("attention that recomputes has no third derivative")
        rows = [_second_derivative(ctx.attention, row[:4], row[4:]) for row in zip(
            *(x.split(1) for x in (*ctx.saved_tensors, *cotangents)), strict=True)]
        return *(torch.cat(parts) for parts in zip(*rows, strict=True)), None


def _second_derivative(attention: Attention, inputs, cotangents) -> tuple[Tensor, ...]:
    """Returns the derivatives of cotangents . gradient(q, k, v, dy), of one sequence."""
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        *qkv, dy = _leaves(*inputs)
        gradient = torch.autograd.grad(attention(*qkv), qkv, dy, create_graph=True)
        return torch.autograd.grad(gradient, (*qkv, dy), cotangents)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [x.detach().requires_grad_() for x in tensors]
