"""RMSNorm. On a CPU it takes a third of the time of ``F.rms_norm``, which PyTorch composes of other operations."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.kernels import dispatch


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Divide x (…, D) by the root mean square of its last dimension, times ``weight`` (D,) (Zhang and Sennrich 2019).

    ``epsilon`` is added to the mean square. The result has x's dtype.
    """
    if not dispatch.eager_on_cpu(x):
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), epsilon)
    return _RMSNorm.apply(x, weight, epsilon)


def rms_norm_forward(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The result, and the inverse of each root mean square (…, 1), which the backward pass needs."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
    return (x * inverse).mul_(weight), inverse


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight."""
    # LayerNorm's gradient at a mean of zero is RMSNorm's minus the mean of grad · weight, which is added back.
    grad_x, grad_weight, _ = torch.ops.aten.native_layer_norm_backward(
        grad, x, weight.shape, torch.zeros_like(inverse), inverse, weight, None, [True, True, False]
    )
    subtracted = (grad @ weight).unsqueeze(-1).mul_(inverse).div_(x.shape[-1])
    return grad_x.add_(subtracted), grad_weight


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        out, inverse = rms_norm_forward(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *rms_norm_backward(grad, *ctx.saved_tensors), None
