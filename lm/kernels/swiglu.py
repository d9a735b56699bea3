"""The gated feed-forward, on a CPU as one operation that keeps few of its intermediate results, or all small ones."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.kernels import dispatch, reference
from lm.kernels.matmul import matmul, weight_gradient

# Up to so many numbers in each intermediate result, computing two of them again takes longer than keeping them.
KEPT = 1 << 19


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``(silu(x @ gate.T) * (x @ up.T)) @ down.T`` (Shazeer 2020): x (…, D), gate, up (F, D), down (D, F)."""
    if not dispatch.eager_on_cpu(x):
        return reference.swiglu(x, gate, up, down)
    return _SwiGLU.apply(*dispatch.factors(x, gate, up, down))


def swiglu_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The result, and the intermediate ones (…, F) to keep for the backward pass: two, or if they are small, four."""
    gate_out, up_out = matmul(x, gate.T), matmul(x, up.T)
    activated = F.silu(gate_out)
    if gate_out.numel() <= KEPT:
        inner = activated * up_out
        return matmul(inner, down.T), (gate_out, up_out, activated, inner)
    return matmul(activated.mul_(up_out), down.T), (gate_out, up_out)


def swiglu_backward(
    grad: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, gate_out: Tensor, up_out: Tensor, *kept: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, gate, up and down."""
    grad_inner = matmul(grad, down)
    activated = kept[0] if kept else F.silu(gate_out)
    grad_down = weight_gradient(grad, kept[1] if kept else activated * up_out)
    grad_up_out = activated * grad_inner if kept else activated.mul_(grad_inner)
    grad_gate_out = torch.ops.aten.silu_backward(grad_inner.mul_(up_out), gate_out)
    grad_x = matmul(grad_gate_out, gate, addend=matmul(grad_up_out, up))
    return grad_x, weight_gradient(grad_gate_out, x), weight_gradient(grad_up_out, x), grad_down


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        out, results = swiglu_forward(x, gate, up, down)
        ctx.save_for_backward(x, gate, up, down, *results)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return swiglu_backward(grad, *ctx.saved_tensors)
