"""Matrix products; on the CPU by whichever of PyTorch's two libraries is faster."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.kernels import dispatch

BY_ONEDNN = (torch.float32, torch.bfloat16)


@functools.cache
def has_onednn() -> bool:
    """Whether oneDNN's products can be called directly; if not, all products use ``torch.mm``."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def matmul(a: Tensor, b: Tensor, addend: Tensor | None = None) -> Tensor:
    """``a @ b + addend``: a (…, K), b (K, M), addend (…, M), all of one dtype. ``addend`` may be overwritten.

    In float32 and bfloat16 on a CPU by oneDNN, which on an AMD CPU takes 80 to 95 % of the time of MKL, the library
    behind ``torch.mm``.
    """
    if a.device.type == "cpu" and a.dtype in BY_ONEDNN and has_onednn() and dispatch.has_data(a):
        if addend is None:
            return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(a, addend, b.T, None, "add")
    product = a @ b
    return product if addend is None else addend.add_(product)


def weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient (M, K) of ``linear``'s weight, from that of its output, ``grad`` (…, M), and its input ``x`` (…, K).

    The narrower factor is transposed in memory first: oneDNN then takes half the time that it, or ``torch.mm``, takes
    for strided factors.
    """
    grad, x = grad.flatten(0, -2), x.flatten(0, -2)
    if grad.shape[1] <= x.shape[1]:
        return matmul(grad.T.contiguous(), x)
    return matmul(x.T.contiguous(), grad).T.contiguous()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: x (…, K), weight (M, K), result (…, M) of x's dtype (autocast's where it is on)."""
    if not dispatch.eager_on_cpu(x):
        return torch.nn.functional.linear(x, weight)
    return _Linear.apply(*dispatch.factors(x, weight))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return matmul(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return matmul(grad, weight), weight_gradient(grad, x)
