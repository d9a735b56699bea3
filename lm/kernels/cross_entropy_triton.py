"""Cross-entropy of a chunk of logits as one Triton kernel, which overwrites the logits with their gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm.kernels.attention_triton import accumulator, tanh

# Logits that a program holds at a time. The whole row of a large vocabulary would not fit in the registers.
BLOCK = 4096
WARPS = 8


@triton.jit
def squashed_block(LOGITS, n, vocabulary, softcap, SOFTCAP: tl.constexpr, ACC: tl.constexpr):
    """Load a block of one row, -inf past its end, and compute the slope of the softcap."""
    logits = tl.load(LOGITS + n, mask=n < vocabulary, other=float("-inf")).to(ACC)
    if SOFTCAP:
        flat = tanh(logits / softcap)
        slope = 1 - flat * flat
        logits = tl.where(n < vocabulary, flat * softcap, float("-inf"))
    else:
        slope = 1.0
    return logits, slope


@triton.jit
def cross_entropy_row(
    LOGITS, TARGETS, SHARES, LOSSES, row_stride, softcap, z_loss, vocabulary,
    SIZE: tl.constexpr, SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One row: LOSSES (n,) is written; with GRADIENT, the row of LOGITS (n, V) becomes share × d loss / d logits."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * row_stride
    target = tl.load(TARGETS + row)
    top = tl.sum(tl.zeros([SIZE], ACC), 0) - float("inf")
    total = tl.sum(tl.zeros([SIZE], ACC), 0)
    for start in range(0, vocabulary, SIZE):
        logits, _ = squashed_block(LOGITS, start + tl.arange(0, SIZE), vocabulary, softcap, SOFTCAP, ACC)
        new_top = tl.maximum(top, tl.max(logits, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(logits - new_top), 0)
        top = new_top
    # Kept separate: in their sum a large maximum would swallow the digits of the logarithm.
    log_total = tl.log(total)
    lse = top + log_total
    # A target outside the vocabulary reads nothing and makes the loss NaN, which is hard to overlook.
    there = tl.load(LOGITS + target, mask=target < vocabulary, other=float("nan")).to(ACC)
    if SOFTCAP:
        there = tanh(there / softcap) * softcap
    tl.store(LOSSES + row, (top - there) + log_total + z_loss * lse * lse)
    if GRADIENT:
        # The target's logit has been read above, before it is overwritten: each row has only one program.
        tl.debug_barrier()
        share = tl.load(SHARES + row)
        for start in range(0, vocabulary, SIZE):
            n = start + tl.arange(0, SIZE)
            logits, slope = squashed_block(LOGITS, n, vocabulary, softcap, SOFTCAP, ACC)
            grad = tl.exp((logits - top) - log_total) * (1 + 2 * z_loss * lse)
            grad = tl.where(n == target, grad - 1, grad) * slope * share
            tl.store(LOGITS + n, grad.to(LOGITS.dtype.element_ty), mask=n < vocabulary)


def differentiate(
    logits: Tensor, targets: Tensor, shares: Tensor, softcap: float, z_loss: float, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses (n,) of logits (n, V), in the accumulating dtype, the overwritten logits, and None.

    With ``needs_grad`` the logits become their gradient times ``shares`` (n,), without another factor per row.
    """
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=accumulator(logits.dtype), device=logits.device)
    cross_entropy_row[(rows,)](
        logits, targets, shares, losses, logits.stride(0), softcap, z_loss, vocabulary,
        SIZE=min(BLOCK, triton.next_power_of_2(vocabulary)), SOFTCAP=softcap > 0, GRADIENT=needs_grad,
        ACC=tl.float64 if logits.dtype == torch.float64 else tl.float32, num_warps=WARPS,
    )  # fmt: skip
    return losses, logits, None
