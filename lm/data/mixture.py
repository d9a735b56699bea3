"""Which corpus each row of a run comes from, computed directly for any row.

The corpora are the leaves of a balanced binary tree. Of n rows that reach a node, round(n × its share) go to the left,
so each split is off by at most half a row, and after any number of rows a corpus is off by at most half the depth of
the tree: 1/2 row with two corpora, 1 with up to four, 3/2 with up to eight. Errors do not accumulate.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

# Keeps the products below within 63 bits; a finer share is off by less than one row in 2^30.
FINEST_SHARE = 2**30


class Schedule:
    """How several corpora, each with a weight above 0, share the rows."""

    def __init__(self, weights: Sequence[Fraction]) -> None:
        self.shares = [weight / sum(weights) for weight in weights]

    def place(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Each row's corpus, and how many earlier rows came from that corpus; both int64 (rows,)."""
        corpora, places = np.zeros_like(numbers), numbers.copy()

        def descend(start: int, stop: int, rows: NDArray[np.int64]) -> None:
            """Divide ``rows`` (indices into the arguments) among the corpora ``start`` to ``stop``."""
            corpora[rows] = start
            if stop - start == 1 or not len(rows):
                return
            middle, share = self._node(start, stop)
            left = _rounded(places[rows], share)
            to_left = _rounded(places[rows] + 1, share) > left
            places[rows] = np.where(to_left, left, places[rows] - left)
            descend(start, middle, rows[to_left])
            descend(middle, stop, rows[~to_left])

        descend(0, len(self.shares), np.arange(len(numbers)))
        return corpora, places

    def counts(self, rows: int) -> list[int]:
        """How many of the first ``rows`` rows come from each corpus."""

        def descend(start: int, stop: int, rows: int) -> list[int]:
            if stop - start == 1:
                return [rows]
            middle, share = self._node(start, stop)
            left = int(_rounded(np.array([rows]), share)[0])
            return descend(start, middle, left) + descend(middle, stop, rows - left)

        return descend(0, len(self.shares), rows)

    def _node(self, start: int, stop: int) -> tuple[int, Fraction]:
        """Where the corpora ``start`` to ``stop`` are parted, and the left part's share of their rows."""
        middle = (start + stop) // 2
        share = sum(self.shares[start:middle], Fraction(0)) / sum(self.shares[start:stop], Fraction(0))
        return middle, share.limit_denominator(FINEST_SHARE)


def _rounded(numbers: NDArray[np.int64], share: Fraction) -> NDArray[np.int64]:
    """The nearest integer to number × share, halves upwards, without overflow."""
    whole, rest = np.divmod(numbers, share.denominator)
    return whole * share.numerator + (2 * rest * share.numerator + share.denominator) // (2 * share.denominator)
