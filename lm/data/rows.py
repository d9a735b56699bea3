"""The loader: ``batch = f(seed, step)``. It has no state, so there is nothing to save and nothing to restore.

Row g of the run is found by arithmetic alone. A schedule says which text it comes from and how many rows that text has
had before (``lm.data.mixture``; with one text that is g). Each text has rows of its own: windows of ``context_length``
targets, cut anew at another offset in each epoch from the stream bent into a ring, or whole documents packed once and
for all (``lm.data.packing``). A keyed permutation per epoch gives the order in which they are visited.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shards.tokens import Dataset, Split
from lm.data.batch import Rows, Vocabulary, rows_of_windows
from lm.data.corpora import Corpora, JoinedSplit, Text
from lm.data.packing import plan_rows


def vocabulary_of(dataset: Dataset | Corpora) -> Vocabulary:
    tokenizer = dataset.tokenizer
    return Vocabulary(tokenizer.vocab_size, tokenizer.end_of_text_id, tokenizer.mask_id)


class Ring:
    """The tokens ``start`` to ``stop`` of a split, bent into a ring: before the first stands the last."""

    def __init__(self, split: Split | JoinedSplit, start: int, stop: int) -> None:
        self._split, self._start, self.tokens = split, start, stop - start

    def read_into(self, position: int, out: NDArray[np.int64]) -> None:
        """Fill ``out`` with the tokens from ``position`` on, which may be negative or beyond the end."""
        position %= self.tokens
        filled = 0
        while filled < len(out):
            count = min(len(out) - filled, self.tokens - position)
            self._split.read_into(self._start + position, out[filled : filled + count])
            filled += count
            position = 0


class Windows:
    """Rows that are windows of a text, side by side: each token is a target once an epoch, but for a short remainder.

    Each epoch begins to cut at an offset of its own.
    """

    def __init__(self, text: Text, context_length: int) -> None:
        self.ring, self.context_length = Ring(text.split, text.start, text.stop), context_length
        if self.ring.tokens <= context_length:
            raise UserError(
                f"context_length {context_length} is longer than the training text of {text.name}, "
                f"which has {self.ring.tokens:,} tokens: choose a shorter context or prepare more text"
            )
        self.per_epoch = self.ring.tokens // context_length

    def places(self, rows: NDArray[np.int64], epoch_key: int) -> NDArray[np.int64]:
        """Position in the text of the first target of these rows of an epoch."""
        return (epoch_key % self.context_length + rows * self.context_length) % self.ring.tokens

    @staticmethod
    def read(found: list[tuple[Windows, int]], context_length: int, vocabulary: Vocabulary) -> Rows:
        """The rows that begin at these places of these texts."""
        windows = np.empty((len(found), context_length + 1), dtype=np.int64)
        for window, (text, place) in zip(windows, found, strict=True):
            text.ring.read_into(place - 1, window)
        return rows_of_windows(windows, vocabulary)


class Documents:
    """Rows of whole documents: each token is a target exactly once an epoch, and nothing is cut that fits into a row.

    A fragment's first input is the token before it, which is an end of text where a document begins.
    """

    def __init__(self, text: Text, context_length: int) -> None:
        began = time.perf_counter()
        self.ring, self.context_length = Ring(text.split, text.start, text.stop), context_length
        if not self.ring.tokens:
            raise UserError(f"{text.name} has no training text: build it again with more text")
        self._start = text.start
        self.plan = plan_rows(text.split, text.start, text.stop, context_length)
        self.per_epoch = self.plan.rows
        self.seconds = time.perf_counter() - began

    def describe(self) -> str:
        """How full the rows are and what the plan costs."""
        plan = self.plan
        full = self.ring.tokens / (plan.rows * self.context_length)
        return (
            f"{len(plan.starts):,} documents and parts of long ones packed into {plan.rows:,} rows, {full:.2%} full, "
            f"in {self.seconds:.2f} s; the plan takes {plan.nbytes / 1e6:.1f} MB"
        )

    def places(self, rows: NDArray[np.int64], epoch_key: int) -> NDArray[np.int64]:
        """Number in the plan of these rows of an epoch: their own."""
        return rows

    @staticmethod
    def read(found: list[tuple[Documents, int]], context_length: int, vocabulary: Vocabulary) -> Rows:
        """These rows of these plans; places that no document fills hold ends of text."""
        shape = (len(found), context_length)
        inputs, targets = np.empty((2, *shape), dtype=np.int64)
        starts, lengths = np.zeros(shape, dtype=bool), np.empty(len(found), dtype=np.int64)
        fragment = np.empty(context_length + 1, dtype=np.int64)
        for row, (text, place) in enumerate(found):
            first, last = text.plan.first[place : place + 2].tolist()
            begin = 0
            for position, length in zip(
                text.plan.starts[first:last].tolist(), text.plan.lengths[first:last].tolist(), strict=True
            ):
                end = begin + length
                text.ring.read_into(position - text._start - 1, fragment[: length + 1])
                inputs[row, begin:end] = fragment[:length]
                targets[row, begin:end] = fragment[1 : length + 1]
                starts[row, begin] = True
                begin = end
            lengths[row] = begin
            inputs[row, begin:] = targets[row, begin:] = vocabulary.end_of_text
        return Rows(inputs, targets, starts, lengths)
