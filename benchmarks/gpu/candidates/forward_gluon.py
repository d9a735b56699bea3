"""A forward pass of attention for Hopper in Gluon, where the program itself divides the work among groups of warps.

One warp loads tiles of keys and values; two groups of four warps have 64 queries each and share the tiles, so that one
computes its softmax while the tensor cores work for the other (Shah et al. 2024, FlashAttention-3). Within a group, the
product with the values of a tile overlaps the scores of the next. Gluon has no interpreter: only a GPU can tell whether
this is right.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from benchmarks.gpu.candidates.plan import Plan

LOG2E = gl.constexpr(1.4426950408889634)
LN2 = gl.constexpr(0.6931471805599453)
LOWEST = gl.constexpr(-3.0e38)
QUERIES = 64  # of one group of four warps
BLOCK_M = 2 * QUERIES
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}


@gluon.jit
def tile_start(i, first, left, full, BLOCK_N: gl.constexpr):
    """The first key of the i-th tile to compute: first the ``full`` tiles from ``left``, then those with a mask."""
    number = gl.where(i < full, left + i, gl.where(i - full < left, i - full, i))
    return first + number * BLOCK_N


@gluon.jit
def produce(
    K, V, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, row, kv_head, first, count, left, full,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the tiles of keys and values in the order in which they are computed."""
    for i in range(count):
        at = tile_start(i, first, left, full, BLOCK_N)
        stage = i % STAGES
        phase = (i // STAGES) & 1
        mbarrier.wait(k_empty.index(stage), phase ^ 1)
        mbarrier.expect(k_full.index(stage), K.block_type.nbytes)
        tma.async_copy_global_to_shared(K, [row, at, kv_head, 0], k_full.index(stage), k_tiles.index(stage))
        mbarrier.wait(v_empty.index(stage), phase ^ 1)
        mbarrier.expect(v_full.index(stage), V.block_type.nbytes)
        tma.async_copy_global_to_shared(V, [row, at, kv_head, 0], v_full.index(stage), v_tiles.index(stage))


@gluon.jit
def masked(scores, lo, hi, at, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    column = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, LAYOUT))
    visible = (column[None, :] < (hi - at)[:, None]) & (column[None, :] >= (lo - at)[:, None])
    return gl.where(visible, scores, float("-inf"))


@gluon.jit
def start_scores(q, k, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):
    zero = gl.zeros([64, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(q, k.reshape([BLOCK_N, WIDTH]).permute((1, 0)), zero, use_acc=False, is_async=True)


@gluon.jit
def softmax_step(scores, top, total, unit):
    new_top = gl.maximum(top, gl.max(scores, 1) * unit)
    p = gl.exp2(scores * unit - new_top[:, None])
    shrink = gl.exp2(top - new_top)
    return p, shrink, total * shrink + gl.sum(p, 1), new_top


@gluon.jit
def consume(
    q, q_full, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turn, LO, HI, OUT, LSE, row, head, heads, start,
    queries, padded, first, count, left, full, scale,
    GROUP: gl.constexpr, PING_PONG: gl.constexpr, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """The output of 64 queries. With PING_PONG, the two groups take turns at starting their products."""
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, VALUES, 2)
    unit = scale * LOG2E
    m = start + GROUP * 64 + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    lo = gl.load(LO + row.to(gl.int64) * padded + m)
    hi = gl.load(HI + row.to(gl.int64) * padded + m)
    top = gl.full([64], LOWEST, gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([64], gl.float32, gl.SliceLayout(1, SCORES))
    out = gl.zeros([64, WIDTH], gl.float32, VALUES)
    mbarrier.wait(q_full, 0)
    q = q.reshape([64, WIDTH])
    mbarrier.wait(k_full.index(0), 0)
    token = start_scores(q, k_tiles.index(0), WIDTH, BLOCK_N, SCORES)
    scores = warpgroup_mma_wait(0, deps=[token])
    mbarrier.arrive(k_empty.index(0))
    if full == 0:
        scores = masked(scores, lo, hi, tile_start(0, first, left, full, BLOCK_N), BLOCK_N, SCORES)
    p, shrink, total, top = softmax_step(scores, top, total, unit)
    operand = gl.convert_layout(p.to(DTYPE), OPERAND)
    for MASKED in gl.static_range(2):
        for i in range(gl.maximum(full, 1) if MASKED else 1, count if MASKED else full):
            stage = i % STAGES
            before = (i - 1) % STAGES
            mbarrier.wait(k_full.index(stage), (i // STAGES) & 1)
            if PING_PONG:
                mbarrier.wait(turn.index(GROUP), (i - 1) & 1)
            token = start_scores(q, k_tiles.index(stage), WIDTH, BLOCK_N, SCORES)
            out = out * gl.convert_layout(shrink, gl.SliceLayout(1, VALUES))[:, None]
            mbarrier.wait(v_full.index(before), ((i - 1) // STAGES) & 1)
            sums = warpgroup_mma(operand, v_tiles.index(before).reshape([BLOCK_N, WIDTH]), out, is_async=True)
            if PING_PONG:
                mbarrier.arrive(turn.index(1 - GROUP))
            scores = warpgroup_mma_wait(1, deps=[token])
            mbarrier.arrive(k_empty.index(stage))
            if MASKED:
                scores = masked(scores, lo, hi, tile_start(i, first, left, full, BLOCK_N), BLOCK_N, SCORES)
            p, shrink, total, top = softmax_step(scores, top, total, unit)
            operand = gl.convert_layout(p.to(DTYPE), OPERAND)
            # Across iterations, ptxas would make this product wait for all others.
            out, operand, shrink = warpgroup_mma_wait(0, deps=[sums, operand, shrink])
            mbarrier.arrive(v_empty.index(before))
    last = count - 1
    out = out * gl.convert_layout(shrink, gl.SliceLayout(1, VALUES))[:, None]
    mbarrier.wait(v_full.index(last % STAGES), (last // STAGES) & 1)
    sums = warpgroup_mma(operand, v_tiles.index(last % STAGES).reshape([BLOCK_N, WIDTH]), out, is_async=True)
    out = warpgroup_mma_wait(0, deps=[sums])
    blind = total == 0
    safe = gl.where(blind, 1.0, total)
    out = out * gl.convert_layout(1.0 / safe, gl.SliceLayout(1, VALUES))[:, None]
    lse = gl.where(blind, float("-inf"), (top + gl.log2(safe)) * LN2)
    store(out, lse, OUT, LSE, row, head, heads, start + GROUP * 64, queries, WIDTH, SCORES, VALUES)


@gluon.jit
def store(
    out,
    lse,
    OUT,
    LSE,
    row,
    head,
    heads,
    start,
    queries,
    WIDTH: gl.constexpr,
    SCORES: gl.constexpr,
    VALUES: gl.constexpr,
):
    """Store the output and log-sum-exp of 64 queries."""
    wide = row.to(gl.int64)
    m = start + gl.arange(0, 64, layout=gl.SliceLayout(1, SCORES))
    gl.store(LSE + (wide * heads + head) * queries + m, lse, mask=m < queries)
    m = start + gl.arange(0, 64, layout=gl.SliceLayout(1, VALUES))
    d = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, VALUES))
    at = OUT + ((wide * queries + m) * heads + head)[:, None] * WIDTH + d[None, :]
    gl.store(at, out.to(OUT.dtype.element_ty), mask=(m < queries)[:, None])


@gluon.jit(do_not_specialize=["queries", "padded"])
def candidate_gluon(
    Q, K, V, LO, HI, TILES, OUT, LSE, scale, queries, padded, heads, group,
    WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, DTYPE: gl.constexpr, PING_PONG: gl.constexpr,
    REGISTERS: gl.constexpr,
):  # fmt: skip
    """128 queries of one head. Q, K and V are descriptors of (B, T, H, WIDTH)."""
    blocks = (queries + 127) // 128
    block = blocks - 1 - gl.program_id(0) % blocks
    head = gl.program_id(0) // blocks % heads
    row = gl.program_id(0) // blocks // heads
    start = block * 128
    TILES += (row * blocks + block) * 4
    first = gl.load(TILES)
    count = gl.load(TILES + 1)
    left = gl.load(TILES + 2)
    full = gl.load(TILES + 3) - left
    if count == 0:
        SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
        VALUES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
        for i in gl.static_range(2):
            out = gl.zeros([64, WIDTH], gl.float32, VALUES)
            lse = gl.full([64], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
            store(out, lse, OUT, LSE, row, head, heads, start + i * 64, queries, WIDTH, SCORES, VALUES)
    else:
        q = gl.allocate_shared_memory(DTYPE, [2, 1, 64, 1, WIDTH], Q.layout)
        k_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_N, 1, WIDTH], K.layout)
        v_tiles = gl.allocate_shared_memory(DTYPE, [STAGES, 1, BLOCK_N, 1, WIDTH], V.layout)
        q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
        k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
        for i in gl.static_range(2):
            mbarrier.init(q_full.index(i), count=1)
            mbarrier.init(turn.index(i), count=1)
        for i in gl.static_range(STAGES):
            mbarrier.init(k_full.index(i), count=1)
            mbarrier.init(v_full.index(i), count=1)
            mbarrier.init(k_empty.index(i), count=2)  # both groups have read it
            mbarrier.init(v_empty.index(i), count=2)
        if PING_PONG:
            mbarrier.arrive(turn.index(0))
        for i in gl.static_range(2):
            mbarrier.expect(q_full.index(i), Q.block_type.nbytes)
            tma.async_copy_global_to_shared(Q, [row, start + i * 64, head, 0], q_full.index(i), q.index(i))
        gl.warp_specialize(
            [
                (consume, (
                    q.index(0), q_full.index(0), k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turn,
                    LO, HI, OUT, LSE, row, head, heads, start, queries, padded, first, count, left, full, scale,
                    0, PING_PONG, WIDTH, BLOCK_N, STAGES, DTYPE,
                )),
                (consume, (
                    q.index(1), q_full.index(1), k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, turn,
                    LO, HI, OUT, LSE, row, head, heads, start, queries, padded, first, count, left, full, scale,
                    1, PING_PONG, WIDTH, BLOCK_N, STAGES, DTYPE,
                )),
                (produce, (
                    K, V, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty, row, head // group,
                    first, count, left, full, BLOCK_N, STAGES,
                )),
            ],
            [4, 1],
            [REGISTERS, 24],
        )  # fmt: skip


def described(x: Tensor, block: int) -> TensorDescriptor:
    """A descriptor that loads ``block`` tokens of one head of x (B, T, H, D) at once."""
    shape = [1, block, 1, x.shape[-1]]
    layout = gl.NVMMASharedLayout.get_default_for(shape, DTYPES[x.dtype])
    return TensorDescriptor(x, list(x.shape), list(x.stride()), shape, layout)


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, block_n: int, stages: int, *,
    ping_pong: bool = False, registers: int = 240, tiles: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As ``forward_triton.forward``, for bfloat16 and float16. ``tiles`` are the plan's for 128 queries and block_n."""
    rows, queries, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device)
    tiles = plan.tiles(BLOCK_M, block_n) if tiles is None else tiles
    candidate_gluon[(rows * heads * tiles.shape[1],)](
        described(q, QUERIES), described(k, block_n), described(v, block_n), plan.lo, plan.hi, tiles, out, lse,
        scale, queries, plan.lo.shape[1], heads, heads // k.shape[2],
        WIDTH=width, BLOCK_N=block_n, STAGES=stages, DTYPE=DTYPES[q.dtype], PING_PONG=ping_pong, REGISTERS=registers,
        num_warps=4,
    )  # fmt: skip
    return out, lse
