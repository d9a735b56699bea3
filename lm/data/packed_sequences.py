"""Examples as sequences of tokens, packed into rows without padding, and one vector of each.

A sequence begins, as every document did in training, with the end-of-text token; a pair of texts that is read together
has another one between them and is one document, so that each text sees the other. Sequences of one row never see each
other: what the model makes of one does not depend on those beside it.
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

READINGS = ("causal", "bidirectional")
POOLINGS = ("mean", "last")


def sequence_of(texts: Sequence[Sequence[int]], end_of_text: int, context_length: int) -> tuple[list[int], bool]:
    """One sequence of the tokens of a text or a pair, and whether it had to be cut to ``context_length``.

    Of a pair the longer text is cut first, until both are equally long.
    """
    left = context_length - len(texts)
    kept = [len(text) for text in texts]
    cut = sum(kept) > left
    if cut:
        for rank, number in enumerate(sorted(range(len(texts)), key=kept.__getitem__)):  # the shortest first
            kept[number] = min(kept[number], left // (len(texts) - rank))
            left -= kept[number]
    row: list[int] = []
    for text, length in zip(texts, kept, strict=True):
        row += [end_of_text, *text[:length]]
    return row, cut


@dataclass(frozen=True)
class Packed:
    """Some sequences in the rows of a batch.

    Sequence ``numbers[n]`` takes the places ``first[n]`` to ``last[n]``, inclusive, of row ``rows[n]``; all four are
    int64 (sequences,).
    """

    batch: Batch
    numbers: NDArray[np.int64]
    rows: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]


def packed(
    sequences: Sequence[Sequence[int]], reads: str, end_of_text: int, context_length: int, rows: int
) -> Iterator[Packed]:
    """Sequences of at most ``context_length`` tokens in batches of at most ``rows`` rows, by best-fit decreasing."""
    row_of = best_fit(np.array([len(sequence) for sequence in sequences], dtype=np.int64), context_length)
    order = np.argsort(row_of, kind="stable")
    borders = np.searchsorted(row_of[order], np.arange(0, row_of.max(initial=-1) + 1 + rows, rows))
    for start, stop in itertools.pairwise(borders):
        if stop > start:
            yield _pack(sequences, order[start:stop], row_of[order[start:stop]], reads, end_of_text)


def _pack(
    sequences: Sequence[Sequence[int]],
    numbers: NDArray[np.int64],
    rows: NDArray[np.int64],
    reads: str,
    end_of_text: int,
) -> Packed:
    rows = rows - rows[0]
    lengths = np.array([len(sequences[n]) for n in numbers], dtype=np.int64)
    filled = np.bincount(rows, weights=lengths).astype(np.int64)
    before = np.cumsum(lengths) - lengths  # as if all rows were one
    first = before - (np.cumsum(filled) - filled)[rows]
    inputs = np.full((len(filled), filled.max()), end_of_text, dtype=np.int64)
    starts = np.zeros(inputs.shape, dtype=bool)
    for number, row, place, length in zip(numbers, rows, first, lengths, strict=True):
        inputs[row, place : place + length] = sequences[number]
    starts[rows, first] = True
    unused = np.zeros(inputs.shape, dtype=np.float32)
    batch = assemble(inputs, inputs, unused, starts, np.full(len(filled), reads == "bidirectional"), filled)
    return Packed(batch, numbers, rows, first, first + lengths - 1)


def pooled(hidden: Tensor, packed: Packed, pooling: str) -> Tensor:
    """One vector of each sequence, in the order of ``packed.numbers``: (sequences, hidden).

    ``hidden`` (rows, T, hidden) are the hidden states of ``packed.batch``. "mean" averages over a sequence's places,
    the end of text at its start included: it is where the first word was predicted from.
    """
    rows = torch.from_numpy(packed.rows).to(hidden.device)
    if pooling == "last":
        return hidden[rows, torch.from_numpy(packed.last).to(hidden.device)]
    # A product with a matrix that averages: its gradient, unlike that of a scattered sum, is deterministic on a GPU.
    within = np.arange(len(rows)) - np.searchsorted(packed.rows, packed.rows)
    places = np.arange(hidden.shape[1])
    inside = (packed.first[:, None] <= places) & (places <= packed.last[:, None])
    average = np.zeros((hidden.shape[0], int(within.max()) + 1, hidden.shape[1]), dtype=np.float32)
    average[packed.rows, within] = inside / inside.sum(1, keepdims=True)
    means = torch.from_numpy(average).to(hidden.device, hidden.dtype) @ hidden
    return means[rows, torch.from_numpy(within).to(hidden.device)]
