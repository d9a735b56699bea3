"""QK-norm and rotary positions as one Triton kernel per direction: every head is read once and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm.kernels.attention_triton import accumulator, row_major

HEADS_AT_ONCE = 32
WARPS = 4


@triton.jit
def head_lines(X, row_stride, token_stride, head_stride, tokens, heads, ROWS: tl.constexpr):
    """Pointers to ROWS heads of X, as a column, and the tokens they belong to."""
    line = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    token = line // heads
    pointers = X + token // tokens * row_stride + token % tokens * token_stride + line % heads * head_stride
    return pointers[:, None], token


@triton.jit(do_not_specialize=["rows", "tokens"])
def rotary_forward(
    X, COS, SIN, WEIGHT, OUT, x_row, x_token, x_head, rows, tokens, heads, epsilon,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS heads: OUT (B, T, H, 2 HALF)."""
    x, token = head_lines(X, x_row, x_token, x_head, tokens, heads, ROWS)
    out, _ = head_lines(OUT, tokens * heads * 2 * HALF, heads * 2 * HALF, 2 * HALF, tokens, heads, ROWS)
    d = tl.arange(0, COLUMNS)
    inside = (token < rows * tokens)[:, None] & (d < HALF)[None, :]
    a = tl.load(x + d[None, :], mask=inside, other=0.0).to(ACC)
    b = tl.load(x + HALF + d[None, :], mask=inside, other=0.0).to(ACC)
    if NORM:
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + epsilon)[:, None]
        a *= inverse * tl.load(WEIGHT + d, mask=d < HALF, other=0.0).to(ACC)[None, :]
        b *= inverse * tl.load(WEIGHT + HALF + d, mask=d < HALF, other=0.0).to(ACC)[None, :]
    cos = tl.load(COS + token[:, None] * HALF + d[None, :], mask=inside, other=0.0)
    sin = tl.load(SIN + token[:, None] * HALF + d[None, :], mask=inside, other=0.0)
    tl.store(out + d[None, :], (a * cos - b * sin).to(OUT.dtype.element_ty), mask=inside)
    tl.store(out + HALF + d[None, :], (b * cos + a * sin).to(OUT.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "tokens"])
def rotary_backward(
    GRAD_OUT, X, COS, SIN, WEIGHT, GRAD_X, PARTS, x_row, x_token, x_head, rows, tokens, heads, epsilon,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """ROWS heads: GRAD_X (B, T, H, 2 HALF), and with NORM their part of the weight's gradient: PARTS (., 2 HALF)."""
    line = heads * 2 * HALF
    grad_out, token = head_lines(GRAD_OUT, tokens * line, line, 2 * HALF, tokens, heads, ROWS)
    grad_x, _ = head_lines(GRAD_X, tokens * line, line, 2 * HALF, tokens, heads, ROWS)
    d = tl.arange(0, COLUMNS)
    inside = (token < rows * tokens)[:, None] & (d < HALF)[None, :]
    cos = tl.load(COS + token[:, None] * HALF + d[None, :], mask=inside, other=0.0)
    sin = tl.load(SIN + token[:, None] * HALF + d[None, :], mask=inside, other=0.0)
    first = tl.load(grad_out + d[None, :], mask=inside, other=0.0).to(ACC)
    second = tl.load(grad_out + HALF + d[None, :], mask=inside, other=0.0).to(ACC)
    grad_a, grad_b = first * cos + second * sin, second * cos - first * sin
    if NORM:
        x, _ = head_lines(X, x_row, x_token, x_head, tokens, heads, ROWS)
        a = tl.load(x + d[None, :], mask=inside, other=0.0).to(ACC)
        b = tl.load(x + HALF + d[None, :], mask=inside, other=0.0).to(ACC)
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + epsilon)[:, None]
        a *= inverse
        b *= inverse
        part = PARTS + tl.program_id(0).to(tl.int64) * 2 * HALF + d
        tl.store(part, tl.sum(grad_a * a, 0), mask=d < HALF)
        tl.store(part + HALF, tl.sum(grad_b * b, 0), mask=d < HALF)
        grad_a *= tl.load(WEIGHT + d, mask=d < HALF, other=0.0).to(ACC)[None, :]
        grad_b *= tl.load(WEIGHT + HALF + d, mask=d < HALF, other=0.0).to(ACC)[None, :]
        along = ((tl.sum(grad_a * a, 1) + tl.sum(grad_b * b, 1)) / (2 * HALF))[:, None]
        grad_a = (grad_a - a * along) * inverse
        grad_b = (grad_b - b * along) * inverse
    tl.store(grad_x + d[None, :], grad_a.to(GRAD_X.dtype.element_ty), mask=inside)
    tl.store(grad_x + HALF + d[None, :], grad_b.to(GRAD_X.dtype.element_ty), mask=inside)


def forward(x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, epsilon: float) -> Tensor:
    """Arguments and result as in ``lm.kernels.rotary``."""
    x = row_major(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        rotary_forward[grid(x)](
            x, cos.contiguous(), sin.contiguous(), x if weight is None else weight, out, *x.stride()[:3],
            *x.shape[:3], epsilon, **constants(x, weight), num_warps=WARPS,
        )  # fmt: skip
    return out


def backward(
    grad_out: Tensor, x: Tensor, cos: Tensor, sin: Tensor, weight: Tensor | None, epsilon: float
) -> tuple[Tensor, Tensor]:
    """Gradients of x (B, T, H, D) and of the weight (D,), or (0,) without one. Deterministic, bit for bit."""
    x = row_major(x)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    width = 0 if weight is None else x.shape[3]
    parts = torch.empty(grid(x)[0], width, dtype=accumulator(x.dtype), device=x.device)
    if grad_x.numel():
        rotary_backward[grid(x)](
            grad_out.contiguous(), x, cos.contiguous(), sin.contiguous(), x if weight is None else weight, grad_x,
            parts, *x.stride()[:3], *x.shape[:3], epsilon, **constants(x, weight), num_warps=WARPS,
        )  # fmt: skip
    return grad_x, parts.sum(0).to(x.dtype if weight is None else weight.dtype)


def grid(x: Tensor) -> tuple[int]:
    return (triton.cdiv(x.shape[0] * x.shape[1] * x.shape[2], HEADS_AT_ONCE),)


def constants(x: Tensor, weight: Tensor | None) -> dict[str, object]:
    half = x.shape[3] // 2
    return {
        "HALF": half,
        "COLUMNS": triton.next_power_of_2(half),
        "ROWS": HEADS_AT_ONCE,
        "NORM": weight is not None,
        "ACC": tl.float64 if x.dtype == torch.float64 else tl.float32,
    }
