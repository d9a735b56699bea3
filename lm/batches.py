"""The loader: ``batch = f(seed, step)``. It has no state, so there is nothing to save and nothing to restore.

The training stream is a ring of tokens. Each epoch cuts it into windows of ``context_length`` targets, beginning at an
offset of its own, and visits them in an order of its own, given by a keyed permutation. Row g of the run is found by
arithmetic alone: epoch g // windows, place g % windows of that epoch's permutation.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shards import Dataset, Split
from lm import randomness
from lm.config import Config
from lm.objectives import Batch, Vocabulary, make_batch, validation_batch


def vocabulary_of(dataset: Dataset) -> Vocabulary:
    tokenizer = dataset.tokenizer
    return Vocabulary(tokenizer.vocab_size, tokenizer.end_of_text_id, tokenizer.mask_id)


def read_ring(split: Split, start: int, count: int) -> NDArray[np.int64]:
    """``count`` tokens from position ``start`` of the stream bent into a ring (position -1 is its last token)."""
    start %= split.tokens
    parts = []
    while count > 0:
        stop = min(start + count, split.tokens)
        parts.append(split.read(start, stop))
        count -= stop - start
        start = 0
    return np.concatenate(parts).astype(np.int64)


class TrainingBatches:
    """The training split of a dataset, as one batch for each step."""

    def __init__(self, dataset: Dataset, config: Config) -> None:
        self.split = dataset.split("train")
        self.vocabulary = vocabulary_of(dataset)
        self.config = config
        self.context_length = config.data.context_length
        if self.split.tokens <= self.context_length:
            raise UserError(
                f"context_length {self.context_length} is longer than the training text of {dataset.directory}, "
                f"which has {self.split.tokens:,} tokens: choose a shorter context or prepare more text"
            )
        self.windows_per_epoch = self.split.tokens // self.context_length

    def window_starts(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Position in the stream of the first target of each row of the run."""
        seed, starts = self.config.training.seed, np.empty_like(numbers)
        for epoch in np.unique(numbers // self.windows_per_epoch).tolist():
            of_epoch = numbers // self.windows_per_epoch == epoch
            epoch_key = randomness.key(seed, 0, epoch)
            places = randomness.permuted(numbers[of_epoch] % self.windows_per_epoch, self.windows_per_epoch, epoch_key)
            starts[of_epoch] = epoch_key % self.context_length + places * self.context_length
        return starts % self.split.tokens

    def batch(self, step: int) -> Batch:
        """All rows of optimizer step ``step`` (from 0), whatever the micro-batch or the number of ranks."""
        rows = self.config.data.batch_rows
        numbers = np.arange(step * rows, (step + 1) * rows, dtype=np.int64)
        windows = np.stack(
            [
                read_ring(self.split, start - 1, self.context_length + 1)
                for start in self.window_starts(numbers).tolist()
            ]
        )
        return make_batch(windows, numbers, self.config.objective, self.vocabulary, self.config.training.seed)

    def epochs(self, steps: int) -> float:
        """Passes over the text after ``steps`` steps."""
        return steps * self.config.data.batch_rows / self.windows_per_epoch


class ValidationRows:
    """The validation split, cut into consecutive windows that cover every token once."""

    def __init__(self, split: Split, vocabulary: Vocabulary, context_length: int) -> None:
        self.split, self.vocabulary, self.context_length = split, vocabulary, context_length
        self.count = -(-split.tokens // context_length)

    def choose(self, rows: int) -> NDArray[np.int64]:
        """``rows`` windows spread evenly over the split; all of them for 0 or if there are not as many."""
        if not rows or rows >= self.count:
            return np.arange(self.count, dtype=np.int64)
        return np.arange(rows, dtype=np.int64) * self.count // rows

    def batches(self, numbers: NDArray[np.int64], readout: str, fold: int, folds: int, rows: int) -> Iterator[Batch]:
        """The windows ``numbers`` for one readout, ``rows`` at a time."""
        for first in range(0, len(numbers), rows):
            part = numbers[first : first + rows]
            starts = part * self.context_length
            windows = np.stack([read_ring(self.split, start - 1, self.context_length + 1) for start in starts.tolist()])
            real = np.minimum(self.split.tokens - starts, self.context_length)
            yield validation_batch(windows, real, part, readout, self.vocabulary, fold=fold, folds=folds)
