"""The order in which the rows of a run are visited: ``places = f(seed, step)``, with no state to save or restore.

A schedule gives the corpus of row g of the run, and how many rows that corpus has had before (``lm.data.mixture``; with
one corpus that is g). A keyed permutation per epoch gives the order in which the rows of a corpus are visited.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lm.config.settings import Config
from lm.data.keyed_random import Stream, key, permuted
from lm.data.mixture import Schedule

# Rows that are located together: a permutation costs as much for one number as for hundreds.
BLOCK_ROWS = 4096


class Corpus(Protocol):
    """One corpus, cut into ``per_epoch`` rows."""

    per_epoch: int

    def places(self, rows: NDArray[np.int64], epoch_key: int) -> NDArray[np.int64]:
        """Where these rows of an epoch are."""


class Located(NamedTuple):
    """Rows of the run: each one's corpus, how many rows that corpus had before, and its position; int64 (rows,)."""

    texts: NDArray[np.int64]
    turns: NDArray[np.int64]
    places: NDArray[np.int64]


class Order:
    """Which row of which corpus each row of a run is.

    Attributes:
        names, corpora: one of each corpus.
        schedule: how the corpora share the rows.
        batch_rows: the rows of a step.
    """

    def __init__(
        self, names: Sequence[str], weights: Sequence[Fraction], corpora: Sequence[Corpus], config: Config
    ) -> None:
        self.names, self.corpora, self.schedule = names, corpora, Schedule(weights)
        self.batch_rows, self._seed = config.data.batch_rows, config.training.seed
        self._block = lru_cache(maxsize=4)(
            lambda block: self.locate(np.arange(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS))
        )

    def locate(self, numbers: NDArray[np.int64]) -> Located:
        """Where these rows of the run are."""
        texts, turns = self.schedule.place(numbers)
        places = np.empty_like(numbers)
        for t in np.unique(texts).tolist():
            corpus, of_corpus = self.corpora[t], texts == t
            seed = key(self._seed, Stream.CORPUS, t) if t else self._seed
            epochs, rows = np.divmod(turns[of_corpus], corpus.per_epoch)
            found = np.empty_like(rows)
            for epoch in np.unique(epochs).tolist():
                of_epoch = epochs == epoch
                epoch_key = key(seed, Stream.ROW_ORDER, epoch)
                order = permuted(rows[of_epoch], corpus.per_epoch, epoch_key)
                found[of_epoch] = corpus.places(order, epoch_key)
            places[of_corpus] = found
        return Located(texts, turns, places)

    def located(self, step: int) -> tuple[NDArray[np.int64], Located]:
        """The numbers in the run of the rows of optimizer step ``step``, from 0, and where they are."""
        numbers = np.arange(step * self.batch_rows, (step + 1) * self.batch_rows, dtype=np.int64)
        blocks, within = np.divmod(numbers, BLOCK_ROWS)
        parts = [
            [array[within[blocks == block]] for array in self._block(block)] for block in np.unique(blocks).tolist()
        ]
        return numbers, Located(*map(np.concatenate, zip(*parts, strict=True)))

    def epochs(self, steps: int) -> float:
        """Passes over all the data after ``steps`` steps."""
        return steps * self.batch_rows / self.count

    @property
    def count(self) -> int:
        """Rows of all corpora in an epoch."""
        return sum(corpus.per_epoch for corpus in self.corpora)
