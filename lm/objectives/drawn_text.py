"""What objectives on text share that draw, for each document of a row, what of it is seen and what predicted."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from lm.data.batch import IGNORED, Batch, Rows, assemble, rows_of_windows
from lm.data.rows import ValidationRows
from lm.objectives.objective import Measure
from lm.objectives.text import TextObjective


class DrawnText(TextObjective, ABC):
    """All rows are of one kind, and the loss is the mean over their predicted tokens."""

    @abstractmethod
    def drawn(self, rows: Rows, seed: int) -> Batch:
        """The rows as they are learned, where each predicted token weighs 1; it depends on the rows and the seed alone.

        As many positions are used as were before; ``assembled`` makes the batch.
        """

    def assembled(self, rows: Rows, inputs: NDArray[np.int64], targets: NDArray[np.int64]) -> Batch:
        """A causal batch of what has become of the ``rows``; nothing is predicted at positions that are not used."""
        used = np.arange(inputs.shape[1]) < rows.lengths[:, None]
        targets = np.where(used, targets, IGNORED)
        weights, causal = (targets != IGNORED).astype(np.float32), np.zeros(len(inputs), dtype=bool)
        lengths = None if used.all() else rows.lengths
        return assemble(inputs, targets, weights, rows.starts, causal, lengths, {self.name: len(inputs)})

    def prepare(self, rows: Rows) -> Batch:
        batch = self.drawn(rows, self.seed)
        return replace(batch, loss_weights=batch.loss_weights / batch.loss_weights.sum().clamp(min=1))

    def measured(
        self, held_out: ValidationRows, numbers: NDArray[np.int64], measure: Measure, *, every_token: bool
    ) -> dict[str, dict[str, float]]:
        """The objective's own loss, drawn alike in every validation; evaluations compare readouts, and do without."""
        if every_token:
            return {}

        def batch(some: NDArray[np.int64]) -> Batch:
            windows, real = held_out.windows(some)
            return self.drawn(replace(rows_of_windows(windows, self.vocabulary), numbers=some, lengths=real), seed=0)

        nats, predicted = measure(numbers, [batch])
        return {self.name: {"nats_per_token": nats / max(predicted, 1), "predicted": int(predicted)}}


def documents_of(rows: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The row, first position and end of each document, or part of one, in the rows: int64 (documents,)."""
    row, first = np.nonzero(rows.starts & (np.arange(rows.starts.shape[1]) < rows.lengths[:, None]))
    ends_row = np.append(row[1:] != row[:-1], True)
    return row, first, np.where(ends_row, rows.lengths[row], np.append(first[1:], 0))
