"""Matrix products on the CPU, by whichever of PyTorch's two libraries is the faster one for them."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.kernels import dispatch


@functools.cache
def has_onednn() -> bool:
    """Whether oneDNN's products can be called directly; without them everything goes through ``torch.mm``."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def times(a: Tensor, b: Tensor, plus: Tensor | None = None) -> Tensor:
    """``a @ b`` for a (…, K) and b (K, M), with ``plus`` (…, M), which may be overwritten, added to it.

    In float32 by oneDNN, which on an AMD CPU takes 80 to 95 % of the time of MKL, the library behind ``torch.mm``.
    """
    if a.device.type == "cpu" and a.dtype == torch.float32 and has_onednn() and dispatch.has_memory(a):
        if plus is None:
            return torch.ops.mkldnn._linear_pointwise(a, b.T, None, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(a, plus, b.T, None, "add")
    product = a @ b
    return product if plus is None else plus.add_(product)


def transposed_times(a: Tensor, b: Tensor) -> Tensor:
    """The gradient (M, K) of a weight: the sum over all rows of the products of a (…, M) and b (…, K).

    The narrower factor is turned round in memory first: then oneDNN takes half of the time that it, or ``torch.mm``,
    takes for the product as it stands.
    """
    a, b = a.flatten(0, -2), b.flatten(0, -2)
    if a.shape[1] <= b.shape[1]:
        return times(a.T.contiguous(), b)
    return times(b.T.contiguous(), a).T.contiguous()


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T``: x (…, K), weight (M, K), result (…, M)."""
    if not dispatch.eager_on_cpu(x):
        return torch.nn.functional.linear(x, weight)
    out: Tensor = _Linear.apply(x, weight)
    return out


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return times(x, weight.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return times(grad, weight), transposed_times(grad, x)
