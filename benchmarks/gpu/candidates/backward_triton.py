"""Two backward passes of attention that load their tiles by tensor descriptors (on Hopper and later, by TMA).

- ``two_pass``: a kernel for the queries and one for the keys, as the library has. A block of keys reads, for each key,
  the interval of queries that see it: two numbers that stay in registers, instead of the bounds of every query.
- ``one_pass``: a kernel for all three gradients. One program owns a row and a key head, or a strip of its keys, goes
  from block to block of keys, and adds to the gradient of the queries in its own workspace: every sum has one order.

Both are deterministic, bit for bit, without atomic additions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from benchmarks.gpu.candidates.forward_triton import LOG2E, described, masked, place, product, rows_of
from benchmarks.gpu.candidates.plan import Plan, padded_length
from lm.kernels.tile_sizes import TileSizes

STRIP = 1024  # keys of one program of the single pass, if the batch has too few rows and heads to occupy the GPU
FORMS = ("two_pass", "one_pass")


@triton.jit
def prepare(out, grad_out, LSE, LINE, DELTA, row, head, start, queries, padded, heads, BLOCK_M: tl.constexpr):
    """Each query's sum of out × its gradient, and its log-sum-exp in log2; for padding, and queries that see nothing, 0
    and inf, so that their probabilities are 0. Both are stored as (B, H, padded queries)."""
    m = start + tl.arange(0, BLOCK_M)
    each = row.to(tl.int64) * heads + head
    delta = tl.sum(out.to(tl.float32) * grad_out.to(tl.float32), 1)
    lse = tl.load(LSE + each * queries + m, mask=m < queries, other=float("-inf"))
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)
    tl.store(LINE + each * padded + m, lse)
    tl.store(DELTA + each * padded + m, delta)
    return lse, delta


@triton.jit(do_not_specialize=["queries", "padded"])
def candidate_prepare(
    OUT, GRAD_OUT, LSE, LINE, DELTA, queries, padded, heads, WIDTH: tl.constexpr, BLOCK_M: tl.constexpr
):
    """``prepare`` as a kernel, over the blocks of the padded queries."""
    row, head, start, _ = place(padded, heads, BLOCK_M)
    out = rows_of(OUT, row, start, head, BLOCK_M, WIDTH)
    grad_out = rows_of(GRAD_OUT, row, start, head, BLOCK_M, WIDTH)
    prepare(out, grad_out, LSE, LINE, DELTA, row, head, start, queries, padded, heads, BLOCK_M)


@triton.jit
def grad_scores_of(scores, grad_p, lse, delta, unit):
    return tl.exp2(scores * unit - lse[:, None]) * (grad_p - delta[:, None])


@triton.jit(do_not_specialize=["queries", "padded"])
def candidate_query_gradient(
    Q, K, V, OUT, GRAD_OUT, LO, HI, TILES, LSE, LINE, DELTA, GRAD_Q, scale, queries, padded, heads, group,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head: GRAD_Q (B, Tq, H, WIDTH), and what ``prepare`` stores."""
    row, head, start, _ = place(padded, heads, BLOCK_M)
    out = rows_of(OUT, row, start, head, BLOCK_M, WIDTH)
    grad_out = rows_of(GRAD_OUT, row, start, head, BLOCK_M, WIDTH)
    lse, delta = prepare(out, grad_out, LSE, LINE, DELTA, row, head, start, queries, padded, heads, BLOCK_M)
    blocks = tl.cdiv(queries, BLOCK_M)
    entry = row * blocks + start // BLOCK_M
    if start < queries:
        first, count = tl.load(TILES + entry * 4), tl.load(TILES + entry * 4 + 1)
        left, right = tl.load(TILES + entry * 4 + 2), tl.load(TILES + entry * 4 + 3)
        bounds = row.to(tl.int64) * padded + start + tl.arange(0, BLOCK_M)
        lo, hi = tl.load(LO + bounds), tl.load(HI + bounds)
        q = rows_of(Q, row, start, head, BLOCK_M, WIDTH)
        kv_head = head // group
        unit = scale * LOG2E
        grad_q = tl.zeros([BLOCK_M, WIDTH], tl.float32)
        for MASK in tl.static_range(3):
            from_tile = left if MASK == 0 else right if MASK == 1 else 0
            to_tile = right if MASK == 0 else count if MASK == 1 else left
            for i in range(from_tile, to_tile):
                at = first + i * BLOCK_N
                k = rows_of(K, row, at, kv_head, BLOCK_N, WIDTH)
                v = rows_of(V, row, at, kv_head, BLOCK_N, WIDTH)
                scores = masked(product(q, tl.trans(k)), lo, hi, at, BLOCK_N, MASK)
                grad_scores = grad_scores_of(scores, product(grad_out, tl.trans(v)), lse, delta, unit)
                grad_q = tl.dot(grad_scores.to(k.dtype), k, grad_q, input_precision="ieee")
        m, d = start + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
        GRAD_Q += (row.to(tl.int64) * queries * heads + head) * WIDTH
        at_q = GRAD_Q + m.to(tl.int64)[:, None] * (heads * WIDTH) + d[None, :]
        tl.store(at_q, (grad_q * scale).to(GRAD_Q.dtype.element_ty), mask=(m < queries)[:, None])


@triton.jit
def key_block(
    Q, K, V, GRAD_OUT, QUERY_LO, QUERY_HI, LINE, DELTA, WORKSPACE, GRAD_K, GRAD_V,
    k_row, k_token, k_head, v_row, v_token, v_head, row, kv_head, start, scale, keys, padded, padded_keys, heads, group,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, QUERIES_TOO: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, over all query heads of its group; with QUERIES_TOO, its share of
    the gradient of the queries is added to WORKSPACE (B, H, padded queries, WIDTH), float32, unscaled."""
    n = start + tl.arange(0, BLOCK_N)
    wide = row.to(tl.int64)
    QUERY_LO += wide * padded_keys
    QUERY_HI += wide * padded_keys
    query_lo, query_hi = tl.load(QUERY_LO + n), tl.load(QUERY_HI + n)
    # Neither bound decreases: the first and last key have the bounds of the block.
    last = tl.minimum(start + BLOCK_N, keys) - 1
    first = tl.load(QUERY_LO + start) // BLOCK_M * BLOCK_M
    end = tl.load(QUERY_HI + last)
    # Descriptors made here keep k and v in shared memory; from those made by the host they would go to registers.
    K += wide * k_row + kv_head.to(tl.int64) * k_head
    V += wide * v_row + kv_head.to(tl.int64) * v_head
    k = tl.make_tensor_descriptor(K, [keys, WIDTH], [k_token, 1], [BLOCK_N, WIDTH]).load([start, 0])
    v = tl.make_tensor_descriptor(V, [keys, WIDTH], [v_token, 1], [BLOCK_N, WIDTH]).load([start, 0])
    unit = scale * LOG2E
    column = tl.arange(0, BLOCK_M)
    d = tl.arange(0, WIDTH)
    grad_k = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    grad_v = tl.zeros([BLOCK_N, WIDTH], tl.float32)
    for member in range(group):
        head = kv_head * group + member
        each = (wide * heads + head) * padded
        LINE_HEAD, DELTA_HEAD, WORKSPACE_HEAD = LINE + each, DELTA + each, WORKSPACE + each * WIDTH
        for at in range(first, end, BLOCK_M):
            at = tl.multiple_of(at, BLOCK_M)
            m = at + column
            q = rows_of(Q, row, at, head, BLOCK_M, WIDTH)
            grad_out = rows_of(GRAD_OUT, row, at, head, BLOCK_M, WIDTH)
            lse, delta = tl.load(LINE_HEAD + m), tl.load(DELTA_HEAD + m)
            p = tl.exp2(product(k, tl.trans(q)) * unit - lse[None, :])
            visible = (column[None, :] >= (query_lo - at)[:, None]) & (column[None, :] < (query_hi - at)[:, None])
            p = tl.where(visible, p, 0.0)
            grad_v = tl.dot(p.to(grad_out.dtype), grad_out, grad_v, input_precision="ieee")
            grad_scores = (p * (product(v, tl.trans(grad_out)) - delta[None, :])).to(q.dtype)
            grad_k = tl.dot(grad_scores, q, grad_k, input_precision="ieee")
            if QUERIES_TOO:
                place_q = WORKSPACE_HEAD + at * WIDTH + (column[:, None] * WIDTH + d[None, :])
                tl.store(place_q, tl.load(place_q) + product(tl.trans(grad_scores), k))
    flat = (wide * keys * (heads // group) + kv_head) * WIDTH
    at_k = flat + n.to(tl.int64)[:, None] * ((heads // group) * WIDTH) + d[None, :]
    tl.store(GRAD_K + at_k, (grad_k * scale).to(GRAD_K.dtype.element_ty), mask=(n < keys)[:, None])
    tl.store(GRAD_V + at_k, grad_v.to(GRAD_V.dtype.element_ty), mask=(n < keys)[:, None])


@triton.jit(do_not_specialize=["keys", "padded", "padded_keys"])
def candidate_key_gradient(
    Q, K, V, GRAD_OUT, QUERY_LO, QUERY_HI, LINE, DELTA, GRAD_K, GRAD_V,
    k_row, k_token, k_head, v_row, v_token, v_head, scale, keys, padded, padded_keys, heads, group,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys of one key head: GRAD_K, GRAD_V (B, Tk, Hkv, WIDTH)."""
    blocks, kv_heads = tl.cdiv(keys, BLOCK_N), heads // group
    kv_head, row = tl.program_id(0) // blocks % kv_heads, tl.program_id(0) // blocks // kv_heads
    key_block(
        Q, K, V, GRAD_OUT, QUERY_LO, QUERY_HI, LINE, DELTA, DELTA, GRAD_K, GRAD_V,
        k_row, k_token, k_head, v_row, v_token, v_head, row, kv_head,
        tl.program_id(0) % blocks * BLOCK_N, scale, keys, padded, padded_keys, heads, group,
        WIDTH, BLOCK_M, BLOCK_N, False,
    )  # fmt: skip


@triton.jit(do_not_specialize=["keys", "padded", "padded_keys", "strips", "strip", "size"])
def candidate_one_pass(
    Q, K, V, GRAD_OUT, QUERY_LO, QUERY_HI, LINE, DELTA, WORKSPACE, GRAD_K, GRAD_V,
    k_row, k_token, k_head, v_row, v_token, v_head, scale, keys, padded, padded_keys, heads, group, strips, strip, size,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One strip of keys of one key head: its gradients, and its part of WORKSPACE (strips, B, H, padded, WIDTH), which
    begins as zeros. ``size`` is the number of elements of a part."""
    kv_heads = heads // group
    number = tl.program_id(0) % strips
    kv_head, row = tl.program_id(0) // strips % kv_heads, tl.program_id(0) // strips // kv_heads
    for start in range(number * strip, tl.minimum(number * strip + strip, keys), BLOCK_N):
        key_block(
            Q, K, V, GRAD_OUT, QUERY_LO, QUERY_HI, LINE, DELTA, WORKSPACE + number.to(tl.int64) * size, GRAD_K, GRAD_V,
            k_row, k_token, k_head, v_row, v_token, v_head, row, kv_head, start, scale,
            keys, padded, padded_keys, heads, group, WIDTH, BLOCK_M, BLOCK_N, True,
        )  # fmt: skip
        tl.debug_barrier()  # the next block of keys reads what this one has stored


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, scale: float, form: str,
    of_queries: TileSizes, of_keys: TileSizes, tiles: Tensor | None = None, strip: int = STRIP,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v from the results of ``forward``. ``tiles`` are the plan's for ``of_queries``."""
    rows, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    grad_out = grad_out.contiguous()
    grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    padded, padded_keys = padded_length(queries), padded_length(keys)
    line, delta = (torch.empty(rows, heads, padded, dtype=torch.float32, device=q.device) for _ in range(2))
    m, n = of_queries.block_m, of_queries.block_n
    counts = (heads, heads // kv_heads)
    launch = {"WIDTH": width, "num_warps": of_queries.num_warps}
    if form == "two_pass":
        grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        candidate_query_gradient[(rows * heads * (padded // m),)](
            described(q, m), described(k, n), described(v, n), described(out, m), described(grad_out, m),
            plan.lo, plan.hi, plan.tiles(m, n) if tiles is None else tiles, lse, line, delta, grad_q,
            scale, queries, padded, *counts, WIDTH=width, **of_queries.arguments(),
        )  # fmt: skip
    else:
        candidate_prepare[(rows * heads * (padded // m),)](
            described(out, m), described(grad_out, m), lse, line, delta, queries, padded, heads, BLOCK_M=m, **launch
        )
    m, n = of_keys.block_m, of_keys.block_n
    inputs = (
        described(q, m), k, v, described(grad_out, m),
        plan.query_lo, plan.query_hi, line, delta,
    )  # fmt: skip
    sizes = (*k.stride()[:3], *v.stride()[:3], scale, keys, padded, padded_keys, *counts)
    if form == "two_pass":
        candidate_key_gradient[(rows * kv_heads * triton.cdiv(keys, n),)](
            *inputs, grad_k, grad_v, *sizes, WIDTH=width, **of_keys.arguments()
        )
        return grad_q, grad_k, grad_v
    strips = triton.cdiv(keys, strip)
    workspace = torch.zeros(strips, rows, heads, padded, width, dtype=torch.float32, device=q.device)
    candidate_one_pass[(rows * kv_heads * strips,)](
        *inputs, workspace, grad_k, grad_v, *sizes, strips, strip, workspace[0].numel(),
        WIDTH=width, **of_keys.arguments(),
    )  # fmt: skip
    grad_q = workspace.sum(0) if strips > 1 else workspace[0]
    return (grad_q[:, :, :queries].transpose(1, 2) * scale).to(q.dtype).contiguous(), grad_k, grad_v
