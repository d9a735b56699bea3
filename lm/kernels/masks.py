"""Key intervals: the one form of every attention mask.

A mask is two int32 tensors ``lo`` and ``hi`` of shape (rows, queries): query ``i`` of row ``b`` sees the keys ``j``
with ``lo[b, i] <= j < hi[b, i]``. Causal, bidirectional, packed documents, windows, prefixes and padding are all of
this form, and neither bound ever decreases along a row.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def causal(
    rows: int, queries: int, *, past: int = 0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Query ``i`` sees the ``past`` cached keys and the keys up to its own: ``[0, past + i + 1)``."""
    hi = torch.arange(past + 1, past + queries + 1, dtype=torch.int32, device=device).expand(rows, queries)
    return torch.zeros_like(hi), hi


def bidirectional(rows: int, queries: int, *, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
    """Every query sees every key."""
    lo = torch.zeros(rows, queries, dtype=torch.int32, device=device)
    return lo, torch.full_like(lo, queries)


def document_bounds(starts: Tensor) -> tuple[Tensor, Tensor]:
    """First position, and one past the last, of the document that each position belongs to.

    ``starts`` is bool (rows, T), true where a document begins; position 0 always begins one.
    """
    first, end = _document_bounds(starts.cpu().numpy())
    return torch.from_numpy(first).to(starts.device), torch.from_numpy(end).to(starts.device)


def _document_bounds(starts: NDArray[np.bool_]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """In NumPy: quicker than PyTorch's scans, and the loader's thread keeps off the threads that compute."""
    flags = starts.copy()
    flags[:, :1] = True
    begins = np.flatnonzero(flags)  # over all rows, laid end to end
    lengths = np.empty_like(begins)
    lengths[:-1] = begins[1:] - begins[:-1]
    lengths[-1:] = flags.size - begins[-1:]
    within = (begins % flags.shape[1]).astype(np.int32)
    first = np.repeat(within, lengths).reshape(flags.shape)
    end = np.repeat(within + lengths.astype(np.int32), lengths).reshape(flags.shape)
    return first, end


def packed(starts: Tensor, both_ways: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Documents packed into rows, none seeing another.

    Args:
        starts: bool (rows, T), true where a document begins.
        both_ways: bool (rows,), rows that are read bidirectionally; the others are causal.
        lengths: (rows,) positions that hold documents; the ones after them see nothing and are seen by nobody. None:
            all do.
    """
    both = both_ways.cpu().numpy()
    lo, end = _document_bounds(starts.cpu().numpy())
    places = np.arange(starts.shape[1], dtype=np.int32)
    hi = np.empty_like(lo)
    hi[:] = places + 1
    hi[both] = end[both]
    if lengths is not None:
        limit = lengths.cpu().numpy().astype(np.int32)[:, None]
        lo, hi = np.where(places < limit, lo, limit), np.minimum(hi, limit)
    return torch.from_numpy(lo).to(starts.device), torch.from_numpy(hi).to(starts.device)


def sliding_window(lo: Tensor, hi: Tensor, window: int, *, past: int = 0) -> tuple[Tensor, Tensor]:
    """Narrow intervals to the keys less than ``window`` positions away, to either side that was visible."""
    here = torch.arange(past, past + lo.shape[1], dtype=torch.int32, device=lo.device)
    return torch.maximum(lo, here - (window - 1)), torch.minimum(hi, here + window)


def prefix(rows: int, queries: int, prefix_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """The first ``prefix_lengths`` (rows,) positions see each other both ways; the rest is causal."""
    lo, hi = causal(rows, queries, device=prefix_lengths.device)
    return lo, torch.maximum(hi, prefix_lengths.to(torch.int32)[:, None])


def padding(queries: int, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Bidirectional over the first ``lengths`` (rows,) positions; padding is seen by nobody and sees the same keys."""
    hi = lengths.to(torch.int32)[:, None].expand(len(lengths), queries)
    return torch.zeros_like(hi), hi


def dense(lo: Tensor, hi: Tensor, keys: int) -> Tensor:
    """The same mask as bool (rows, queries, keys), true where a query sees a key."""
    j = torch.arange(keys, dtype=torch.int32, device=lo.device)
    return (lo[..., None] <= j) & (j < hi[..., None])
