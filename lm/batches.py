"""The loader: ``batch = f(seed, step)``. It has no state, so there is nothing to save and nothing to restore.

Row g of the run is found by arithmetic alone. A schedule says which text it comes from and how many rows that text has
had before (``lm.mixture``; with one text that is g). Each text has rows of its own: windows of ``context_length``
targets, cut anew at another offset in each epoch from the stream bent into a ring, or whole documents packed once and
for all (``lm.packing``). A keyed permutation per epoch gives the order in which they are visited.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shards import Dataset, Split
from lm import randomness
from lm.config import Config
from lm.corpora import Corpora, JoinedSplit, Text
from lm.mixture import Schedule
from lm.objectives import Batch, Rows, Vocabulary, make_batch, rows_of_windows, validation_batch
from lm.packing import plan_rows

# Rows whose order is computed at one time: a permutation costs as much for one number as for hundreds.
BLOCK_ROWS = 4096


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


class Located(NamedTuple):
    """Rows of the run: which text each comes from, how many rows that text has had before, and its place in the text.

    All are int64 (rows,).
    """

    texts: NDArray[np.int64]
    turns: NDArray[np.int64]
    places: NDArray[np.int64]


class TrainingBatches:
    """The training texts, as one batch for each step.

    Raises:
        UserError: a text is shorter than a row.
    """

    def __init__(self, corpora: Corpora, config: Config) -> None:
        self.config = config
        self.vocabulary = vocabulary_of(corpora)
        self.names = [text.name for text in corpora.training_texts()]
        self.schedule = Schedule([text.weight for text in corpora.training_texts()])
        self._kind: type[Windows] | type[Documents] = Documents if config.data.packing == "documents" else Windows
        self.texts = [self._kind(text, config.data.context_length) for text in corpora.training_texts()]
        self._block = lru_cache(maxsize=4)(self._locate_block)

    def locate(self, numbers: NDArray[np.int64]) -> Located:
        """Where these rows of the run are."""
        texts, turns = self.schedule.place(numbers)
        places = np.empty_like(numbers)
        for t in np.unique(texts).tolist():
            text, of_text = self.texts[t], texts == t
            seed = randomness.key(self.config.training.seed, 6, t) if t else self.config.training.seed
            epochs, rows = np.divmod(turns[of_text], text.per_epoch)
            found = np.empty_like(rows)
            for epoch in np.unique(epochs).tolist():
                of_epoch = epochs == epoch
                epoch_key = randomness.key(seed, 0, epoch)
                order = randomness.permuted(rows[of_epoch], text.per_epoch, epoch_key)
                found[of_epoch] = text.places(order, epoch_key)
            places[of_text] = found
        return Located(texts, turns, places)

    def _locate_block(self, block: int) -> Located:
        return self.locate(np.arange(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS))

    def rows(self, step: int) -> Rows:
        """The tokens of all rows of optimizer step ``step`` (from 0), before an objective prepares them."""
        return self._read(self._of_step(step))

    def _of_step(self, step: int) -> Located:
        count = self.config.data.batch_rows
        first, stop, parts = step * count, (step + 1) * count, []
        while first < stop:
            block, begin = divmod(first, BLOCK_ROWS)
            end = min(begin + stop - first, BLOCK_ROWS)
            parts.append([array[begin:end] for array in self._block(block)])
            first += end - begin
        return Located(*map(np.concatenate, zip(*parts, strict=True)))

    def _read(self, located: Located) -> Rows:
        pairs = zip(located.texts.tolist(), located.places.tolist(), strict=True)
        found: list[Any] = [(self.texts[text], place) for text, place in pairs]
        return self._kind.read(found, self.config.data.context_length, self.vocabulary)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Rank ``rank``'s part of the batch of optimizer step ``step`` (from 0): rows rank, rank + world, … of it.

        The parts of all ranks are the batch of one, loss weights included, whatever the number of ranks. Each rank
        prepares the whole batch, because the weights depend on what is hidden in all of its rows.

        Raises:
            UserError: the rows do not divide among the ranks.
        """
        self.check_ranks(world)
        count = self.config.data.batch_rows
        numbers = np.arange(step * count, (step + 1) * count, dtype=np.int64)
        config, located = self.config, self._of_step(step)
        rows = self._read(located)
        batch = make_batch(rows, numbers, located.turns, config.objective, self.vocabulary, config.training.seed)
        return batch if world == 1 else batch.every(rank, world)

    def check_ranks(self, world: int) -> None:
        """UserError if the rows of a batch do not divide among ``world`` ranks."""
        count = self.config.data.batch_rows
        if count % world:
            raise UserError(
                f"the batch's {count} rows do not divide among {world} ranks: change batch_tokens or the ranks"
            )

    def epochs(self, steps: int) -> float:
        """Passes over all the text after ``steps`` steps."""
        return steps * self.config.data.batch_rows / sum(text.per_epoch for text in self.texts)

    @property
    def tokens(self) -> int:
        """Tokens of all training texts."""
        return sum(text.ring.tokens for text in self.texts)

    def introduction(self, steps: int) -> list[str]:
        """What a person wants to know of the texts before the first of ``steps`` steps, one sentence each."""
        sentences = []
        counts = self.schedule.counts(steps * self.config.data.batch_rows)
        for name, text, share, count in zip(self.names, self.texts, self.schedule.shares, counts, strict=True):
            if len(self.texts) > 1:
                sentences.append(
                    f"{name}: {float(share):.1%} of the rows, {text.ring.tokens:,} tokens, "
                    f"{count / text.per_epoch:.2f} epochs"
                )
            if isinstance(text, Documents):
                sentences.append(f"{name}: {text.describe()}")
        return sentences


class ValidationRows:
    """The validation split, cut into consecutive windows that cover every token once."""

    def __init__(self, split: Split | JoinedSplit, vocabulary: Vocabulary, context_length: int) -> None:
        self.split, self.vocabulary, self.context_length = split, vocabulary, context_length
        self._ring = Ring(split, 0, split.tokens)
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
            windows = np.empty((len(part), self.context_length + 1), dtype=np.int64)
            for window, start in zip(windows, starts.tolist(), strict=True):
                self._ring.read_into(start - 1, window)
            real = np.minimum(self.split.tokens - starts, self.context_length)
            yield validation_batch(windows, real, part, readout, self.vocabulary, fold=fold, folds=folds)
