"""Examples as sequences of tokens, packed into rows without padding, and one vector per sequence.

A sequence begins with the end-of-text token, as every document did in training, or as an imported tokenizer says
(``Tokenizer.begun``). A pair of texts that is read together has an end-of-text token between the texts and counts as
one document, so that each text sees the other. Sequences in the same row never see each other, so the result for one
does not depend on its neighbors.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.data.batch import Batch, assemble
from lm.data.packing import best_fit


def sequence_of(
    texts: Sequence[Sequence[int]], begin: int | None, end_of_text: int, context_length: int
) -> tuple[list[int], bool]:
    """Return a text or a pair of texts as one sequence, and whether it was cut to ``context_length``.

    ``begin`` is a tokenizer's ``begin_id``; without one, an empty text is an ``end_of_text``, as a row needs a token.
    In a pair the longer text is cut first, until both are equally long.
    """
    start = [] if begin is None else [begin]
    left = context_length - len(start) - (len(texts) - 1)
    kept = [len(text) for text in texts]
    cut = sum(kept) > left
    if cut:
        for rank, number in enumerate(sorted(range(len(texts)), key=kept.__getitem__)):  # the shortest first
            kept[number] = min(kept[number], left // (len(texts) - rank))
            left -= kept[number]
    row: list[int] = []
    for text, length in zip(texts, kept, strict=True):
        row += [end_of_text, *text[:length]]
    return [*start, *row[1:]] or [end_of_text], cut


@dataclass(frozen=True)
class PackedSequences:
    """Sequences in the rows of a batch.

    Sequence ``numbers[n]`` occupies the positions ``first[n]`` to ``last[n]``, inclusive, of row ``rows[n]``; all four
    arrays are int64 (sequences,).
    """

    batch: Batch
    numbers: NDArray[np.int64]
    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]


def packed(
    sequences: Sequence[Sequence[int]], reads: str, end_of_text: int, context_length: int, rows: int
) -> Iterator[PackedSequences]:
    """Pack sequences of at most ``context_length`` tokens by best-fit decreasing, ``rows`` rows per batch."""
    row_of = best_fit(np.array([len(sequence) for sequence in sequences], dtype=np.int64), context_length)
    order = np.argsort(row_of, kind="stable")
    borders = np.searchsorted(row_of[order], np.arange(0, row_of.max(initial=-1) + 1 + rows, rows))
    for start, stop in itertools.pairwise(borders):
        if stop > start:
            yield fill_rows(sequences, order[start:stop], row_of[order[start:stop]], reads, end_of_text)


def fill_rows(
    sequences: Sequence[Sequence[int]],
    numbers: NDArray[np.int64],
    rows: NDArray[np.int64],
    reads: str,
    end_of_text: int,
) -> PackedSequences:
    """Build the batch in which sequence ``numbers[n]`` stands in row ``rows[n]``, in the order given.

    ``rows`` (sequences,) ascends without gaps; the first becomes row 0. Unused positions hold ``end_of_text``. The
    model reads "causal" or "bidirectional", as ``reads`` says.
    """
    rows = rows - rows[0]
    lengths = np.array([len(sequences[n]) for n in numbers], dtype=np.int64)
    filled = np.bincount(rows, weights=lengths).astype(np.int64)
    before = np.cumsum(lengths) - lengths  # as if all rows were one
    first = before - (np.cumsum(filled) - filled)[rows]
    inputs = np.full((len(filled), filled.max()), end_of_text, dtype=np.int64)
    starts = np.zeros(inputs.shape, dtype=bool)
    for number, row, position, length in zip(numbers, rows, first, lengths, strict=True):
        inputs[row, position : position + length] = sequences[number]
    starts[rows, first] = True
    unused = np.zeros(inputs.shape, dtype=np.float32)
    batch = assemble(inputs, inputs, unused, starts, np.full(len(filled), reads == "bidirectional"), filled)
    return PackedSequences(batch, numbers, rows, first, first + lengths - 1)


def pooled(hidden: Tensor, packed: PackedSequences, pooling: str) -> Tensor:
    """Return one vector per sequence, in the order of ``packed.numbers``: (sequences, hidden).

    ``hidden`` (rows, T, hidden) holds the hidden states of ``packed.batch``. "last" takes the last position; "mean"
    averages over all positions of a sequence, including the end-of-text token at its start, where the first word is
    predicted.
    """
    rows = torch.from_numpy(packed.rows).to(hidden.device)
    if pooling == "last":
        return hidden[rows, torch.from_numpy(packed.last).to(hidden.device)]
    # A matrix product computes the means: unlike a scattered sum, its gradient is deterministic on a GPU.
    within = np.arange(len(rows)) - np.searchsorted(packed.rows, packed.rows)
    positions = np.arange(hidden.shape[1])
    inside = (packed.first[:, None] <= positions) & (positions <= packed.last[:, None])
    average = np.zeros((hidden.shape[0], int(within.max()) + 1, hidden.shape[1]), dtype=np.float32)
    average[packed.rows, within] = inside / inside.sum(1, keepdims=True)
    means = torch.from_numpy(average).to(hidden.device, hidden.dtype) @ hidden
    return means[rows, torch.from_numpy(within).to(hidden.device)]
