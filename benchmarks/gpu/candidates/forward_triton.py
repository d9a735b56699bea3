"""Four forward passes of attention that load their tiles by tensor descriptors (on Hopper and later, by TMA).

They differ in what runs while the tensor cores compute; the research is Shah et al. 2024, FlashAttention-3:

- ``split``: tiles without a mask first, then those with one, each kind in a loop of its own.
- ``single``: one loop over all tiles, which masks the scores where it must. The pipeline never drains, which matters
  for packed rows with few tiles.
- ``ahead``: as ``split``, but the scores of the next tile are computed during the softmax of this one.
- ``delayed``: as ``split``, but the product with the values is computed during the softmax of the next tile.
- ``specialized``: one loop, whose loads, products and softmax Triton divides among groups of warps.

Bounds are compared relative to the tile, and a tile after the last lower bound compares upper bounds only. A query that
has seen nothing yet has ``LOWEST`` as its maximum, so that a masked score gives 0 and not NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.gpu.candidates.plan import Plan
from lm.kernels.tile_sizes import TileSizes

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.0e38)
NO_MASK, UPPER, BOTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FORMS = ("split", "single", "ahead", "delayed")


@triton.jit
def rows_of(X, row, start, head, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS tokens of one head of the tensor (B, T, H, WIDTH) that a descriptor describes; zeros past its end."""
    return tl.reshape(X.load([row, start, head, 0]), (ROWS, WIDTH))


@triton.jit
def masked(scores, lo, hi, start, BLOCK_N: tl.constexpr, MASK: tl.constexpr):
    """Scores of a tile that begins at key ``start``, -inf where a query does not see the key."""
    column = tl.arange(0, BLOCK_N)
    if MASK == UPPER:
        scores = tl.where(column[None, :] < (hi - start)[:, None], scores, float("-inf"))
    if MASK == BOTH:
        visible = (column[None, :] < (hi - start)[:, None]) & (column[None, :] >= (lo - start)[:, None])
        scores = tl.where(visible, scores, float("-inf"))
    return scores


@triton.jit
def softmax_step(scores, total, top, unit):
    """The tile's share of the softmax, what earlier tiles shrink by, and the new sum and maximum (in log2)."""
    new_top = tl.maximum(top, tl.max(scores, 1) * unit)
    p = tl.exp2(scores * unit - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    return p, shrink, total * shrink + tl.sum(p, 1), new_top


@triton.jit
def product(a, b):
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def attend(
    out, total, top, scores, V, row, head, start, lo, hi, unit,
    BLOCK_N: tl.constexpr, WIDTH: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add a tile, given its scores, to the running output, sum and maximum."""
    scores = masked(scores, lo, hi, start, BLOCK_N, MASK)
    p, shrink, total, top = softmax_step(scores, total, top, unit)
    v = rows_of(V, row, start, head, BLOCK_N, WIDTH)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return out, total, top


@triton.jit
def scores_of(q, K, row, head, start, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr):
    return product(q, tl.trans(rows_of(K, row, start, head, BLOCK_N, WIDTH)))


@triton.jit
def place(queries, heads, BLOCK_M: tl.constexpr):
    """This program's row, head, first query and entry of the tiles; blocks with the most work (causal) start first."""
    blocks = tl.cdiv(queries, BLOCK_M)
    block = blocks - 1 - tl.program_id(0) % blocks
    head = tl.program_id(0) // blocks % heads
    row = tl.program_id(0) // blocks // heads
    return row, head, block * BLOCK_M, row * blocks + block


@triton.jit
def finish(out, total, top, OUT, LSE, row, head, start, queries, heads, BLOCK_M: tl.constexpr, WIDTH: tl.constexpr):
    """Store a block of the output (B, Tq, H, WIDTH), and its log-sum-exp (B, H, Tq)."""
    blind = total == 0
    out = out / tl.where(blind, 1.0, total)[:, None]
    lse = tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1.0, total))) * LN2)
    m, d = start + tl.arange(0, BLOCK_M), tl.arange(0, WIDTH)
    OUT += (row.to(tl.int64) * queries * heads + head) * WIDTH
    at = OUT + m.to(tl.int64)[:, None] * (heads * WIDTH) + d[None, :]
    tl.store(at, out.to(OUT.dtype.element_ty), mask=(m < queries)[:, None])
    tl.store(LSE + (row.to(tl.int64) * heads + head) * queries + m, lse, mask=m < queries)


@triton.jit(do_not_specialize=["queries", "padded"])
def candidate_forward(
    Q, K, V, LO, HI, TILES, OUT, LSE, scale, queries, padded, heads, group,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """One block of queries of one head. Q, K and V are descriptors of (B, T, H, WIDTH)."""
    row, head, start, entry = place(queries, heads, BLOCK_M)
    first, count = tl.load(TILES + entry * 4), tl.load(TILES + entry * 4 + 1)
    left, right = tl.load(TILES + entry * 4 + 2), tl.load(TILES + entry * 4 + 3)
    bounds = row.to(tl.int64) * padded + start + tl.arange(0, BLOCK_M)
    lo, hi = tl.load(LO + bounds), tl.load(HI + bounds)
    q = rows_of(Q, row, start, head, BLOCK_M, WIDTH)
    kv_head = head // group
    unit = scale * LOG2E
    out = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    if FORM == "single":
        for i in range(count):
            at = first + i * BLOCK_N
            scores = scores_of(q, K, row, kv_head, at, BLOCK_N, WIDTH)
            if (i < left) | (i >= right):
                scores = masked(scores, lo, hi, at, BLOCK_N, BOTH)
            out, total, top = attend(
                out, total, top, scores, V, row, kv_head, at, lo, hi, unit, BLOCK_N, WIDTH, NO_MASK
            )
    else:
        if FORM == "split":
            for i in range(left, right):
                at = first + i * BLOCK_N
                scores = scores_of(q, K, row, kv_head, at, BLOCK_N, WIDTH)
                out, total, top = attend(
                    out, total, top, scores, V, row, kv_head, at, lo, hi, unit, BLOCK_N, WIDTH, NO_MASK
                )
        elif right > left:
            at = first + left * BLOCK_N
            scores = scores_of(q, K, row, kv_head, at, BLOCK_N, WIDTH)
            if FORM == "ahead":
                for i in range(left, right - 1):
                    at = first + i * BLOCK_N
                    following = scores_of(q, K, row, kv_head, at + BLOCK_N, BLOCK_N, WIDTH)
                    out, total, top = attend(
                        out, total, top, scores, V, row, kv_head, at, lo, hi, unit, BLOCK_N, WIDTH, NO_MASK
                    )
                    scores = following
                at = first + (right - 1) * BLOCK_N
                out, total, top = attend(
                    out, total, top, scores, V, row, kv_head, at, lo, hi, unit, BLOCK_N, WIDTH, NO_MASK
                )
            else:
                p, shrink, total, top = softmax_step(scores, total, top, unit)
                p = p.to(OUT.dtype.element_ty)
                for i in range(left + 1, right):
                    at = first + i * BLOCK_N
                    scores = scores_of(q, K, row, kv_head, at, BLOCK_N, WIDTH)
                    v = rows_of(V, row, at - BLOCK_N, kv_head, BLOCK_N, WIDTH)
                    out = tl.dot(p, v, out * shrink[:, None], input_precision="ieee")
                    fresh, shrink, total, top = softmax_step(scores, total, top, unit)
                    p = fresh.to(OUT.dtype.element_ty)
                v = rows_of(V, row, first + (right - 1) * BLOCK_N, kv_head, BLOCK_N, WIDTH)
                out = tl.dot(p, v, out * shrink[:, None], input_precision="ieee")
        if FORM == "delayed":  # with a loop for each kind of mask, ptxas makes the products of all loops wait
            for i in range(count - (right - left)):
                at = first + tl.where(i < left, i, i + (right - left)) * BLOCK_N
                scores = scores_of(q, K, row, kv_head, at, BLOCK_N, WIDTH)
                out, total, top = attend(
                    out, total, top, scores, V, row, kv_head, at, lo, hi, unit, BLOCK_N, WIDTH, BOTH
                )
        else:
            for MASK in tl.static_range(1, 3):
                for i in range(right if MASK == 1 else 0, count if MASK == 1 else left):
                    at = first + i * BLOCK_N
                    scores = scores_of(q, K, row, kv_head, at, BLOCK_N, WIDTH)
                    out, total, top = attend(
                        out, total, top, scores, V, row, kv_head, at, lo, hi, unit, BLOCK_N, WIDTH, MASK
                    )
    finish(out, total, top, OUT, LSE, row, head, start, queries, heads, BLOCK_M, WIDTH)


@triton.jit(do_not_specialize=["queries", "keys", "padded"])
def candidate_specialized(
    Q, K, V, LO, HI, TILES, OUT, LSE, q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    scale, queries, keys, padded, heads, group,
    WIDTH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """As ``candidate_forward``, with one loop that masks every tile. It takes pointers: the compiler divides the
    work only if the kernel itself makes the descriptors, of the bounds too."""
    row, head, start, entry = place(queries, heads, BLOCK_M)
    first, count = tl.load(TILES + entry * 4), tl.load(TILES + entry * 4 + 1)
    wide = row.to(tl.int64)
    kv_head = (head // group).to(tl.int64)
    Q += wide * q_row + head.to(tl.int64) * q_head
    K += wide * k_row + kv_head * k_head
    V += wide * v_row + kv_head * v_head
    OUT_HEAD = OUT + (wide * queries * heads + head) * WIDTH
    q_tokens = tl.make_tensor_descriptor(Q, [queries, WIDTH], [q_token, 1], [BLOCK_M, WIDTH])
    k_tokens = tl.make_tensor_descriptor(K, [keys, WIDTH], [k_token, 1], [BLOCK_N, WIDTH])
    v_tokens = tl.make_tensor_descriptor(V, [keys, WIDTH], [v_token, 1], [BLOCK_N, WIDTH])
    out_tokens = tl.make_tensor_descriptor(OUT_HEAD, [queries, WIDTH], [heads * WIDTH, 1], [BLOCK_M, WIDTH])
    lo = tl.make_tensor_descriptor(LO + wide * padded, [padded], [1], [BLOCK_M]).load([start])
    hi = tl.make_tensor_descriptor(HI + wide * padded, [padded], [1], [BLOCK_M]).load([start])
    q = q_tokens.load([start, 0])
    unit = scale * LOG2E
    out = tl.zeros([BLOCK_M, WIDTH], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], LOWEST, tl.float32)
    for at in tl.range(first, first + count * BLOCK_N, BLOCK_N, warp_specialize=True):
        scores = masked(product(q, tl.trans(k_tokens.load([at, 0]))), lo, hi, at, BLOCK_N, MASK)
        p, shrink, total, top = softmax_step(scores, total, top, unit)
        v = v_tokens.load([at, 0])
        out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    blind = total == 0
    out_tokens.store([start, 0], (out / tl.where(blind, 1.0, total)[:, None]).to(OUT.dtype.element_ty))
    lse = tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1.0, total))) * LN2)
    m = start + tl.arange(0, BLOCK_M)
    tl.store(LSE + (wide * heads + head) * queries + m, lse, mask=m < queries)


def described(x: Tensor, block: int) -> TensorDescriptor:
    """A descriptor that loads ``block`` tokens of one head of x (B, T, H, D) at once."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), [1, block, 1, x.shape[-1]])


def forward(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, form: str, sizes: TileSizes, tiles: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output (B, Tq, H, D) and natural log-sum-exp (B, H, Tq), without a softcap. D is a power of two, at least 16.

    ``tiles`` are the plan's for these sizes, which the caller makes once a batch; None: they are made here.
    """
    rows, queries, heads, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, queries, dtype=torch.float32, device=q.device)
    tiles = plan.tiles(sizes.block_m, sizes.block_n) if tiles is None else tiles
    grid = (rows * heads * triton.cdiv(queries, sizes.block_m),)
    bounds = (plan.lo, plan.hi, tiles, out, lse)
    counts = (plan.lo.shape[1], heads, heads // k.shape[2])
    if form == "specialized":
        # The kernel's descriptors are made in memory that the host provides.
        triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=q.device))
        mask = BOTH if bool(tiles[..., 2].any()) else UPPER
        strides = (stride for x in (q, k, v) for stride in x.stride()[:3])
        candidate_specialized[grid](
            q, k, v, *bounds, *strides, scale, queries, k.shape[1], *counts,
            WIDTH=width, MASK=mask, **sizes.arguments(),
        )  # fmt: skip
    else:
        described_inputs = (described(q, sizes.block_m), described(k, sizes.block_n), described(v, sizes.block_n))
        candidate_forward[grid](
            *described_inputs, *bounds, scale, queries, *counts, WIDTH=width, FORM=form, **sizes.arguments()
        )
    return out, lse
