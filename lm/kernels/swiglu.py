"""The gated feed-forward: on a CPU one operation, which keeps two of its four inner results."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.kernels import dispatch, reference
from lm.kernels.matmul import times, transposed_times


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``(silu(x @ gate.T) * (x @ up.T)) @ down.T`` (Shazeer 2020): x (…, D), gate and up (F, D), down (D, F)."""
    if not dispatch.eager_on_cpu(x):
        return reference.swiglu(x, gate, up, down)
    out: Tensor = _SwiGLU.apply(x, gate, up, down)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gated, raised = times(x, gate.T), times(x, up.T)
        ctx.save_for_backward(x, gate, up, down, gated, raised)
        return times(F.silu(gated).mul_(raised), down.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, gate, up, down, gated, raised = ctx.saved_tensors
        by_inner, activated = times(grad, down), F.silu(gated)
        by_down = transposed_times(grad, activated * raised)
        by_raised = activated.mul_(by_inner)
        by_gated = torch.ops.aten.silu_backward(by_inner.mul_(raised), gated)
        by_x = times(by_gated, gate, plus=times(by_raised, up))
        return by_x, transposed_times(by_gated, x), transposed_times(by_raised, x), by_down
