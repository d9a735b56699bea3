"""A batch: the rows of one forward pass, and the rows of tokens that it is made from."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.kernels import masks

IGNORED = -100


@dataclass(frozen=True)
class Vocabulary:
    """The ids that objectives need to know."""

    size: int
    end_of_text: int
    mask: int


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass; every tensor is (rows, T) except ``masked`` (rows,).

    ``targets`` is -100 where nothing is predicted. ``loss_weights`` already hold the normalisation of the whole
    optimizer step: the step's loss is the plain sum of weight × cross-entropy over all of its micro-batches.
    ``masked`` tells the rows that are read both ways, which come last.
    """

    inputs: Tensor
    targets: Tensor
    loss_weights: Tensor
    positions: Tensor
    lo: Tensor
    hi: Tensor
    masked: Tensor

    def rows(self, start: int, stop: int) -> Batch:
        """A micro-batch: the rows from ``start`` to ``stop``."""
        return Batch(*(getattr(self, f.name)[start:stop] for f in fields(self)))

    def every(self, first: int, step: int) -> Batch:
        """One rank's part: every ``step``-th row from ``first`` on, so that the kinds of rows are shared out evenly."""
        return Batch(*(getattr(self, f.name)[first::step].contiguous() for f in fields(self)))

    def to(self, device: torch.device) -> Batch:
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))


@dataclass(frozen=True)
class Rows:
    """What the loader read, before an objective prepares it: rows of T places, each token the target of its place.

    ``inputs`` and ``targets`` are int64 (rows, T), the input being the token before the target; ``starts`` is bool
    (rows, T), true where a document or a part of one begins; ``lengths`` (rows,) says how many places are used, the
    places after them hold ends of text.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    starts: NDArray[np.bool_]
    lengths: NDArray[np.int64]


def rows_of_windows(windows: NDArray[np.int64], vocabulary: Vocabulary) -> Rows:
    """Rows that are windows of the stream, (rows, T + 1) tokens, with a document beginning at each end of text."""
    inputs = windows[:, :-1]
    starts = inputs == vocabulary.end_of_text
    starts[:, 0] = True
    return Rows(inputs, windows[:, 1:], starts, np.full(len(inputs), inputs.shape[1]))


def assemble(
    inputs: NDArray[np.int64],
    targets: NDArray[np.int64],
    weights: NDArray[np.float32],
    starts: NDArray[np.bool_],
    masked: NDArray[np.bool_],
    lengths: NDArray[np.int64] | None = None,
) -> Batch:
    """Tensors of a batch whose documents begin where ``starts`` is true; rows in ``masked`` are read both ways.

    Places from a row's ``lengths`` on (None: no row has any) see nothing and are seen by nobody.
    """
    both_ways = torch.from_numpy(masked)
    lo, hi = masks.packed(torch.from_numpy(starts), both_ways, None if lengths is None else torch.from_numpy(lengths))
    positions = torch.from_numpy(np.arange(inputs.shape[1], dtype=np.int32) - lo.numpy())
    return Batch(
        torch.from_numpy(np.ascontiguousarray(inputs)),
        torch.from_numpy(np.ascontiguousarray(targets)),
        torch.from_numpy(weights),
        positions,
        lo,
        hi,
        both_ways,
    )
