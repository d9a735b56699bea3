"""Queries, keys and values of one attention, turned by their positions: one operation for training on a CPU.

A complex product turns a pair of numbers that lie side by side eight times as fast as PyTorch's operations turn two
halves of a head. So the rows of the query and key weights are put in that order before the products. The scores of
queries and keys do not depend on an order that both share.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.kernels.matmul import times, transposed_times


def projections(
    x: Tensor, query: Tensor, key: Tensor, value: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads of queries and keys, turned as by ``lm.kernels.rotary`` but with their dimensions in another order, and of
    values.

    Args:
        x: (B, T, hidden). query: (H · D, hidden). key, value: (Hkv · D, hidden).
        cos, sin: (B, T, 1, D / 2), of the angles; they carry no gradient.

    Returns:
        (B, T, H, D), and (B, T, Hkv, D) twice. Dimension i of ``rotary`` is 2i here, D / 2 + i is 2i + 1.
    """
    out: tuple[Tensor, Tensor, Tensor] = _Projections.apply(x, query, key, value, torch.complex(cos, sin))
    return out


class _Projections(torch.autograd.Function):
    """All in one product: its columns are those of the queries, the keys and the values."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, query: Tensor, key: Tensor, value: Tensor, rotation: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = 2 * rotation.shape[-1]
        weight = torch.cat((side_by_side(query, width), side_by_side(key, width), value))
        ctx.save_for_backward(x, weight, rotation)
        ctx.heads = [part.shape[0] // width for part in (query, key, value)]
        heads = times(x, weight.T).unflatten(-1, (-1, width))
        turned = heads[:, :, : -ctx.heads[2]]
        _pairs(turned).mul_(rotation)
        q, k, v = heads.split(ctx.heads, dim=2)
        return q, k, v

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rotation = ctx.saved_tensors
        grad = torch.cat(grads, dim=2)
        _pairs(grad[:, :, : -ctx.heads[2]]).mul_(rotation.conj_physical())
        grad = grad.flatten(2)
        width = 2 * rotation.shape[-1]
        parts = transposed_times(grad, x).split([heads * width for heads in ctx.heads])
        return times(grad, weight), _in_halves(parts[0], width), _in_halves(parts[1], width), parts[2], None


def _pairs(heads: Tensor) -> Tensor:
    """(B, T, H, D) as complex numbers (B, T, H, D / 2), a view."""
    return torch.view_as_complex(heads.unflatten(-1, (-1, 2)))


def side_by_side(weight: Tensor, width: int) -> Tensor:
    """Weight (heads · width, K), contiguous, with row i of each head at 2i, and row width / 2 + i at 2i + 1."""
    return weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def _in_halves(weight: Tensor, width: int) -> Tensor:
    """The inverse of ``side_by_side``."""
    return weight.view(-1, width // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
