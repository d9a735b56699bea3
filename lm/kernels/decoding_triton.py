"""Attention of few queries over a long cache: the keys are split among programs, then the parts are combined.

Generating one token reads the whole cache and computes little, so one program per head would leave most of a GPU idle
(Dao et al. 2023, Flash-Decoding). Each part has a fixed number of keys, counted from the first that a row's queries
see, so that a row's bits do not depend on the rest of the batch or on the size of the cache.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lm.kernels import tile_sizes
from lm.kernels.attention_triton import LN2, accumulator, attend_tile, constants, row_major, strides

KEYS_PER_PART = 256
MOST_QUERIES = 64  # queries per key-value head, summed over its group
PARTS_AT_ONCE = 16


def serves(q: Tensor, k: Tensor) -> bool:
    """Whether a call has few enough queries and enough keys to be split."""
    return q.shape[1] * (q.shape[2] // k.shape[2]) <= MOST_QUERIES and k.shape[1] > KEYS_PER_PART


@triton.jit(do_not_specialize=["queries", "keys", "parts"])
def decoding_part(
    Q, K, V, LO, HI, OUT, LSE, q_row, q_token, q_head, k_row, k_token, k_head, v_row, v_token, v_head,
    scale, softcap, queries, keys, heads, group, parts,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    KEYS: tl.constexpr, SOFTCAP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All queries of one key-value head over one part of its keys: OUT (parts, B, Tq, H, D), LSE (parts, B, Tq, H)."""
    kv_heads = heads // group
    part = tl.program_id(0) % parts
    kv_head = (tl.program_id(0) // parts % kv_heads).to(tl.int64)
    row = (tl.program_id(0) // parts // kv_heads).to(tl.int64)
    # Each line of the tile is a pair (query, member of the group).
    line = tl.arange(0, BLOCK_M)
    query, head = line // group, kv_head * group + line % group
    inside = line < queries * group
    lo = tl.maximum(tl.load(LO + row * queries + query, mask=inside, other=0), 0)
    hi = tl.minimum(tl.load(HI + row * queries + query, mask=inside, other=0), keys)
    start = tl.min(tl.where(lo < hi, lo, keys), 0) + part * KEYS
    end = tl.minimum(start + KEYS, tl.max(tl.where(lo < hi, hi, 0), 0))
    hi = tl.minimum(hi, end)

    d = tl.arange(0, BLOCK_D)
    written = inside[:, None] & (d < WIDTH)[None, :]
    q = tl.load(Q + row * q_row + (query * q_token + head * q_head)[:, None] + d[None, :], mask=written, other=0.0)
    K += row * k_row + kv_head * k_head
    V += row * v_row + kv_head * v_head
    out = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    total = tl.zeros([BLOCK_M], ACC)
    top = tl.full([BLOCK_M], float("-inf"), ACC)
    for i in range(tl.cdiv(tl.maximum(end - start, 0), BLOCK_N)):
        out, total, top = attend_tile(
            out, total, top, q, K, V, k_token, v_token, start + i * BLOCK_N, lo, hi, keys, scale, softcap,
            WIDTH, BLOCK_D, BLOCK_N, SOFTCAP, True, ACC, PRECISION,
        )  # fmt: skip
    blind = total == 0
    out = out / tl.where(blind, 1.0, total)[:, None]
    # In units of log2, as decoding_whole expects.
    lse = tl.where(blind, float("-inf"), top + tl.log2(tl.where(blind, 1.0, total)))
    each = ((part * (tl.num_programs(0) // parts // kv_heads) + row) * queries + query) * heads + head
    tl.store(LSE + each, lse, mask=inside)
    tl.store(OUT + each[:, None] * WIDTH + d[None, :], out, mask=written)


@triton.jit(do_not_specialize=["lines", "parts", "queries"])
def decoding_whole(
    PARTS, PART_LSE, OUT, LSE, lines, parts, queries, heads,
    WIDTH: tl.constexpr, BLOCK_D: tl.constexpr, AT_ONCE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one query of one head: OUT (B, Tq, H, D), LSE (B, H, Tq)."""
    line = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    out = tl.zeros([BLOCK_D], ACC)
    total = tl.sum(tl.zeros([AT_ONCE], ACC), 0)
    top = total - float("inf")
    for first in range(0, parts, AT_ONCE):
        part = first + tl.arange(0, AT_ONCE)
        each = part.to(tl.int64) * lines + line
        lse = tl.load(PART_LSE + each, mask=part < parts, other=float("-inf"))
        new_top = tl.maximum(top, tl.max(lse, 0))
        offset = tl.where(new_top == float("-inf"), 0.0, new_top)
        share, shrink = tl.exp2(lse - offset), tl.exp2(top - offset)
        inside = (part < parts)[:, None] & (d < WIDTH)[None, :]
        values = tl.load(PARTS + each[:, None] * WIDTH + d[None, :], mask=inside, other=0.0)
        out = out * shrink + tl.sum(values * share[:, None], 0)
        total = total * shrink + tl.sum(share, 0)
        top = new_top
    blind = total == 0
    out = out / tl.where(blind, 1.0, total)
    tl.store(OUT + line * WIDTH + d, out.to(OUT.dtype.element_ty), mask=d < WIDTH)
    row, query, head = line // heads // queries, line // heads % queries, line % heads
    lse = tl.where(blind, float("-inf"), (top + tl.log2(tl.where(blind, 1.0, total))) * LN2)
    tl.store(LSE + (row * heads + head) * queries + query, lse)


def forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """The same result as ``attention_triton.forward``, for calls that ``serves`` accepts."""
    rows, queries, heads, width = q.shape
    keys, kv_heads = k.shape[1:3]
    q, k, v = (row_major(x) for x in (q, k, v))
    parts, lines, precise = triton.cdiv(keys, KEYS_PER_PART), rows * queries * heads, accumulator(q.dtype)
    part_out = torch.empty(parts, lines, width, dtype=precise, device=q.device)
    part_lse = torch.empty(parts, lines, dtype=precise, device=q.device)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(rows, heads, queries, dtype=precise, device=q.device)
    if not lines:
        return out, lse
    chosen, known = tile_sizes.choose("decoding_part", q.dtype, width), constants(q, softcap)
    block_m = max(chosen.block_m, tile_sizes.padded_width(queries * heads // kv_heads))
    decoding_part[(rows * kv_heads * parts,)](
        q, k, v, lo.contiguous(), hi.contiguous(), part_out, part_lse, *strides(q, k, v), scale, softcap,
        queries, keys, heads, heads // kv_heads, parts,
        KEYS=KEYS_PER_PART, **known, **(chosen.arguments() | {"BLOCK_M": block_m}),
    )  # fmt: skip
    decoding_whole[(lines,)](
        part_out, part_lse, out, lse, lines, parts, queries, heads,
        WIDTH=width, BLOCK_D=known["BLOCK_D"], AT_ONCE=PARTS_AT_ONCE, ACC=known["ACC"],
    )  # fmt: skip
    return out, lse
