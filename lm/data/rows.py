"""The rows of tokens that training and validation read: ``rows = f(seed, step)``, with no state to save or restore.

Each corpus is cut into rows in one of two ways: windows of ``context_length`` targets, at another offset in each epoch,
or whole documents, packed once (``lm.data.packing``); ``lm.data.order`` says which row comes when.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shards.tokens import Dataset, Split
from data_prep.tokenizers.words import word_joints
from lm.config.settings import Config
from lm.data.batch import Rows, Vocabulary, rows_of_windows
from lm.data.corpora import Corpora, JoinedSplit, Text
from lm.data.order import Order
from lm.data.packing import plan_rows


def vocabulary_of(dataset: Dataset | Corpora) -> Vocabulary:
    """The token ids of a dataset that objectives need to know."""
    tokenizer, special = dataset.tokenizer, dataset.tokenizer.special
    mask = -1 if special.mask is None else special.mask
    joints = partial(word_joints, tokenizer)
    return Vocabulary(tokenizer.vocab_size, special.end_of_text, mask, special.begin, tokenizer.infill_ids, joints)


class Ring:
    """The tokens ``start`` to ``stop`` of a split, read cyclically: position -1 is the last token."""

    def __init__(self, split: Split | JoinedSplit, start: int, stop: int) -> None:
        self._split, self._start, self.tokens = split, start, stop - start
        self.is_remote = split.is_remote

    def announce(self, position: int, count: int) -> None:
        """Say that ``count`` tokens from ``position`` on are going to be read (``Split.announce``)."""
        if not self.is_remote:
            return
        position %= self.tokens
        first = min(count, self.tokens - position)
        self._split.announce(self._start + position, self._start + position + first)
        self._split.announce(self._start, self._start + min(count - first, self.tokens))

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
    """Adjacent windows of a corpus as rows: each token is a target once an epoch, except for a short remainder.

    Each epoch has its own offset, so that windows differ between epochs.
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
    def read(found: list[tuple[Windows, int]], vocabulary: Vocabulary) -> Rows:
        """The rows that begin at these positions of these corpora."""
        windows = np.empty((len(found), found[0][0].context_length + 1), dtype=np.int64)
        for text, place in found:
            text.ring.announce(place - 1, windows.shape[1])
        for window, (text, place) in zip(windows, found, strict=True):
            text.ring.read_into(place - 1, window)
        return rows_of_windows(windows, vocabulary)


class Documents:
    """Rows of whole documents: each token is a target exactly once an epoch, and nothing is cut that fits into a row.

    A fragment's first input is the token before it: where a document begins, an end of text, or what the vocabulary
    has as ``begin``.
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

    def fragments(self, place: int) -> Iterator[tuple[int, int]]:
        """First token in the ring, and number of tokens, of each fragment of a row of the plan."""
        first, last = self.plan.first[place : place + 2].tolist()
        starts = (self.plan.starts[first:last] - self._start).tolist()
        return zip(starts, self.plan.lengths[first:last].tolist(), strict=True)

    @staticmethod
    def read(found: list[tuple[Documents, int]], vocabulary: Vocabulary) -> Rows:
        """These rows of these plans; positions that no document fills hold end-of-text tokens."""
        context_length = found[0][0].context_length
        shape = (len(found), context_length)
        inputs, targets = np.empty((2, *shape), dtype=np.int64)
        starts, lengths = np.zeros(shape, dtype=bool), np.empty(len(found), dtype=np.int64)
        fragment = np.empty(context_length + 1, dtype=np.int64)
        for text, place in found:
            for position, length in text.fragments(place) if text.ring.is_remote else ():
                text.ring.announce(position - 1, length + 1)
        for row, (text, place) in enumerate(found):
            begin = 0
            for position, length in text.fragments(place):
                end = begin + length
                text.ring.read_into(position - 1, fragment[: length + 1])
                inputs[row, begin:end] = fragment[:length]
                targets[row, begin:end] = fragment[1 : length + 1]
                starts[row, begin] = True
                begin = end
            lengths[row] = begin
            inputs[row, begin:] = targets[row, begin:] = vocabulary.end_of_text
        numbers = np.arange(len(found), dtype=np.int64)
        return Rows(vocabulary.with_beginnings(inputs), targets, starts, lengths, numbers, numbers)


class TrainingRows(Order):
    """The training text of all corpora, as the rows of each step; raises UserError if one is shorter than a row.

    ``inputs`` is what an objective needs to know of the tokens.
    """

    def __init__(self, corpora: Corpora, config: Config) -> None:
        texts = corpora.training_texts()
        self.inputs = vocabulary_of(corpora)
        self._kind: type[Windows] | type[Documents] = Documents if config.data.packing == "documents" else Windows
        self.texts = [self._kind(text, config.data.context_length) for text in texts]
        weights = [text.weight for text in texts]
        super().__init__([text.name for text in texts], weights, self.texts, config)

    def of_step(self, step: int) -> Rows:
        """The rows of optimizer step ``step``, from 0."""
        numbers, located = self.located(step)
        pairs = zip(located.texts.tolist(), located.places.tolist(), strict=True)
        found: list[Any] = [(self.texts[text], place) for text, place in pairs]
        return replace(self._kind.read(found, self.inputs), numbers=numbers, turns=located.turns)

    @property
    def tokens(self) -> int:
        """Tokens of all corpora's training text."""
        return sum(text.ring.tokens for text in self.texts)

    def describe(self) -> str:
        return f"{self.tokens:,} tokens"

    def introduction(self, steps: int) -> list[str]:
        """What to know about the corpora before the first of ``steps`` steps, one sentence each."""
        sentences = []
        counts = self.schedule.counts(steps * self.batch_rows)
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

    def __init__(self, split: Split | JoinedSplit, context_length: int) -> None:
        self.split, self.context_length = split, context_length
        self._ring = Ring(split, 0, split.tokens)
        self.count = -(-split.tokens // context_length)

    def choose(self, rows: int) -> NDArray[np.int64]:
        """``rows`` windows spread evenly over the split; all of them for 0 or if there are not as many."""
        if not rows or rows >= self.count:
            return np.arange(self.count, dtype=np.int64)
        return np.arange(rows, dtype=np.int64) * self.count // rows

    def windows(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The windows ``numbers``: int64 (rows, context_length + 1), and how many of each one's targets are text."""
        starts = numbers * self.context_length
        windows = np.empty((len(numbers), self.context_length + 1), dtype=np.int64)
        for start in starts.tolist():
            self._ring.announce(start - 1, windows.shape[1])
        for window, start in zip(windows, starts.tolist(), strict=True):
            self._ring.read_into(start - 1, window)
        return windows, np.minimum(self.split.tokens - starts, self.context_length)
