"""The kernels of ``lm.kernels.decoding_step``."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm.kernels import dispatch
from lm.kernels.attention_triton import accumulator

ROWS_AT_ONCE = 16  # the least that tensor cores take; always as many, so that a row's bits do not depend on the others
WIDE = 16384  # outputs, as of a head, that give every core work with wide blocks
HEADS_AT_ONCE, STORING_WARPS = 8, 2


@triton.jit(do_not_specialize=["rows"])
def few_rows_product(
    X, NORM, W, OUT, x_row, rows, inputs, outputs, epsilon,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORMED: tl.constexpr,
    ACTIVATION: tl.constexpr, ADDED: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCK_M rows by BLOCK_N outputs: OUT (rows, outputs), from X (rows, inputs) and W (outputs, inputs), or two."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x = X + row[:, None] * x_row + k[None, :]
    w = W + column[:, None] * inputs + k[None, :]
    w_up = W + (column + outputs)[:, None] * inputs + k[None, :]
    out = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    up = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    squares = tl.zeros([BLOCK_M], ACC)
    for start in range(0, inputs, BLOCK_K):
        there = (start + k < inputs)[None, :]
        a = tl.load(x + start, mask=(row < rows)[:, None] & there, other=0.0)
        if NORMED:
            # The norm is a factor of the whole row, applied to the sums; only its weight must be in the product.
            wide = a.to(ACC)
            squares += tl.sum(wide * wide, 1)
            a = wide * tl.load(NORM + start + k, mask=start + k < inputs, other=0.0).to(ACC)[None, :]
        a = a.to(W.dtype.element_ty)
        b = tl.load(w + start, mask=(column < outputs)[:, None] & there, other=0.0)
        out = tl.dot(a, tl.trans(b), out, out_dtype=ACC, input_precision=PRECISION)
        if ACTIVATION == "swiglu":
            b = tl.load(w_up + start, mask=(column < outputs)[:, None] & there, other=0.0)
            up = tl.dot(a, tl.trans(b), up, out_dtype=ACC, input_precision=PRECISION)
    if NORMED:
        inverse = tl.rsqrt(squares / inputs + epsilon)[:, None]
        out *= inverse
        up *= inverse
    if ACTIVATION == "swiglu":
        out = out / (1 + tl.exp(-out)) * up
    if ACTIVATION == "relu2":
        out = tl.maximum(out, 0.0) * tl.maximum(out, 0.0)
    inside = (row < rows)[:, None] & (column < outputs)[None, :]
    pointers = OUT + row[:, None] * outputs + column[None, :]
    if ADDED:
        out += tl.load(pointers, mask=inside, other=0.0).to(ACC)
    tl.store(pointers, out.to(OUT.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_store_heads(
    QKV, COS, SIN, POSITION, HI, QUERY_NORM, KEY_NORM, Q, CACHE, kind_stride, row_stride, head_stride,
    heads, kv_heads, capacity, epsilon,
    HALF: tl.constexpr, COLUMNS: tl.constexpr, LINES: tl.constexpr, NORM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """LINES of the queries, keys and values of one row: Q (rows, heads, 2 HALF), and the row's slot of CACHE."""
    row = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1) * LINES + tl.arange(0, LINES)
    is_query, is_value = (line < heads)[:, None], (line >= heads + kv_heads)[:, None]
    d = tl.arange(0, COLUMNS)
    inside = (line < heads + 2 * kv_heads)[:, None] & (d < HALF)[None, :]
    source = QKV + (row * (heads + 2 * kv_heads) + line)[:, None] * (2 * HALF) + d[None, :]
    a = tl.load(source, mask=inside, other=0.0).to(ACC)
    b = tl.load(source + HALF, mask=inside, other=0.0).to(ACC)
    if NORM:
        inverse = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + epsilon)[:, None]
        for_query, for_key = inside & is_query, inside & (is_query == 0) & (is_value == 0)
        none = tl.zeros([LINES, COLUMNS], tl.int32)
        of_a = tl.load(QUERY_NORM + d[None, :] + none, mask=for_query, other=0.0).to(ACC)
        of_a += tl.load(KEY_NORM + d[None, :] + none, mask=for_key, other=0.0).to(ACC)
        of_b = tl.load(QUERY_NORM + HALF + d[None, :] + none, mask=for_query, other=0.0).to(ACC)
        of_b += tl.load(KEY_NORM + HALF + d[None, :] + none, mask=for_key, other=0.0).to(ACC)
        a = tl.where(is_value, a, a * (inverse * of_a))
        b = tl.where(is_value, b, b * (inverse * of_b))
    cos = tl.load(COS + row * HALF + d, mask=d < HALF, other=0.0)[None, :]
    sin = tl.load(SIN + row * HALF + d, mask=d < HALF, other=0.0)[None, :]
    first, second = a * cos - b * sin, b * cos + a * sin
    query = Q + (row * heads + line)[:, None] * (2 * HALF) + d[None, :]
    tl.store(query, first.to(Q.dtype.element_ty), mask=inside & is_query)
    tl.store(query + HALF, second.to(Q.dtype.element_ty), mask=inside & is_query)
    kind = (line >= heads + kv_heads).to(tl.int64)
    slot = tl.load(POSITION + row).to(tl.int64) % capacity
    head = line - heads - kind * kv_heads
    place = CACHE + row * row_stride + slot * (2 * HALF)
    place += (kind * kind_stride + head * head_stride)[:, None] + d[None, :]
    stored = inside & (is_query == 0) & (tl.load(HI + row) != 0)
    tl.store(place, tl.where(is_value, a, first).to(CACHE.dtype.element_ty), mask=stored)
    tl.store(place + HALF, tl.where(is_value, b, second).to(CACHE.dtype.element_ty), mask=stored)


def product(
    x: Tensor, weight: Tensor, norm: Tensor | None, epsilon: float, activation: str, residual: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Arguments and result as of ``lm.kernels.few_rows_product``."""
    rows, inputs = x.shape
    outputs = len(weight) // 2 if activation == "swiglu" else len(weight)
    out = torch.empty(rows, outputs, dtype=dtype, device=x.device) if residual is None else residual
    block_n, block_k, stages = blocks(outputs, weight.dtype)
    few_rows_product[(triton.cdiv(rows, ROWS_AT_ONCE), triton.cdiv(outputs, block_n))](
        x, weight if norm is None else norm, weight, out, x.stride(0), rows, inputs, outputs, epsilon,
        BLOCK_M=ROWS_AT_ONCE, BLOCK_N=block_n, BLOCK_K=block_k, NORMED=norm is not None, ACTIVATION=activation,
        ADDED=residual is not None, ACC=tl.float64 if weight.dtype == torch.float64 else tl.float32,
        PRECISION="ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        num_warps=4, num_stages=stages,
    )  # fmt: skip
    return out


def blocks(outputs: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Outputs and inputs of a block, and stages of its pipeline: many small blocks, so that every core has one."""
    if dispatch.interpreted():
        return 32, 32, 1
    return 64 if outputs >= WIDE else 16, 256 // dtype.itemsize, 3 if outputs >= WIDE else 4


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, hi: Tensor, cache: Tensor,
    norms: tuple[Tensor, Tensor] | None, epsilon: float,
) -> Tensor:  # fmt: skip
    """Arguments and result as of ``lm.kernels.rotate_and_store``."""
    rows, lines, width = qkv.shape
    kv_heads, capacity = cache.shape[2:4]
    heads = lines - 2 * kv_heads
    q = torch.empty(rows, heads, width, dtype=qkv.dtype, device=qkv.device)
    query_norm, key_norm = norms or (qkv, qkv)
    rotate_and_store_heads[(rows, triton.cdiv(lines, HEADS_AT_ONCE))](
        qkv, cos, sin, positions, hi, query_norm, key_norm, q, cache, *cache.stride()[:3],
        heads, kv_heads, capacity, epsilon, HALF=width // 2, COLUMNS=triton.next_power_of_2(width // 2),
        LINES=HEADS_AT_ONCE, NORM=norms is not None,
        ACC=tl.float64 if accumulator(qkv.dtype) == torch.float64 else tl.float32, num_warps=STORING_WARPS,
    )  # fmt: skip
    return q
