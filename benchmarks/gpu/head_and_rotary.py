"""The fused head and loss, and QK-norm with rotary positions, compared with their formulas under torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from benchmarks.gpu.timing import milliseconds, peak_bytes
from lm.kernels import cross_entropy, linear_cross_entropy, reference, rotary


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="sum")


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, chunks: int = 8) -> Tensor:
    """The loss in chunks, whose logits are recomputed in the backward pass."""
    parts = zip(hidden.chunk(chunks), targets.chunk(chunks), strict=True)
    losses = [torch.utils.checkpoint.checkpoint(plain, h, weight, t, use_reentrant=False) for h, t in parts]
    return torch.stack(losses).sum()


def in_chunks(logits: int) -> Callable[..., Tensor]:
    """Kindling's loss with at most so many logits in a chunk."""

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with patch.object(cross_entropy, "tokens_at_once", lambda device, vocabulary: logits // vocabulary):
            return linear_cross_entropy(hidden, weight, targets, predicted=len(targets))

    return loss


def reading_once(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Kindling's loss with the candidate that reads each row of logits once."""
    from benchmarks.gpu.candidates import loss_triton
    from lm.kernels import cross_entropy_triton

    with patch.object(cross_entropy_triton, "differentiate", loss_triton.differentiate):
        return linear_cross_entropy(hidden, weight, targets, predicted=len(targets))


def heads_of_losses(device: torch.device, tokens: int = 16384, vocabulary: int = 50304) -> list[dict[str, Any]]:
    """Milliseconds and peak bytes of the loss and both gradients, in bfloat16."""
    ways: dict[str, Callable[..., Tensor]] = {
        "kindling": linear_cross_entropy,
        **{f"kindling, 2^{power} logits at a time": in_chunks(1 << power) for power in (27, 28, 29, 30)},
        "kindling, logits read once": reading_once,
        "compiled": torch.compile(plain),
        "compiled in 8 chunks": torch.compile(chunked),
    }
    if hasattr(F, "linear_cross_entropy"):
        ways["F.linear_cross_entropy"] = partial(F.linear_cross_entropy, reduction="sum")
    found = []
    for width in (768, 2048):
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device=device, requires_grad=True)
        weight = torch.randn(vocabulary, width, dtype=torch.bfloat16, device=device).mul_(width**-0.5).requires_grad_()
        targets = torch.randint(0, vocabulary, (tokens,), device=device)
        calls = {
            name: lambda way=way, h=hidden, w=weight, t=targets: torch.autograd.grad(way(h, w, t), (h, w))
            for name, way in ways.items()
        }
        times = milliseconds(calls)
        memory = {name: peak_bytes(calls[name]) for name, time in times.items() if time is not None}
        found.append(
            {"tokens": tokens, "vocabulary": vocabulary, "width": width, "milliseconds": times, "peak_bytes": memory}
        )
        print(f"  {found[-1]}", flush=True)
    return found


def rotary_speeds(device: torch.device, rows: int = 16, length: int = 1024) -> list[dict[str, Any]]:
    """Milliseconds forward and backward for heads of 64, with and without QK-norm, in bfloat16."""
    compiled = torch.compile(reference.rotary)
    found = []
    for normed in (False, True):
        x = torch.randn(rows, length, 16, 64, dtype=torch.bfloat16, device=device, requires_grad=True)
        angles = torch.randn(rows, length, 1, 32, device=device)
        weight = torch.ones(64, device=device, requires_grad=True) if normed else None
        arguments = (x, angles.cos(), angles.sin(), weight, 1e-6)
        wanted = (x,) if weight is None else (x, weight)
        forward = {"kindling": partial(rotary, *arguments), "compiled": partial(compiled, *arguments)}
        direction = torch.randn_like(x)
        backward = {
            name: partial(torch.autograd.grad, call(), wanted, direction, retain_graph=True)
            for name, call in forward.items()
        }
        found.append({"normed": normed, "forward_ms": milliseconds(forward), "backward_ms": milliseconds(backward)})
        print(f"  {found[-1]}", flush=True)
    return found
