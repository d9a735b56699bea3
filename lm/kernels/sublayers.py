"""Each half of a block as one operation, for training on a CPU: norm, attention or feed-forward, residual addition.

The arithmetic is that of the separate kernels, bit for bit. With few tokens in a batch, calling them through autograd
one by one, and adding up the two gradients of the residual stream in new memory, takes several percent of a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.kernels import attention_torch, dispatch
from lm.kernels.matmul import matmul, weight_gradient
from lm.kernels.qkv_projection import qkv_backward, qkv_forward
from lm.kernels.rms_norm import rms_norm_backward, rms_norm_forward
from lm.kernels.swiglu import swiglu_backward, swiglu_forward


def attention_sublayer(
    x: Tensor, norm: Tensor, epsilon: float, weights: tuple[Tensor, Tensor, Tensor, Tensor],
    rotary: tuple[Tensor, Tensor], intervals: tuple[Tensor, Tensor],
) -> Tensor:  # fmt: skip
    """``x + attention(rms_norm(x)) @ output.T``, over key intervals and with rotary positions.

    Args:
        x: (B, T, hidden), float32 or float64 on a CPU; the other tensors have the same dtype. Under autocast the
            factors of matrix products are cast to its dtype, but not those of attention, which gains nothing by it.
        norm: (hidden,), of the RMSNorm, with its ``epsilon``.
        weights: query (H · D, hidden), key and value (Hkv · D, hidden), output (hidden, H · D).
        rotary: cosines and sines (B, T, 1, D / 2); they carry no gradient.
        intervals: int32 lo and hi (B, T), as for ``lm.kernels.attention``.
    """
    return _Attention.apply(x, norm, *dispatch.factors(*weights), torch.complex(*rotary), *intervals, epsilon)


def feed_forward_sublayer(x: Tensor, norm: Tensor, epsilon: float, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``x + swiglu(rms_norm(x), gate, up, down)``: x (…, hidden), norm (hidden,), the weights as for ``swiglu``."""
    return _FeedForward.apply(x, norm, *dispatch.factors(gate, up, down), epsilon)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor,
        rotation: Tensor, lo: Tensor, hi: Tensor, epsilon: float,
    ) -> Tensor:  # fmt: skip
        normed, inverse = rms_norm_forward(x, norm, epsilon)
        normed = normed.to(query.dtype)
        (q, k, v), weight = qkv_forward(normed, query, key, value, rotation)
        out, lse = attention_torch.forward(q, k, v, lo, hi, q.shape[-1] ** -0.5, 0.0)
        ctx.save_for_backward(x, norm, inverse, normed, weight, rotation, q, k, v, out, lse, lo, hi, output)
        return matmul(out.flatten(2).to(output.dtype), output.T).to(x.dtype).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, inverse, normed, weight, rotation, q, k, v, out, lse, lo, hi, output = ctx.saved_tensors
        factor = grad.to(output.dtype)
        grad_output = weight_gradient(factor, out.flatten(2).to(output.dtype))
        grad_out = matmul(factor, output).to(out.dtype).view(out.shape)
        heads = attention_torch.backward(grad_out, q, k, v, out, lse, lo, hi, q.shape[-1] ** -0.5, 0.0)
        grad_normed, *grad_weights = qkv_backward(heads, normed, weight, rotation)
        grad_x, grad_norm = rms_norm_backward(grad_normed.to(x.dtype), x, norm, inverse)
        return grad_x.add_(grad), grad_norm, *grad_weights, grad_output, None, None, None, None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, epsilon: float) -> Tensor:
        normed, inverse = rms_norm_forward(x, norm, epsilon)
        normed = normed.to(gate.dtype)
        out, results = swiglu_forward(normed, gate, up, down)
        ctx.save_for_backward(x, norm, inverse, normed, gate, up, down, *results)
        return out.to(x.dtype).add_(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, norm, inverse, *feed_forward = ctx.saved_tensors
        grad_normed, *grad_weights = swiglu_backward(grad.to(feed_forward[0].dtype), *feed_forward)
        grad_x, grad_norm = rms_norm_backward(grad_normed.to(x.dtype), x, norm, inverse)
        return grad_x.add_(grad), grad_norm, *grad_weights, None
