"""Fused query, key and value projections with rotary positions: one operation, for training on a CPU.

A complex product rotates pairs of adjacent numbers eight times as fast as PyTorch's operations rotate the two halves of
a head. So the rows of the query and key weights are interleaved before the products. Attention scores do not depend on
the order of dimensions, as long as queries and keys share it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.kernels import dispatch
from lm.kernels.matmul import matmul, weight_gradient
from lm.kernels.rotary import interleave_halves, separate_halves


def qkv_projection(
    x: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, rotated as by ``lm.kernels.rotary`` but with interleaved dimensions, and values.

    Args:
        x: (B, T, hidden), float32 or float64 on a CPU; the other tensors have the same dtype. Under autocast the
            products' factors are cast to its dtype.
        query: weight (H · D, hidden). key, value: weights (Hkv · D, hidden).
        cos, sin: (B, T, 1, D / 2), of the angles; they carry no gradient.

    Returns:
        Queries (B, T, H, D), keys and values (B, T, Hkv, D). Dimension i of ``rotary`` is 2i here, and D / 2 + i is
        2i + 1.
    """
    return _QKVProjection.apply(*dispatch.factors(x, query, key, value), torch.complex(cos, sin))


def qkv_forward(
    x: Tensor, query: Tensor, key: Tensor, value: Tensor, rotation: Tensor
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """The result, by one product, and its weight, whose rows are those of the queries, the keys and the values.

    The dtype of x and the weights is that of the product; the result is in float32 at least.
    """
    width = 2 * rotation.shape[-1]
    weight = torch.cat((interleave_halves(query, width), interleave_halves(key, width), value))
    heads = [part.shape[0] // width for part in (query, key, value)]
    precise = torch.promote_types(x.dtype, torch.float32)
    projected = matmul(x, weight.T).to(precise).unflatten(-1, (-1, width))
    _pairs(projected[:, :, : -heads[2]]).mul_(rotation)
    q, k, v = projected.split(heads, dim=2)
    return (q, k, v), weight


def qkv_backward(
    grads: tuple[Tensor, ...], x: Tensor, weight: Tensor, rotation: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x and of the weights of queries, keys and values."""
    width, heads = 2 * rotation.shape[-1], [grad.shape[2] for grad in grads]
    grad = torch.cat(grads, dim=2)
    _pairs(grad[:, :, : -heads[2]]).mul_(rotation.conj_physical())
    grad = grad.flatten(2).to(weight.dtype)
    grad_query, grad_key, grad_value = weight_gradient(grad, x).split([number * width for number in heads])
    return matmul(grad, weight), separate_halves(grad_query, width), separate_halves(grad_key, width), grad_value


class _QKVProjection(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, query: Tensor, key: Tensor, value: Tensor, rotation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        heads, weight = qkv_forward(x, query, key, value, rotation)
        ctx.save_for_backward(x, weight, rotation)
        return heads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *qkv_backward(grads, *ctx.saved_tensors), None


def _pairs(heads: Tensor) -> Tensor:
    """(B, T, H, D) as complex numbers (B, T, H, D / 2), a view."""
    return torch.view_as_complex(heads.unflatten(-1, (-1, 2)))
