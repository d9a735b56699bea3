"""From the rows of a dataset to batches: reading, then an objective's preparation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shards.tokens import Split
from lm.config.settings import Config
from lm.data.batch import Batch, Rows, Vocabulary
from lm.data.corpora import Corpora, JoinedSplit
from lm.data.mixture import Schedule
from lm.data.order import Located, Order
from lm.data.rows import Documents, Ring, Windows, vocabulary_of
from lm.objectives.text import make_batch, validation_batch


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
        self.order = Order(self.texts, self.schedule, config.training.seed, config.data.batch_rows)

    def rows(self, step: int) -> Rows:
        """The tokens of all rows of optimizer step ``step`` (from 0), before an objective prepares them."""
        return self._read(self.order.of_step(step))

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
        config, located = self.config, self.order.of_step(step)
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
