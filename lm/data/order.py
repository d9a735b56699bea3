"""The order of the data: which rows a step reads, ``f(seed, step)``, by arithmetic alone.

A schedule says which corpus row g of the run comes from, and how many rows that corpus has had before
(``lm.data.mixture``; with one corpus that is g). A keyed permutation per epoch gives the order in which the rows of a
corpus are visited. There is no state, so there is nothing to save and nothing to restore.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lm.data import keyed_random
from lm.data.keyed_random import Stream
from lm.data.mixture import Schedule

# Rows whose order is computed together: a permutation costs as much for one number as for hundreds.
BLOCK_ROWS = 4096


class Located(NamedTuple):
    """Rows of the run: the corpus of each, how many rows that corpus has had before, and the position in the corpus.

    All are int64 (rows,).
    """

    texts: NDArray[np.int64]
    turns: NDArray[np.int64]
    places: NDArray[np.int64]


class Ordered(Protocol):
    """A corpus, cut into rows."""

    per_epoch: int

    def places(self, rows: NDArray[np.int64], epoch_key: int) -> NDArray[np.int64]:
        """Where these rows of an epoch start, int64 like ``rows``."""
        ...


class Order:
    """Which rows of which corpus the steps of a run read.

    Args:
        texts: the corpora.
        schedule: which corpus each row comes from.
        batch_rows: rows per step.
    """

    def __init__(self, texts: Sequence[Ordered], schedule: Schedule, seed: int, batch_rows: int) -> None:
        self.texts, self.schedule, self.seed, self.batch_rows = texts, schedule, seed, batch_rows
        self._block = lru_cache(maxsize=4)(self._locate_block)

    def locate(self, numbers: NDArray[np.int64]) -> Located:
        """Where these rows of the run are."""
        texts, turns = self.schedule.place(numbers)
        places = np.empty_like(numbers)
        for t in np.unique(texts).tolist():
            text, of_text = self.texts[t], texts == t
            seed = keyed_random.key(self.seed, Stream.CORPUS, t) if t else self.seed
            epochs, rows = np.divmod(turns[of_text], text.per_epoch)
            found = np.empty_like(rows)
            for epoch in np.unique(epochs).tolist():
                of_epoch = epochs == epoch
                epoch_key = keyed_random.key(seed, Stream.ROW_ORDER, epoch)
                order = keyed_random.permuted(rows[of_epoch], text.per_epoch, epoch_key)
                found[of_epoch] = text.places(order, epoch_key)
            places[of_text] = found
        return Located(texts, turns, places)

    def _locate_block(self, block: int) -> Located:
        return self.locate(np.arange(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS))

    def of_step(self, step: int) -> Located:
        """Where the rows of optimizer step ``step`` (from 0) are."""
        first, stop, parts = step * self.batch_rows, (step + 1) * self.batch_rows, []
        while first < stop:
            block, begin = divmod(first, BLOCK_ROWS)
            end = min(begin + stop - first, BLOCK_ROWS)
            parts.append([array[begin:end] for array in self._block(block)])
            first += end - begin
        return Located(*map(np.concatenate, zip(*parts, strict=True)))
