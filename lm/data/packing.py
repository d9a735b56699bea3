"""Packing: which whole documents, or parts of long ones, share a row of ``context_length`` positions.

A document longer than a row is cut into fragments of a whole row and a remainder. Everything shorter than a row is
packed by best-fit decreasing (Johnson 1973; used for language models by Ding et al. 2024, "Fewer truncations improve
language modeling"): the longest first, each into the row where it leaves the least room. No document that fits into a
row is cut, and every token is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.shards.tokens import Split

# Documents that are packed together: bounds the memory, at no visible loss.
BLOCK_DOCUMENTS = 2**20


@dataclass(frozen=True)
class PackingPlan:
    """Row r holds fragments ``first[r]`` to ``first[r + 1]``, of ``lengths`` tokens from ``starts`` in the stream.

    All three are flat arrays: ``first`` int64 (rows + 1,), ``starts`` int64 and ``lengths`` int32 (fragments,).
    """

    first: NDArray[np.int64]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int32]

    @property
    def rows(self) -> int:
        return len(self.first) - 1

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + self.starts.nbytes + self.lengths.nbytes


def plan_rows(split: Split, start: int, stop: int, context_length: int) -> PackingPlan:
    """The plan for the documents of ``split`` between the tokens ``start`` and ``stop``; reads their lengths only."""
    blocks = [_plan_block(starts, lengths, context_length) for starts, lengths in _document_blocks(split, start, stop)]
    sizes, starts, lengths = (np.concatenate(arrays) for arrays in zip(*blocks, strict=True))
    return PackingPlan(np.concatenate([[0], np.cumsum(sizes)]), starts, lengths.astype(np.int32))


def _document_blocks(split: Split, start: int, stop: int) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """First token and number of tokens of each document, at most ``BLOCK_DOCUMENTS`` at a time."""
    waiting: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    count = shard_start = 0
    for record in split.records:
        shard_stop = shard_start + record.tokens
        if start < shard_stop and shard_start < stop:
            lengths = split.shard_lengths(record).astype(np.int64)
            starts = shard_start + np.cumsum(lengths) - lengths
            inside = (starts >= start) & (starts < stop)
            waiting.append((starts[inside], lengths[inside]))
            count += len(waiting[-1][0])
        shard_start = shard_stop
        if count >= BLOCK_DOCUMENTS or shard_stop >= stop:
            starts, lengths = (np.concatenate(arrays) for arrays in zip(*waiting, strict=True))
            for first in range(0, count, BLOCK_DOCUMENTS):
                yield starts[first : first + BLOCK_DOCUMENTS], lengths[first : first + BLOCK_DOCUMENTS]
            waiting, count = [], 0
        if shard_stop >= stop:
            return


def _plan_block(
    starts: NDArray[np.int64], lengths: NDArray[np.int64], context_length: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Return the number of fragments of each row, and first token and number of tokens of each fragment."""
    whole, rest = np.divmod(lengths, context_length)
    # Fragments that fill a row: as many of each document as it has.
    of_document = np.repeat(np.arange(len(lengths)), whole)
    number_within = np.arange(len(of_document)) - np.repeat(np.cumsum(whole) - whole, whole)
    full_starts = starts[of_document] + number_within * context_length

    has_rest = rest > 0
    rest_starts, rests = (starts + whole * context_length)[has_rest], rest[has_rest]
    rows = best_fit(rests, context_length)
    by_row = np.argsort(rows, kind="stable")
    return (
        np.concatenate([np.ones(len(full_starts), dtype=np.int64), np.bincount(rows)]),
        np.concatenate([full_starts, rest_starts[by_row]]),
        np.concatenate([np.full(len(full_starts), context_length), rests[by_row]]),
    )


def best_fit(lengths: NDArray[np.int64], capacity: int) -> NDArray[np.int64]:
    """Pack items of these lengths (each from 1 to ``capacity``) by best-fit decreasing; returns each item's row.

    Items of one length, and rows with the same room left, are interchangeable, so they move together: the work grows
    with the number of different lengths, hardly with the number of items.
    """
    order = np.argsort(-lengths, kind="stable")  # items in the order in which they are packed
    rows = np.empty(len(lengths), dtype=np.int64)
    room_left: dict[int, list[NDArray[np.int64]]] = defaultdict(list)  # rows by the room they have left
    rooms = 0  # bit r is set if a row has room r
    opened = position = 0
    values, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                candidates = np.concatenate(room_left.pop(room))
                rooms ^= 1 << room
            else:
                room = capacity
                needed = -(-count // (capacity // length))
                candidates = np.arange(opened, opened + needed)
                opened += needed
            # The fullest row that fits stays the fullest, so it takes as many as it can before the next one.
            each = room // length
            filled = min(len(candidates), count // each)
            extra = count % each if filled < len(candidates) else 0
            taken = np.concatenate(
                [np.repeat(candidates[:filled], each), np.repeat(candidates[filled : filled + 1], extra)]
            )
            rows[order[position : position + len(taken)]] = taken
            position += len(taken)
            count -= len(taken)
            touched = filled + (extra > 0)
            for some, left in (
                (candidates[:filled], room - each * length),
                (candidates[filled:touched], room - extra * length),
                (candidates[touched:], room),
            ):
                if len(some) and left:
                    room_left[left].append(some)
                    rooms |= 1 << left
    return rows
