"""Attention over key intervals as fused Triton kernels, forward and backward, visiting visible tiles only.

The softmax is computed online, one tile of keys after another (Dao et al. 2022, FlashAttention; Dao 2023). For a block
of queries a tile is empty, full or partial, as the block's ``lo`` and ``hi`` show: empty tiles are skipped, and full
ones need no mask. The backward pass recomputes the scores and has one kernel for the queries and one for the keys and
values, so that no sum depends on the order in which programs run.

Scores are in units of log2, because the hardware computes ``exp2``. Offsets to rows, heads and tokens have 64 bits;
offsets within a tile have 32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm.kernels import tile_sizes

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
TOKENS_AT_ONCE = 1024  # queries that one step of attention_query_ranges reads


@triton.jit
def tile(base, start, stride, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, end, CHECK: tl.constexpr):
    """Load rows [start, start + ROWS) of a matrix (tokens, WIDTH); zeros past ``end`` (if CHECK) and past WIDTH."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    pointers = base + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    if CHECK and COLUMNS != WIDTH:
        return tl.load(pointers, mask=(start + rows < end)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    if CHECK:
        return tl.load(pointers, mask=(start + rows < end)[:, None], other=0.0)
    if COLUMNS != WIDTH:
        return tl.load(pointers, mask=(columns < WIDTH)[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def store_tile(base, start, stride, values, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, end):
    """Store a tile that ``tile`` would load."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    pointers = base + start.to(tl.int64) * stride + rows[:, None] * stride + columns[None, :]
    inside = (start + rows < end)[:, None] & (columns < WIDTH)[None, :]
    tl.store(pointers, values.to(base.dtype.element_ty), mask=inside)


@triton.jit
def tiles(first, end, full_first, full_end, BLOCK: tl.constexpr):
    """The number of tiles in [first, end), and the indices [left, right) of those within [full_first, full_end).

    The kernels compute these full tiles first, without a mask, and then the others.
    """
    count = tl.cdiv(tl.maximum(end - first, 0), BLOCK)
    left = tl.minimum(tl.cdiv(tl.maximum(full_first - first, 0), BLOCK), count)
    right = tl.minimum(tl.maximum(tl.maximum(full_end - first, 0) // BLOCK, left), count)
    return count, left, right


@triton.jit
def query_block(LO, HI, queries, keys, heads, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """This program's row, head and queries ``m`` from ``start``, their bounds, and the ``tiles`` of keys they see."""
    blocks = tl.cdiv(queries, BLOCK_M)
    # The last blocks of a causal row have the most work, so they start first.
    start = (blocks - 1 - tl.program_id(0) % blocks) * BLOCK_M
    head = tl.program_id(0) // blocks % heads
    row = (tl.program_id(0) // blocks // heads).to(tl.int64)
    m = start + tl.arange(0, BLOCK_M)
    inside = m < queries
    lo = tl.maximum(tl.load(LO + row * queries + m, mask=inside, other=0), 0)
    hi = tl.minimum(tl.load(HI + row * queries + m, mask=inside, other=0), keys)
    seeing = lo < hi
    first, end = tl.min(tl.where(seeing, lo, keys), 0), tl.max(tl.where(seeing, hi, 0), 0)
    full_first = tl.max(tl.where(inside, tl.where(seeing, lo, keys), 0), 0)
    full_end = tl.min(tl.where(inside, tl.where(seeing, hi, 0), keys), 0)
    count, left, right = tiles(first, end, full_first, full_end, BLOCK_N)
    return row, head, start, m, lo, hi, first, count, left, right


@triton.jit
def tanh(x):
    return 2 * tl.sigmoid(2 * x) - 1


@triton.jit
def probabilities(products, lse, scale, softcap, SOFTCAP: tl.constexpr):
    """Softmax of the scaled products, given its log-sum-exp (in log2), and the slope of the softcap."""
    if SOFTCAP:
        squashed = tanh(products * (scale / softcap))
        p = tl.exp2(squashed * (softcap * LOG2E) - lse)
        slope = 1 - squashed * squashed
    else:
        p = tl.exp2(products * (scale * LOG2E) - lse)
        slope = 1.0
    return p, slope


@triton.jit
def attend_tile(
    out, total, top, q, K, V, k_token, v_token, start, lo, hi, keys, scale, softcap,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the running output, sum and maximum of a block of queries."""
    k = tile(K, start, k_token, WIDTH, BLOCK_N, BLOCK_D, keys, MASKED)
    scores = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION)
    if SOFTCAP:
        scores = tanh(scores * (scale / softcap))
        unit = softcap * LOG2E
    else:
        unit = scale * LOG2E
    if MASKED:
        n = start + tl.arange(0, BLOCK_N)
        scores = tl.where((lo[:, None] <= n[None, :]) & (n[None, :] < hi[:, None]), scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * unit)
    # The maximum of a query that has seen nothing yet is -inf: subtract 0 instead, so that exp2 gives 0, not NaN.
    offset = tl.where(new_top == float("-inf"), 0.0, new_top) if MASKED else new_top
    p = tl.exp2(scores * unit - offset[:, None])
    shrink = tl.exp2(top - offset)
    v = tile(V, start, v_token, WIDTH, BLOCK_N, BLOCK_D, keys, MASKED)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], out_dtype=ACC, input_precision=PRECISION)
    return out, total * shrink + tl.sum(p, 1), new_top


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_forward(
    Q, K, V, LO, HI, OUT, LSE, q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    scale, softcap, queries, keys, heads, group,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: OUT (B, Tq, H, D), LSE (B, H, Tq)."""
    row, head, start, m, lo, hi, first, count, left, right = query_block(LO, HI, queries, keys, heads, BLOCK_M, BLOCK_N)
    q = tile(Q + row * q_row + head.to(tl.int64) * q_head, start, q_token, WIDTH, BLOCK_M, BLOCK_D, queries, True)
    K += row * k_row + (head // group).to(tl.int64) * k_head
    V += row * v_row + (head // group).to(tl.int64) * v_head
    out = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    for MASKED in tl.static_range(2):
        for i in range(0 if MASKED else left, count - (right - left) if MASKED else right):
            number = tl.where(i < left, i, i + (right - left)) if MASKED else i
            out, total, top = attend_tile(
                out, total, top, q, K, V, k_token, v_token, first + number * BLOCK_N, lo, hi, keys, scale, softcap,
                WIDTH, BLOCK_D, BLOCK_N, SOFTCAP, MASKED, ACC, PRECISION,
            )  # fmt: skip
    blind = total == 0
    out = out / tl.where(blind, 1.0, total)[:, None]
    lse = tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1.0, total))) * LN2)
    flat = (row * queries * heads + head) * WIDTH
    store_tile(OUT + flat, start, heads * WIDTH, out, WIDTH, BLOCK_M, BLOCK_D, queries)
    tl.store(LSE + (row * heads + head) * queries + m, lse, mask=m < queries)


@triton.jit
def query_gradient_tile(
    grad_q, q, grad_out, lse, delta, K, V, k_token, v_token, start, lo, hi, keys, scale, softcap,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of keys to the gradient of a block of queries."""
    k = tile(K, start, k_token, WIDTH, BLOCK_N, BLOCK_D, keys, MASKED)
    v = tile(V, start, v_token, WIDTH, BLOCK_N, BLOCK_D, keys, MASKED)
    products = tl.dot(q, tl.trans(k), out_dtype=ACC, input_precision=PRECISION)
    p, slope = probabilities(products, lse[:, None], scale, softcap, SOFTCAP)
    grad_p = tl.dot(grad_out, tl.trans(v), out_dtype=ACC, input_precision=PRECISION)
    grad_scores = p * (grad_p - delta[:, None]) * slope
    if MASKED:
        n = start + tl.arange(0, BLOCK_N)
        visible = (lo[:, None] <= n[None, :]) & (n[None, :] < hi[:, None])
        grad_scores = tl.where(visible, grad_scores, 0.0)
    return tl.dot(grad_scores.to(k.dtype), k, grad_q, out_dtype=ACC, input_precision=PRECISION)


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_query_gradient(
    Q, K, V, LO, HI, OUT, LSE, GRAD_OUT, DELTA, GRAD_Q,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    scale, softcap, queries, keys, heads, group,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: GRAD_Q (B, Tq, H, D), and DELTA (B, H, Tq), the sums of out × its gradient."""
    row, head, start, m, lo, hi, first, count, left, right = query_block(LO, HI, queries, keys, heads, BLOCK_M, BLOCK_N)
    flat, line = (row * queries * heads + head) * WIDTH, heads * WIDTH
    grad_out = tile(GRAD_OUT + flat, start, line, WIDTH, BLOCK_M, BLOCK_D, queries, True)
    out = tile(OUT + flat, start, line, WIDTH, BLOCK_M, BLOCK_D, queries, True)
    delta = tl.sum(out.to(ACC) * grad_out.to(ACC), 1)
    each = (row * heads + head) * queries + m
    tl.store(DELTA + each, delta, mask=m < queries)
    lse = tl.load(LSE + each, mask=m < queries, other=0.0) * LOG2E
    q = tile(Q + row * q_row + head.to(tl.int64) * q_head, start, q_token, WIDTH, BLOCK_M, BLOCK_D, queries, True)
    K += row * k_row + (head // group).to(tl.int64) * k_head
    V += row * v_row + (head // group).to(tl.int64) * v_head
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for MASKED in tl.static_range(2):
        for i in range(0 if MASKED else left, count - (right - left) if MASKED else right):
            number = tl.where(i < left, i, i + (right - left)) if MASKED else i
            grad_q = query_gradient_tile(
                grad_q, q, grad_out, lse, delta, K, V, k_token, v_token, first + number * BLOCK_N, lo, hi, keys,
                scale, softcap, WIDTH, BLOCK_D, BLOCK_N, SOFTCAP, MASKED, ACC, PRECISION,
            )  # fmt: skip
    store_tile(GRAD_Q + flat, start, line, grad_q * scale, WIDTH, BLOCK_M, BLOCK_D, queries)


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_query_ranges(LO, HI, RANGES, queries, keys, BLOCK_N: tl.constexpr, TOKENS: tl.constexpr):
    """For one block of keys of one row: RANGES[0:2] is the range of queries that see any of it, RANGES[2:4] all of it.

    The queries that see a key are contiguous if neither bound decreases along the row. For other intervals the first
    range still covers all queries that see any key of the block, and the second is empty.
    """
    blocks = tl.cdiv(keys, BLOCK_N)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    key = tl.program_id(0) % blocks * BLOCK_N
    key_end = tl.minimum(key + BLOCK_N, keys)
    first, end, full_first, full_end, full_count = queries, 0, queries, 0, 0
    for start in range(0, queries, TOKENS):
        m = start + tl.arange(0, TOKENS)
        lo = tl.maximum(tl.load(LO + row * queries + m, mask=m < queries, other=0), 0)
        hi = tl.minimum(tl.load(HI + row * queries + m, mask=m < queries, other=0), keys)
        some = (lo < hi) & (lo < key_end) & (hi > key)
        full = (lo <= key) & (hi >= key_end)
        first = tl.minimum(first, tl.min(tl.where(some, m, queries), 0))
        end = tl.maximum(end, tl.max(tl.where(some, m + 1, 0), 0))
        full_first = tl.minimum(full_first, tl.min(tl.where(full, m, queries), 0))
        full_end = tl.maximum(full_end, tl.max(tl.where(full, m + 1, 0), 0))
        full_count += tl.sum(full.to(tl.int32), 0)
    contiguous = full_count == full_end - full_first
    RANGES += (row * blocks + tl.program_id(0) % blocks) * 4
    tl.store(RANGES, first)
    tl.store(RANGES + 1, end)
    tl.store(RANGES + 2, tl.where(contiguous, full_first, end))
    tl.store(RANGES + 3, tl.where(contiguous, full_end, end))


@triton.jit
def key_gradient_tile(
    grad_k, grad_v, k, v, Q, GRAD_OUT, LSE, DELTA, LO, HI, q_token, line, start, n, queries, keys, scale, softcap,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add one tile of queries to the gradients of a block of keys and values. Scores here are (keys, queries)."""
    m = start + tl.arange(0, BLOCK_M)
    q = tile(Q, start, q_token, WIDTH, BLOCK_M, BLOCK_D, queries, MASKED)
    grad_out = tile(GRAD_OUT, start, line, WIDTH, BLOCK_M, BLOCK_D, queries, MASKED)
    if MASKED:
        lse = tl.load(LSE + m, mask=m < queries, other=0.0) * LOG2E
        delta = tl.load(DELTA + m, mask=m < queries, other=0.0)
    else:
        lse = tl.load(LSE + m) * LOG2E
        delta = tl.load(DELTA + m)
    products = tl.dot(k, tl.trans(q), out_dtype=ACC, input_precision=PRECISION)
    p, slope = probabilities(products, lse[None, :], scale, softcap, SOFTCAP)
    if MASKED:
        lo = tl.maximum(tl.load(LO + m, mask=m < queries, other=0), 0)
        hi = tl.minimum(tl.load(HI + m, mask=m < queries, other=0), keys)
        # After exp2, because the log-sum-exp of a query that sees nothing is -inf.
        p = tl.where((lo[None, :] <= n[:, None]) & (n[:, None] < hi[None, :]), p, 0.0)
    grad_v = tl.dot(p.to(grad_out.dtype), grad_out, grad_v, out_dtype=ACC, input_precision=PRECISION)
    grad_p = tl.dot(v, tl.trans(grad_out), out_dtype=ACC, input_precision=PRECISION)
    grad_scores = p * (grad_p - delta[None, :]) * slope
    grad_k = tl.dot(grad_scores.to(q.dtype), q, grad_k, out_dtype=ACC, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit(do_not_specialize=["queries", "keys"])
def attention_key_gradient(
    Q, K, V, LO, HI, LSE, GRAD_OUT, DELTA, RANGES, GRAD_K, GRAD_V,
    q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    scale, softcap, queries, keys, heads, group,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key-value head, over all query heads of its group: GRAD_K, GRAD_V (B, Tk, Hkv, D)."""
    blocks, kv_heads = tl.cdiv(keys, BLOCK_N), heads // group
    block = tl.program_id(0) % blocks
    kv_head = tl.program_id(0) // blocks % kv_heads
    row = (tl.program_id(0) // blocks // kv_heads).to(tl.int64)
    start = block * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    RANGES += (row * blocks + block) * 4
    first, end = tl.load(RANGES), tl.load(RANGES + 1)
    count, left, right = tiles(first, end, tl.load(RANGES + 2), tl.load(RANGES + 3), BLOCK_M)

    k = tile(K + row * k_row + kv_head.to(tl.int64) * k_head, start, k_token, WIDTH, BLOCK_N, BLOCK_D, keys, True)
    v = tile(V + row * v_row + kv_head.to(tl.int64) * v_head, start, v_token, WIDTH, BLOCK_N, BLOCK_D, keys, True)
    LO += row * queries
    HI += row * queries
    line = heads * WIDTH
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    grad_v = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    for member in range(group):
        head = (kv_head * group + member).to(tl.int64)
        Q_HEAD = Q + row * q_row + head * q_head
        GRAD_HEAD = GRAD_OUT + (row * queries * heads + head) * WIDTH
        LSE_HEAD, DELTA_HEAD = LSE + (row * heads + head) * queries, DELTA + (row * heads + head) * queries
        for MASKED in tl.static_range(2):
            for i in range(0 if MASKED else left, count - (right - left) if MASKED else right):
                number = tl.where(i < left, i, i + (right - left)) if MASKED else i
                grad_k, grad_v = key_gradient_tile(
                    grad_k, grad_v, k, v, Q_HEAD, GRAD_HEAD, LSE_HEAD, DELTA_HEAD, LO, HI, q_token, line,
                    first + number * BLOCK_M, n, queries, keys, scale, softcap,
                    WIDTH, BLOCK_D, BLOCK_M, SOFTCAP, MASKED, ACC, PRECISION,
                )  # fmt: skip
    flat, kv_line = (row * keys * kv_heads + kv_head) * WIDTH, kv_heads * WIDTH
    store_tile(GRAD_K + flat, start, kv_line, grad_k * scale, WIDTH, BLOCK_N, BLOCK_D, keys)
    store_tile(GRAD_V + flat, start, kv_line, grad_v, WIDTH, BLOCK_N, BLOCK_D, keys)


def forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Output (B, Tq, H, D) and natural log-sum-exp (B, H, Tq); arguments as in ``lm.kernels.attention``."""
    rows, queries, heads, width = q.shape
    q, k, v = (row_major(x) for x in (q, k, v))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, queries, dtype=accumulator(q.dtype), device=q.device)
    chosen = tile_sizes.choose("attention_forward", q.dtype, width)
    grid = (rows * heads * triton.cdiv(queries, chosen.block_m),)
    if grid[0]:
        attention_forward[grid](
            q, k, v, lo.contiguous(), hi.contiguous(), out, lse, *strides(q, k, v), scale, softcap,
            queries, k.shape[1], heads, heads // k.shape[2], **constants(q, softcap), **chosen.arguments(),
        )  # fmt: skip
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lo: Tensor, hi: Tensor,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, from the arguments and results of ``forward``. Deterministic, bit for bit."""
    rows, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    q, k, v = (row_major(x) for x in (q, k, v))
    grad_out, lo, hi = grad_out.contiguous(), lo.contiguous(), hi.contiguous()
    grad_q, grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    if not grad_q.numel() or not grad_k.numel():
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_()
    delta = torch.empty_like(lse)
    sizes = (scale, softcap, queries, keys, heads, heads // kv_heads)

    chosen = tile_sizes.choose("attention_query_gradient", q.dtype, width)
    attention_query_gradient[(rows * heads * triton.cdiv(queries, chosen.block_m),)](
        q, k, v, lo, hi, out, lse, grad_out, delta, grad_q, *strides(q, k, v), *sizes,
        **constants(q, softcap), **chosen.arguments(),
    )  # fmt: skip

    chosen = tile_sizes.choose("attention_key_gradient", q.dtype, width)
    blocks = triton.cdiv(keys, chosen.block_n)
    ranges = torch.empty(rows, blocks, 4, dtype=torch.int32, device=q.device)
    attention_query_ranges[(rows * blocks,)](
        lo, hi, ranges, queries, keys, BLOCK_N=chosen.block_n, TOKENS=TOKENS_AT_ONCE
    )
    attention_key_gradient[(rows * kv_heads * blocks,)](
        q, k, v, lo, hi, lse, grad_out, delta, ranges, grad_k, grad_v, *strides(q, k, v), *sizes,
        **constants(q, softcap), **chosen.arguments(),
    )  # fmt: skip
    return grad_q, grad_k, grad_v


def row_major(x: Tensor) -> Tensor:
    """``x`` with its last dimension contiguous, as the kernels require."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides(*tensors: Tensor) -> tuple[int, ...]:
    """Row, token and head strides of each (B, T, H, D)."""
    return tuple(stride for x in tensors for stride in x.stride()[:3])


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def constants(q: Tensor, softcap: float) -> dict[str, object]:
    """The compile-time constants of the kernels for inputs like q (B, T, H, D)."""
    width = q.shape[-1]
    return {
        "WIDTH": width,
        "BLOCK_D": tile_sizes.padded_width(width),
        "SOFTCAP": softcap > 0,
        "ACC": tl.float64 if q.dtype == torch.float64 else tl.float32,
        # Triton's default computes float32 in tf32; here PyTorch's setting decides.
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
    }
