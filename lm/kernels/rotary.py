"""Rotary positions, optionally after QK-norm, in one pass over the heads.

Only GPUs have a kernel for it. Compiled by PyTorch, the two steps read each head twice in the forward pass and move 2.3
times the necessary bytes in the backward pass, because a reduction and a rotation do not fuse (docs/lab-notes.md).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lm.kernels import dispatch, reference


def rotary(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None = None, epsilon: float = 0.0) -> Tensor:
    """Rotate the pairs (x[i], x[i + D / 2]) of each head by its position's angles (Su et al. 2021, eq. 34).

    Args:
        x: (B, T, H, D), D even.
        cos, sin: float32 (B, T, 1, D / 2), of the angles; they carry no gradient.
        weight: (D,), of the RMSNorm applied to each head first (QK-norm, Henry et al. 2020; Dehghani et al. 2023);
            None: no norm.
        epsilon: added to the mean square by the norm.

    Returns:
        (B, T, H, D) in x's dtype, computed in float32 at least.
    """
    if dispatch.reference_requested() or not (x.is_cuda or dispatch.interpreted()):
        return reference.rotary(x, cos, sin, weight, epsilon)
    return _forward(x, cos, sin, weight, epsilon)


def interleave_halves(weight: Tensor, width: int) -> Tensor:
    """Reorder the rows of a projection (heads · width, K) so that the pairs of ``rotary`` become adjacent.

    Row i of each head moves to 2i, and row width / 2 + i to 2i + 1. The result is contiguous.
    """
    return weight.view(-1, 2, width // 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def separate_halves(weight: Tensor, width: int) -> Tensor:
    """The inverse of ``interleave_halves``."""
    return weight.view(-1, width // 2, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


@torch.library.custom_op("kindling::rotary", mutates_args=())
def _forward(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    if dispatch.choose(x) != "triton":
        return reference.rotary(x, cos, sin, weight, epsilon)
    from lm.kernels import rotary_triton

    return rotary_triton.forward(x, cos, sin, weight, epsilon)


@_forward.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("kindling::rotary_backward", mutates_args=())
def _backward(
    grad_out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x, (B, T, H, D), and of the weight, (D,), or (0,) without one."""
    if dispatch.choose(x) == "triton":
        from lm.kernels import rotary_triton

        return rotary_triton.backward(grad_out, x, cos, sin, weight, epsilon)
    first, second = grad_out.chunk(2, dim=-1)
    grad = torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)
    if weight is None:
        return grad.to(x.dtype), x.new_empty(0)
    wide = x.to(grad.dtype)
    inverse = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    normed, by_norm = wide * inverse, grad * weight.to(grad.dtype)
    grad_x = (by_norm - normed * (by_norm * normed).mean(-1, keepdim=True)) * inverse
    return grad_x.to(x.dtype), (grad * normed).sum((0, 1, 2)).to(weight.dtype)


@_backward.register_fake
def _(
    grad_out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, weight, ctx.epsilon = inputs
    ctx.save_for_backward(x, cos, sin, weight)


def _differentiate(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    x, cos, sin, weight = ctx.saved_tensors
    grad_x, grad_weight = _backward(grad_out, x, cos, sin, weight, ctx.epsilon)
    return grad_x, None, None, None if weight is None else grad_weight, None


_forward.register_autograd(_differentiate, setup_context=_save)
