"""The gated feed-forward as one operation, for the CPU: a few rows at a time, so that they stay in the caches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from lm.kernels import paths, reference
from lm.kernels.products import times

ROWS = 1024


def swiglu(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """``(silu(x @ gate.T) * (x @ up.T)) @ down.T`` (Shazeer 2020): x (…, D), gate and up (F, D), down (D, F)."""
    if not paths.eager_on_cpu(x):
        return reference.swiglu(x, gate, up, down)
    out: Tensor = _SwiGLU.apply(x, gate, up, down)
    return out


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        gates, ups, outs = [], [], []
        for rows in x.flatten(0, -2).split(ROWS):
            gates.append(times(rows, gate.T))
            ups.append(times(rows, up.T))
            outs.append(times(F.silu(gates[-1]).mul_(ups[-1]), down.T))
        ctx.save_for_backward(x, gate, up, down, *gates, *ups)
        return (outs[0] if len(outs) == 1 else torch.cat(outs)).view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, gate, up, down, *products = ctx.saved_tensors
        half = len(products) // 2
        grad_gate, grad_up, grad_down = (torch.zeros_like(weight) for weight in (gate, up, down))
        grad_x = []
        parts = (tensor.flatten(0, -2).split(ROWS) for tensor in (grad, x))
        for by_out, rows, gated, raised in zip(*parts, products[:half], products[half:], strict=True):
            by_inner, activated = times(by_out, down), F.silu(gated)
            grad_down.addmm_(by_out.T, activated * raised)
            by_up = activated.mul_(by_inner)
            by_gate = torch.ops.aten.silu_backward(by_inner.mul_(raised), gated)
            grad_gate.addmm_(by_gate.T, rows)
            grad_up.addmm_(by_up.T, rows)
            grad_x.append(times(by_gate, gate, plus=times(by_up, up)))
        by_x = grad_x[0] if len(grad_x) == 1 else torch.cat(grad_x)
        return by_x.view(x.shape), grad_gate, grad_up, grad_down
