"""The cross-entropy of a row of logits that is read once, not twice: it stays in registers as three parts.

With 512 threads a row of 50,304 logits is 100 for each. As one block, whose size is a power of two, it spills;
as three, of 32,768, 16,384 and 2,048, it does not. For logits of 16 bits, without a softcap.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

WARPS = 16


@triton.jit
def exponentials(raw, top):
    """The sum of the exponentials of a part, relative to the row's maximum."""
    return tl.sum(tl.exp(raw.to(tl.float32) - top), 0)


@triton.jit
def store_gradient(LOGITS, raw, n, target, top, log_total, factor, share, vocabulary):
    """Overwrite a part with its gradient."""
    grad = tl.exp((raw.to(tl.float32) - top) - log_total) * factor
    grad = tl.where(n == target, grad - 1, grad) * share
    tl.store(LOGITS + n, grad.to(LOGITS.dtype.element_ty), mask=n < vocabulary)


@triton.jit
def cross_entropy_row_once(
    LOGITS, TARGETS, SHARES, LOSSES, row_stride, z_loss, vocabulary,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """As ``lm.kernels.cross_entropy_triton.cross_entropy_row``, with gradient; parts of A, B and C logits."""
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * row_stride
    target = tl.load(TARGETS + row)
    at_a, at_b, at_c = tl.arange(0, A), A + tl.arange(0, B), A + B + tl.arange(0, C)
    a = tl.load(LOGITS + at_a, mask=at_a < vocabulary, other=float("-inf"))
    b = tl.load(LOGITS + at_b, mask=at_b < vocabulary, other=float("-inf"))
    c = tl.load(LOGITS + at_c, mask=at_c < vocabulary, other=float("-inf"))
    there = tl.load(LOGITS + target, mask=target < vocabulary, other=float("nan")).to(tl.float32)
    top = tl.maximum(tl.maximum(tl.max(a, 0), tl.max(b, 0)), tl.max(c, 0)).to(tl.float32)
    log_total = tl.log(exponentials(a, top) + exponentials(b, top) + exponentials(c, top))
    lse = top + log_total
    tl.store(LOSSES + row, (top - there) + log_total + z_loss * lse * lse)
    tl.debug_barrier()  # the target's logit has been read
    share, factor = tl.load(SHARES + row), 1 + 2 * z_loss * lse
    store_gradient(LOGITS, a, at_a, target, top, log_total, factor, share, vocabulary)
    store_gradient(LOGITS, b, at_b, target, top, log_total, factor, share, vocabulary)
    store_gradient(LOGITS, c, at_c, target, top, log_total, factor, share, vocabulary)


def parts_of(vocabulary: int) -> tuple[int, int, int]:
    """Three powers of two that together are at least the vocabulary, and little more."""
    first = 1 << (vocabulary.bit_length() - 1)
    second = 1 << max(0, (vocabulary - first).bit_length() - 1)
    return first, second, triton.next_power_of_2(max(1, vocabulary - first - second))


def differentiate(
    logits: Tensor, targets: Tensor, shares: Tensor, softcap: float, z_loss: float, needs_grad: bool
) -> tuple[Tensor, Tensor, None]:
    """In place of ``lm.kernels.cross_entropy_triton.differentiate``, with gradient and without softcap."""
    if softcap or not needs_grad:
        raise ValueError("this kernel has no softcap and always computes the gradient")
    rows, vocabulary = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    a, b, c = parts_of(vocabulary)
    cross_entropy_row_once[(rows,)](
        logits, targets, shares, losses, logits.stride(0), z_loss, vocabulary, A=a, B=b, C=c, num_warps=WARPS
    )
    return losses, logits, None
