"""Attention over key intervals with PyTorch's own operations, for devices without Triton: mostly CPUs.

PyTorch's CPU kernel computes every pair of the queries and keys it receives, visible or not. So the work is cut first:

    lo, hi -> plan: pieces of (some rows) x (a run of queries) x (the keys they see) -> one kernel call per piece

Dynamic programming over a grid of possible cuts, with a cost model of a call, chooses the pieces: packed documents are
separated, long causal ones are cut into blocks of queries with the keys up to them, tiny ones share a masked piece,
rows with equal intervals share a call, and if no cut pays off, the whole batch is one call. A plan depends only on
``lo``, ``hi`` and shapes and is cached by them, so all layers of a model share it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

# The cost of a call, forward and backward, in microseconds of one AVX2 core, fitted to 1,222 pieces of widths 16 to
# 128; only the ratios matter. Each head and each of the kernel's blocks of queries has its own matrix products.
CALL_COST = 100.0
BLOCK_COST, BLOCK_COST_PER_KEY = 1.7, 0.0004  # the second per number of a key, whose gradient is read and written
PAIR_COST, PAIR_COST_PER_WIDTH = 0.00255, 0.0002
MASK_COST = 0.00045  # per pair
TOKEN_COST_PER_WIDTH = 0.0043  # copies in and out, and newly allocated memory
# Cuts are made only if the cost model predicts this saving over a single call.
LEAST_SAVING = 0.135
# Possible cuts: one per this many queries, and at most so many in a row.
FINEST_GRAIN, MOST_CUTS = 32, 64
# The most numbers in a call's result. Beyond it rows are split: new pages from the system cost more than another call.
LARGEST_RESULT = 1 << 19

Kind = Literal["full", "causal", "masked"]
Span = tuple[int, int]
_aten = torch.ops.aten


@dataclass(frozen=True)
class Piece:
    """One call: the queries ``[queries[0], queries[1])`` of ``rows`` with the keys ``[keys[0], keys[1])``.

    ``kind`` is what the queries see: "full": all keys; "causal": the last query sees all keys, and each query before it
    one key less; "masked": the keys where ``bias`` is 0. ``bias`` holds 0 and -inf, (1 or rows, 1, queries, keys), and
    is None where no mask is needed ("full", and "causal" with as many queries as keys). ``first_on_keys``: no earlier
    piece has any of its keys.
    """

    rows: range
    queries: Span
    keys: Span
    kind: Kind
    first_on_keys: bool
    bias: Tensor | None

    @property
    def causal_flag(self) -> bool:
        """Whether the kernel's own causal flag, which aligns the first query with the first key, is the mask."""
        return self.kind == "causal" and self.bias is None

    def of_queries(self, x: Tensor) -> Tensor:
        """This piece's part of x (B, Tq, H, D), as a view (R, H, queries, D)."""
        return _part(x, self.rows, self.queries)

    def of_keys(self, x: Tensor) -> Tensor:
        """This piece's part of x (B, Tk, Hkv, D), as a view (R, Hkv, keys, D)."""
        return _part(x, self.rows, self.keys)

    def of_lse(self, lse: Tensor) -> Tensor:
        """This piece's part of lse (B, H, Tq), as a view (R, H, queries)."""
        return lse[self.rows.start : self.rows.stop : self.rows.step, :, slice(*self.queries)]


@dataclass(frozen=True)
class AttentionPlan:
    """The pieces of a batch. ``blind``, bool (rows, 1, Tq), is true for queries that see no key; None if all see one.
    ``all_keys`` is true if every key of every row is in a piece that is ``first_on_keys``."""

    pieces: tuple[Piece, ...]
    blind: Tensor | None
    all_keys: bool

    @property
    def is_one_call(self) -> bool:
        """Whether a single call covers all rows, queries and keys, so that its result is the whole result."""
        return len(self.pieces) == 1 and self.blind is None and self.all_keys


@dataclass(frozen=True)
class Shape:
    """What a plan depends on besides the intervals: ``heads`` of keys, with ``groups`` query heads each, of which
    ``threads`` are computed at a time."""

    rows: int
    queries: int
    keys: int
    heads: int
    groups: int
    width: int
    dtype: torch.dtype
    device: torch.device
    threads: int


def forward(
    q: Tensor, k: Tensor, v: Tensor, lo: Tensor, hi: Tensor, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention in which query ``i`` of row ``b`` sees the keys ``lo[b, i] <= j < hi[b, i]``.

    Args:
        q: (B, Tq, H, D). k, v: (B, Tk, Hkv, D), of the same dtype; H is a multiple of Hkv. The last dimension must be
            dense; other strides are arbitrary.
        lo, hi: int32 (B, Tq), any values.
        scale: factor of the scores. softcap: limits scores to (-softcap, softcap) by tanh; 0: off.

    Returns:
        The output (B, Tq, H, D) in q's dtype, contiguous, and the natural logarithm of each softmax's denominator,
        (B, H, Tq) in float32 (float64 for float64). A query that sees nothing has zeros and -inf.
    """
    plan = plan_for(q, k, lo, hi)
    if plan.is_one_call:
        queries, keys, values = (x.transpose(1, 2) for x in (q, k, v))
        part_out, part_lse = _attend(queries, keys, values, plan.pieces[0], scale, softcap)
        return part_out.transpose(1, 2).contiguous(), part_lse.contiguous()
    out = _fresh(q, plan.blind is None)
    precise = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=precise, device=q.device)
    for piece in plan.pieces:
        queries, keys, values = piece.of_queries(q), piece.of_keys(k), piece.of_keys(v)
        part_out, part_lse = _attend(queries, keys, values, piece, scale, softcap)
        piece.of_queries(out).copy_(part_out)
        piece.of_lse(lse).copy_(part_lse)
    if plan.blind is not None:
        lse.masked_fill_(plan.blind, -math.inf)
    return out, lse


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, lo: Tensor, hi: Tensor,
    scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k and v, contiguous, of the same shapes and dtypes; arguments and results as in ``forward``."""
    plan = plan_for(q, k, lo, hi)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    if plan.is_one_call:
        grad, queries, keys, values, outputs = (x.transpose(1, 2) for x in (grad_out, q, k, v, out))
        parts = _differentiate(grad, queries, keys, values, outputs, lse, plan.pieces[0], scale, softcap)
        grad_q, grad_k, grad_v = (part.transpose(1, 2).contiguous() for part in parts)
        return grad_q, grad_k, grad_v
    if plan.blind is not None:
        lse = lse.masked_fill(plan.blind, 0.0)  # exp(-inf - 0) is 0, exp(-inf + inf) is not
    grad_q, grad_k, grad_v = _fresh(q, plan.blind is None), _fresh(k, plan.all_keys), _fresh(v, plan.all_keys)
    for piece in plan.pieces:
        grad, queries, outputs = (piece.of_queries(x) for x in (grad_out, q, out))
        keys, values, log_sums = piece.of_keys(k), piece.of_keys(v), piece.of_lse(lse)
        part_q, part_k, part_v = _differentiate(grad, queries, keys, values, outputs, log_sums, piece, scale, softcap)
        piece.of_queries(grad_q).copy_(part_q)
        for whole, part in ((grad_k, part_k), (grad_v, part_v)):
            target = piece.of_keys(whole)
            target.copy_(part) if piece.first_on_keys else target.add_(part)
    return grad_q, grad_k, grad_v


def plan_for(q: Tensor, k: Tensor, lo: Tensor, hi: Tensor) -> AttentionPlan:
    """The plan of these intervals for tensors like q and k, cached for calls with equal ones."""
    # A GPU counts as many cores, so that it gets few, large calls.
    threads = torch.get_num_threads() if q.device.type == "cpu" else 64
    rows, queries, heads, width = q.shape
    groups = heads // k.shape[2]
    shape = Shape(rows, queries, k.shape[1], k.shape[2], groups, width, q.dtype, q.device, threads)
    lo_bytes, hi_bytes = (x.to("cpu", torch.int32).contiguous().numpy().tobytes() for x in (lo, hi))
    return make_plan(lo_bytes, hi_bytes, shape)


# Only a few are cached, because a plan may hold masks, and those of a training step are never used again.
@lru_cache(maxsize=8)
def make_plan(lo_bytes: bytes, hi_bytes: bytes, shape: Shape) -> AttentionPlan:
    """The plan of intervals given as the bytes of int32 (rows, queries)."""
    if not shape.rows * shape.queries:
        return AttentionPlan((), None, all_keys=False)
    lo, hi = (np.frombuffer(x, np.int32).reshape(shape.rows, shape.queries) for x in (lo_bytes, hi_bytes))
    lo, hi = lo.clip(0, shape.keys), hi.clip(0, shape.keys)
    keys = int(lo[0, 0]), int(hi[0, 0])
    if keys[0] < keys[1] and (lo == keys[0]).all() and (hi == keys[1]).all():
        # A shortcut for generation, where every token has new intervals and nothing can be cut.
        whole = Piece(range(shape.rows), (0, shape.queries), keys, "full", first_on_keys=True, bias=None)
        return AttentionPlan((whole,), None, keys == (0, shape.keys))
    blind = lo >= hi
    # Make these intervals empty such that they widen no piece, and turn theirs into a masked one.
    lo, hi = np.where(blind, shape.keys, lo), np.where(blind, 0, hi)
    pieces = _cut(lo, hi, shape)
    fresh_keys = sum(len(piece.rows) * (piece.keys[1] - piece.keys[0]) for piece in pieces if piece.first_on_keys)
    blind_queries = torch.from_numpy(blind).to(shape.device)[:, None] if blind.any() else None
    return AttentionPlan(tuple(pieces), blind_queries, fresh_keys == shape.rows * shape.keys)


def _runs_of_equal_rows(lo: np.ndarray, hi: np.ndarray) -> list[range]:
    """Group the rows into runs of equal intervals; the rows of each run are evenly spaced."""
    alike: dict[bytes, list[int]] = {}
    for row, interval in enumerate(np.concatenate((lo, hi), axis=1)):
        alike.setdefault(interval.tobytes(), []).append(row)
    runs = []
    for rows in alike.values():
        run = range(rows[0], rows[0] + 1)
        for row in rows[1:]:
            if len(run) == 1 or row == run[-1] + run.step:
                run = range(run.start, row + 1, row - run[-1])
            else:
                runs.append(run)
                run = range(row, row + 1)
        runs.append(run)
    return runs


def _cut(lo: np.ndarray, hi: np.ndarray, shape: Shape) -> list[Piece]:
    """The cheapest pieces: cut each run of equal rows separately, or all rows at the same positions, or nothing.

    Ordered from the last queries to the first, so that of a causal document's blocks, the one with the keys of all
    others comes first.
    """
    runs = _runs_of_equal_rows(lo, hi)
    candidates, together, first = [*runs, range(shape.rows)], len(runs), [run.start for run in runs]
    # The least and greatest bounds of a candidate's rows, (candidates, Tq); the rows of a run are equal.
    bounds = [
        np.concatenate((bound[first], extreme(bound, axis=0, keepdims=True)))
        for bound, extreme in ((lo, np.min), (lo, np.max), (hi, np.min), (hi, np.max))
    ]
    lo_min, _, _, hi_max = bounds
    cuts = _cut_positions(lo_min, hi_max, shape)
    # [c, i, j]: the first key, and one past the last, that candidate c's queries from cut i to cut j + 1 see.
    seen_from, seen_to = _over_cells(np.minimum, lo_min, cuts), _over_cells(np.maximum, hi_max, cuts)
    queries = cuts[:, None, 1:] - cuts[:, :-1, None]
    cost = _cost(queries, seen_to - seen_from, np.array([len(rows) for rows in candidates])[:, None, None], shape)
    best, came_from = _cheapest_paths(cost)
    kind_of_all: Kind = "masked"
    if len(runs) == 1:
        kind_of_all = _kinds(bounds, *np.array([[together], [0], [shape.queries]])).item()
    one_call = _cost_of_one_call(kind_of_all, shape) * (1 - LEAST_SAVING) <= min(best[:-1].sum(), best[-1])
    if one_call:
        came_from[together][-1] = 0

    chosen = []
    for c in [together] if one_call or best[-1] <= best[:-1].sum() else range(together):
        end = len(came_from[c]) - 1
        while end:
            chosen.append((c, came_from[c][end], end))
            end = came_from[c][end]
    of, begins, ends = np.array(chosen).T
    starts, stops = cuts[of, begins], cuts[of, ends]
    seen = (seen_from[of, begins, ends - 1], seen_to[of, begins, ends - 1])
    columns = (starts, stops, *seen, _kinds(bounds, of, starts, stops))
    lowest_key = [shape.keys] * len(candidates)
    pieces = []
    for (c, _, _), start, stop, key, last_key, kind in zip(chosen, *(x.tolist() for x in columns), strict=True):
        if key >= last_key:
            continue  # blind queries only
        rows, first_on_keys = candidates[c], last_key <= lowest_key[c]
        lowest_key[c] = min(lowest_key[c], key)
        at_once = len(rows) if one_call else int(_rows_at_once(max(stop - start, last_key - key), shape))
        for i in range(0, len(rows), at_once):
            some = rows[i : i + at_once]
            part = slice(some.start, some.stop, some.step), slice(start, stop)
            bias = _bias(lo[part], hi[part], (key, last_key), kind, shape)
            pieces.append(Piece(some, (start, stop), (key, last_key), kind, first_on_keys, bias))
    return pieces


def _kinds(bounds: list[np.ndarray], of: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> np.ndarray:
    """The kinds (see ``Piece``) of runs of queries ``[starts, stops)`` of the candidates ``of``."""
    lo_min, lo_max, hi_min, hi_max = bounds
    unequal = (lo_min != lo_max) | (hi_min != hi_max)
    moved = (np.diff(lo_min, axis=1, prepend=lo_min[:, :1]) != 0) | unequal
    step = np.diff(hi_min, axis=1, prepend=hi_min[:, :1])
    # How many queries, up to each, break the pattern of a full piece, or of a causal one.
    full, causal = ((moved | (step != by)).cumsum(axis=1) for by in (0, 1))
    full, causal = ((breaks[of, stops - 1] == breaks[of, starts]) & ~unequal[of, starts] for breaks in (full, causal))
    return np.where(full, "full", np.where(causal, "causal", "masked"))


def _over_cells(extreme: np.ufunc, bound: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """[c, i, j]: the extreme of candidate c's bounds (candidates, Tq) from cut i to cut j + 1; 0 where j < i."""
    count, cells = len(cuts), cuts.shape[1] - 1
    begins = cuts[:, :-1] + bound.shape[1] * np.arange(count)[:, None]
    values = extreme.reduceat(bound.ravel(), begins.ravel()).reshape(count, 1, cells)
    later = np.tri(cells, dtype=bool).T
    neutral = np.iinfo(values.dtype).max if extreme is np.minimum else 0
    return extreme.accumulate(np.where(later, values, neutral), axis=2) * later


def _cheapest_paths(cost: np.ndarray) -> tuple[np.ndarray, list[list[int]]]:
    """For each candidate of ``cost`` (candidates, i, j): the cost of the cheapest path from the first cut to the last,
    and for each cut its predecessor on the cheapest path to it."""
    count, cells, _ = cost.shape
    best, came_from = np.zeros((count, cells + 1)), np.zeros((count, cells + 1), np.int64)
    each = np.arange(count)
    for end in range(1, cells + 1):
        total = best[:, :end] + cost[:, :end, end - 1]
        came_from[:, end] = total.argmin(1)
        best[:, end] = total[each, came_from[:, end]]
    return best[:, -1], came_from.tolist()


def _cut_positions(lo: np.ndarray, hi: np.ndarray, shape: Shape) -> np.ndarray:
    """(candidates, cells + 1): 0, a grid of queries, Tq. Cuts move to nearby ones that separate no key's queries."""
    grain = max(FINEST_GRAIN, -(-shape.queries // MOST_CUTS))
    cells = max(1, shape.queries // grain)
    seen_before = np.maximum.accumulate(hi, axis=1)[:, :-1]
    needed_after = np.minimum.accumulate(lo[:, ::-1], axis=1)[:, ::-1][:, 1:]
    clean = np.zeros((len(lo), (cells + 1) * grain), bool)
    clean[:, 1 : shape.queries] = seen_before <= needed_after
    # Interior cut n lies in the window of one grain around n * grain.
    windows = clean[:, grain // 2 : grain // 2 + (cells - 1) * grain].reshape(len(lo), cells - 1, grain)
    grid = np.arange(1, cells) * grain
    inside = np.where(windows.any(2), grid - grain + grain // 2 + windows.argmax(2), grid)
    return np.pad(inside, ((0, 0), (1, 1)), constant_values=((0, 0), (0, shape.queries)))


def _cost(queries: np.ndarray, keys: np.ndarray, rows: np.ndarray, shape: Shape) -> np.ndarray:
    """The estimated cost of pieces, including copies; 0 where there are no keys."""
    keys = np.maximum(keys, 0)
    calls = -(-rows // _rows_at_once(np.maximum(queries, keys), shape))
    tokens = (queries + keys) * (TOKEN_COST_PER_WIDTH * shape.width)
    cost = CALL_COST * calls + _head_calls(rows, shape) * (tokens + _cost_of_head(queries, keys, queries * keys, shape))
    return np.where(keys > 0, cost, 0.0)


def _cost_of_one_call(kind: Kind, shape: Shape) -> float:
    """The estimated cost of a single call for everything, whose results need not be copied."""
    queries, keys, pairs = (np.array(float(x)) for x in (shape.queries, shape.keys, shape.queries * shape.keys))
    causal = kind == "causal" and queries == keys
    if causal:  # the flag skips what lies beyond the kernel's blocks of 512 keys
        pairs *= min(1.0, 0.5 + 256 / shape.keys)
    mask = 0.0 if causal or kind == "full" else MASK_COST * pairs
    head = _cost_of_head(queries, keys, pairs, shape) + mask
    return float(CALL_COST + _head_calls(np.array(shape.rows), shape) * head)


def _cost_of_head(queries: np.ndarray, keys: np.ndarray, pairs: np.ndarray, shape: Shape) -> np.ndarray:
    block = np.where(queries < 192, 32, np.where(queries < 768, 64, 256))  # as PyTorch's kernel chooses
    blocks = -(-queries // block) * (BLOCK_COST + BLOCK_COST_PER_KEY * shape.width * keys)
    return blocks + pairs * (PAIR_COST + PAIR_COST_PER_WIDTH * shape.width)


def _head_calls(rows: np.ndarray, shape: Shape) -> np.ndarray:
    """How many query heads a thread computes, one after another."""
    return -(-rows * shape.heads // shape.threads) * shape.groups


def _rows_at_once(longest: np.ndarray | int, shape: Shape) -> np.ndarray:
    return np.maximum(1, LARGEST_RESULT // np.maximum(1, longest * shape.heads * shape.groups * shape.width))


def _bias(lo: np.ndarray, hi: np.ndarray, keys: Span, kind: Kind, shape: Shape) -> Tensor | None:
    """The mask that PyTorch's kernel adds to the scores of a piece with the intervals lo, hi (rows, queries)."""
    count, seen = lo.shape[1], keys[1] - keys[0]
    if kind == "full" or (kind == "causal" and count == seen):
        return None
    if kind == "causal":
        return _causal_bias(count, seen, shape.dtype, shape.device)
    key = np.arange(*keys, dtype=np.int32)
    hidden = (key < lo[..., None]) | (hi[..., None] <= key)
    bias = np.where(hidden, np.float32(-np.inf), np.float32(0.0))
    return torch.from_numpy(bias)[:, None].to(shape.device, shape.dtype)


def _causal_bias(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(1, 1, queries, keys) in which the last query sees all keys and each before it one less: a view of a strip."""
    earlier = keys - queries
    height, width = (1 << (x - 1).bit_length() for x in (queries, max(earlier, 1)))
    return _strip(height, width, dtype, device).as_strided(
        (1, 1, queries, keys), (0, 0, width + height, 1), width - earlier
    )


@lru_cache(maxsize=8)
def _strip(height: int, width: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(height, width + height): row ``i`` is 0 up to column ``width + i``, then -inf."""
    return torch.full((height, width + height), -math.inf, dtype=dtype, device=device).triu_(width + 1)


def _fresh(like: Tensor, filled_later: bool) -> Tensor:
    make = torch.empty if filled_later else torch.zeros
    return make(like.shape, dtype=like.dtype, device=like.device)


def _part(x: Tensor, rows: range, span: Span) -> Tensor:
    row, position, head, _ = x.stride()
    size = (len(rows), x.shape[2], span[1] - span[0], x.shape[3])
    offset = x.storage_offset() + rows.start * row + span[0] * position
    return x.as_strided(size, (row * rows.step, head, position, 1), offset)


def _attend(q: Tensor, k: Tensor, v: Tensor, piece: Piece, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """out (R, H, n, D) and lse (R, H, n) of one piece: q (R, H, n, D) with k, v (R, Hkv, m, D)."""
    if q.device.type == "cpu" and not softcap:
        return _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, piece.causal_flag, attn_mask=piece.bias, scale=scale
        )
    queries, keys, values = _grouped(k.shape[1], q, k, v)
    scores, _ = _scores(queries, keys, piece, scale, softcap)
    lse = scores.logsumexp(-1, keepdim=True)
    out = scores.sub_(lse.masked_fill(lse.isneginf(), 0.0)).exp_() @ values
    return out.view(q.shape).to(q.dtype), lse.view(q.shape[:-1])


def _differentiate(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, piece: Piece, scale: float, cap: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v of one piece, shaped as in ``_attend`` (Dao et al. 2022, FlashAttention, B.2)."""
    if q.device.type == "cpu" and not cap:
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, piece.causal_flag, attn_mask=piece.bias, scale=scale
        )
    grad, queries, keys, values, outputs = _grouped(k.shape[1], grad_out, q, k, v, out)
    scores, slope = _scores(queries, keys, piece, scale, cap)
    probabilities = scores.sub_(lse.reshape(*queries.shape[:-1], 1)).exp_()
    grad_v = probabilities.transpose(-1, -2) @ grad
    grad_scores = (grad @ values.transpose(-1, -2)).sub_((grad * outputs).sum(-1, keepdim=True)).mul_(probabilities)
    if slope is not None:
        grad_scores.mul_(slope)
    grad_q = (grad_scores.mul_(scale) @ keys).view(q.shape)
    grad_k = grad_scores.transpose(-1, -2) @ queries
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


def _grouped(heads: int, *tensors: Tensor) -> list[Tensor]:
    """(R, heads * G, n, D) as (R, heads, G * n, D), in at least float32: queries that share a key head become
    contiguous, so that one product computes them and sums their gradients."""
    precise = torch.promote_types(tensors[0].dtype, torch.float32)
    return [x.to(precise).reshape(x.shape[0], heads, -1, x.shape[-1]) for x in tensors]


def _scores(q: Tensor, k: Tensor, piece: Piece, scale: float, softcap: float) -> tuple[Tensor, Tensor | None]:
    """Masked scores (R, Hkv, G * n, m), and with a softcap their derivative by the scores before it."""
    scores, slope = (q @ k.transpose(-1, -2)).mul_(scale), None
    if softcap:
        squashed = torch.tanh(scores / softcap)
        scores, slope = squashed * softcap, 1 - squashed * squashed
    bias, count = piece.bias, piece.queries[1] - piece.queries[0]
    if piece.causal_flag:
        bias = _causal_bias(count, count, scores.dtype, scores.device)
    if bias is not None:
        scores.unflatten(2, (-1, count)).add_(bias[:, :, None])
    return scores, slope
