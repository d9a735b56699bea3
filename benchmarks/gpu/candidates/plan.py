"""What the candidate kernels read of the masks: made once a batch, for all heads, all layers and both passes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PADDING = 128  # padded lengths are multiples of this, the largest block of queries


@dataclass(frozen=True)
class Plan:
    """Key intervals and query intervals, all int32.

    ``lo`` and ``hi`` (rows, padded queries): the keys that a query sees; 0 and 0 if it sees none, and for padding.
    ``query_lo`` and ``query_hi`` (rows, padded keys): the queries that see a key. Queries that see nothing may be among
    them.
    """

    lo: Tensor
    hi: Tensor
    query_lo: Tensor
    query_hi: Tensor
    queries: int
    keys: int

    def tiles(self, block_m: int, block_n: int) -> Tensor:
        """For each block of queries: its first key, its tiles of keys, and which of them, [left, right), need no mask.

        int32 (rows, blocks, 4). Tiles before ``left`` need both bounds, those from ``right`` only the upper one.
        """
        rows = len(self.lo)
        blocks = -(-self.queries // block_m)
        lo, hi = (x[:, : blocks * block_m].view(rows, blocks, block_m) for x in (self.lo, self.hi))
        seeing = lo < hi
        inside = torch.arange(blocks * block_m, device=lo.device).view(blocks, block_m) < self.queries
        first = torch.where(seeing, lo, self.keys).amin(2)
        end = hi.amax(2)
        full_first = lo.amax(2)
        full_end = torch.where(inside, hi, self.keys).amin(2)
        count = ((end - first).clamp(min=0) + block_n - 1) // block_n
        left = torch.minimum(((full_first - first).clamp(min=0) + block_n - 1) // block_n, count)
        right = torch.minimum(torch.maximum((full_end - first).clamp(min=0) // block_n, left), count)
        return torch.stack((first, count, left, right), -1).to(torch.int32).contiguous()


def make_plan(lo: Tensor, hi: Tensor, keys: int) -> Plan:
    """The plan of a batch, from its key intervals ``lo`` and ``hi`` (rows, queries), int32, and the number of keys.

    Raises:
        ValueError: a bound decreases along a row (of the queries that see anything), so that the queries that see a
            key are not contiguous. The library's kernels take such masks; these do not.
    """
    queries = lo.shape[1]
    lo, hi = lo.clamp(min=0), hi.clamp(max=keys)
    lo, hi = (torch.where(lo < hi, x, 0) for x in (lo, hi))
    # A query that sees nothing takes the bounds of the last one that does.
    last_lo, last_hi = (x.cummax(1).values for x in (lo, hi))
    if ((lo < hi) & ((last_lo > lo) | (last_hi > hi))).any():
        raise ValueError("a bound of the key intervals decreases along a row")
    each_key = torch.arange(keys, dtype=torch.int32, device=lo.device).expand(len(lo), keys).contiguous()
    query_lo = torch.searchsorted(last_hi.contiguous(), each_key, right=True, out_int32=True)
    query_hi = torch.searchsorted(last_lo.contiguous(), each_key, right=True, out_int32=True)
    # No query sees the keys of the padding: their interval is empty, and after those of all others.
    query_lo, query_hi = (padded(x, keys, fill=queries) for x in (query_lo, query_hi))
    return Plan(padded(lo, queries), padded(hi, queries), query_lo, query_hi, queries, keys)


def padded_length(length: int) -> int:
    return -(-length // PADDING) * PADDING


def padded(bounds: Tensor, length: int, fill: int = 0) -> Tensor:
    return F.pad(bounds, (0, padded_length(length) - length), value=fill).contiguous()
