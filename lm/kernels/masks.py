"""Attention masks, all in one form: key intervals.

A mask is two int32 tensors ``lo`` and ``hi`` of shape (rows, queries): query ``i`` of row ``b`` sees the keys ``j``
with ``lo[b, i] <= j < hi[b, i]``. Causal and bidirectional attention, packed documents, sliding windows, prefixes and
padding all have this form, and neither bound ever decreases along a row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def causal(
    rows: int, queries: int, *, past: int = 0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Query ``i`` sees the ``past`` cached keys and all keys up to its own: ``[0, past + i + 1)``."""
    hi = torch.arange(past + 1, past + queries + 1, dtype=torch.int32, device=device).expand(rows, queries)
    return torch.zeros_like(hi), hi


def bidirectional(rows: int, queries: int, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Every query sees every key."""
    lo = torch.zeros(rows, queries, dtype=torch.int32, device=device)
    return lo, torch.full_like(lo, queries)


def _document_bounds(starts: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The first position of each position's document, and one past its last: int32 (rows, T).

    In NumPy, which is faster here than PyTorch's scans and keeps the loader off the threads that compute.
    """
    flags = starts.copy()
    flags[:, :1] = True
    begins = np.flatnonzero(flags)  # in all rows, concatenated
    lengths = np.diff(begins, append=flags.size)
    within = (begins % flags.shape[1]).astype(np.int32)
    first = np.repeat(within, lengths).reshape(flags.shape)
    end = np.repeat(within + lengths.astype(np.int32), lengths).reshape(flags.shape)
    return first, end


def packed(starts: Tensor, bidirectional_rows: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Documents packed into rows; no document sees another.

    Args:
        starts: bool (rows, T), true where a document begins; position 0 always begins one.
        bidirectional_rows: bool (rows,), true for bidirectional rows; the others are causal.
        lengths: int (rows,), how many positions hold documents; those after them see nothing and are never seen.
            None: all positions hold documents.
    """
    lo, end = _document_bounds(starts.cpu().numpy())
    positions = np.arange(starts.shape[1], dtype=np.int32)
    hi = np.where(bidirectional_rows.cpu().numpy()[:, None], end, positions + 1)
    if lengths is not None:
        limit = lengths.cpu().numpy().astype(np.int32)[:, None]
        lo, hi = np.where(positions < limit, lo, limit), np.minimum(hi, limit)
    return torch.from_numpy(lo).to(starts.device), torch.from_numpy(hi).to(starts.device)


def sliding_window(lo: Tensor, hi: Tensor, window: int, *, past: int = 0) -> tuple[Tensor, Tensor]:
    """Narrow intervals to keys less than ``window`` positions away. Query ``i`` is at position ``past + i``."""
    here = torch.arange(past, past + lo.shape[1], dtype=torch.int32, device=lo.device)
    return torch.maximum(lo, here - (window - 1)), torch.minimum(hi, here + window)


def prefix(rows: int, queries: int, prefix_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The first ``prefix_lengths`` (rows,) positions see each other in both directions; the rest are causal."""
    lo, hi = causal(rows, queries, device=prefix_lengths.device)
    return lo, torch.maximum(hi, prefix_lengths.to(torch.int32)[:, None])


def dense(lo: Tensor, hi: Tensor, keys: int) -> Tensor:
    """The mask as bool (rows, queries, keys), true where a query sees a key."""
    j = torch.arange(keys, dtype=torch.int32, device=lo.device)
    return (lo[..., None] <= j) & (j < hi[..., None])
