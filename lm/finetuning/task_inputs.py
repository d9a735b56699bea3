"""Examples of a task as token sequences (``packed_sequences``), and the positions that its answers are read from.

An *item* gets one answer of the head: a text, a pair of texts, a text with one of its choices, or a word. Its vector is
the mean over its positions: all of a sequence ("mean"), the last one ("last"), or the first token of a word.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from typing import Protocol

from data_prep.tokenizers.tokenizer import Tokenizer
from lm.data.examples import Example
from lm.data.packed_sequences import sequence_of

Tokens = list[int]


@dataclass(frozen=True)
class TokenSpan:
    """The tokens ``start`` to ``stop`` of sequence number ``sequence`` of an example."""

    sequence: int
    start: int
    stop: int


@dataclass(frozen=True)
class EncodedExample:
    """An example as tokens: its sequences, and for each of its items the spans whose means are averaged.

    ``cut``: it was longer than the context, and truncated or split into windows. The vectors of ``joined`` consecutive
    items are combined for one answer.
    """

    sequences: tuple[Tokens, ...]
    items: tuple[tuple[TokenSpan, ...], ...]
    cut: bool
    joined: int = 1

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class Encoder:
    """Encodes examples of the task ``kind`` as sequences of at most ``context_length`` tokens.

    ``pooling`` is "mean" or "last". A text that is longer than the context is truncated, or with ``windows`` split into
    adjacent windows, whose means are averaged. In a pair, the longer text is truncated first, token by token; the words
    of a long text are always split into windows. With ``apart`` each text of a pair is its own sequence.
    """

    tokenizer: Tokenizer
    kind: str
    context_length: int
    pooling: str
    windows: bool = False
    apart: bool = False

    def encode(self, examples: Sequence[Example]) -> list[EncodedExample]:
        """Encode these examples, tokenized together."""
        space = " " if self.kind == "tokens" else ""  # before every word but the first
        spelled = [[space * (i > 0) + text for i, text in enumerate(example.texts)] for example in examples]
        texts = iter(self.tokenizer.encode_batch(list(chain.from_iterable(spelled))))
        return [self._encoded([next(texts) for _ in parts]) for parts in spelled]

    def _encoded(self, parts: list[Tokens]) -> EncodedExample:
        if self.kind == "tokens":
            return self._words(parts)
        if self.kind == "choice":
            return _together([self._text([parts[0], choice]) for choice in parts[1:]])
        if self.apart and len(parts) == 2:
            return _together([self._encoded([part]) for part in parts], joined=2)
        if self.windows and len(parts) == 1:
            room, text = self.context_length - len(self._start), parts[0]
            sequences = [self.tokenizer.begun(text[first : first + room]) for first in range(0, len(text) or 1, room)]
            return self._item(sequences, cut=len(sequences) > 1)
        return self._text(parts)

    def _text(self, parts: list[Tokens]) -> EncodedExample:
        begin, end_of_text = self.tokenizer.begin_id, self.tokenizer.end_of_text_id
        sequence, cut = sequence_of(parts, begin, end_of_text, self.context_length)
        return self._item([sequence], cut=cut)

    def _item(self, sequences: list[Tokens], *, cut: bool) -> EncodedExample:
        """An example with one item, which is read from all of these sequences."""
        lengths = [len(sequence) for sequence in sequences]
        spans = (TokenSpan(n, length - 1 if self.pooling == "last" else 0, length) for n, length in enumerate(lengths))
        return EncodedExample(tuple(sequences), (tuple(spans),), cut)

    def _words(self, words: list[Tokens]) -> EncodedExample:
        start = self._start or ([] if any(words) else [self.tokenizer.end_of_text_id])  # a row needs a token
        room = self.context_length - len(start)
        sequences, items = [[*start]], []
        for word in words:
            if len(sequences[-1]) + len(word) > self.context_length and len(sequences[-1]) > len(start):
                sequences.append([*start])
            here = len(sequences[-1])
            sequences[-1] += word[:room]
            at = max(0, min(here, len(sequences[-1]) - 1))  # a word without tokens is read from where it would start
            items.append((TokenSpan(len(sequences) - 1, at, at + 1),))
        cut = len(sequences) > 1 or any(len(word) > room for word in words)
        return EncodedExample(tuple(sequences), tuple(items), cut)

    @property
    def _start(self) -> Tokens:
        """What begins a sequence."""
        return [] if self.tokenizer.begin_id is None else [self.tokenizer.begin_id]


def _together(parts: Sequence[EncodedExample], joined: int = 1) -> EncodedExample:
    """Combine several into one example with the items of all."""
    sequences = tuple(chain.from_iterable(part.sequences for part in parts))
    firsts = accumulate((len(part.sequences) for part in parts), initial=0)
    items = tuple(
        tuple(replace(span, sequence=first + span.sequence) for span in spans)
        for first, part in zip(firsts, parts, strict=False)
        for spans in part.items
    )
    return EncodedExample(sequences, items, any(part.cut for part in parts), joined)


class TaskExample(Protocol):
    """An encoded example: how many tokens the model reads, and whether it was longer than the context."""

    @property
    def tokens(self) -> int: ...
    @property
    def cut(self) -> bool: ...


def in_parts(encoded: Sequence[TaskExample], most_tokens: int) -> Iterator[tuple[int, int]]:
    """Split into runs [first, stop) of examples with at most ``most_tokens`` tokens in total, or of one example."""
    first, tokens = 0, 0
    for number, example in enumerate(encoded):
        if number > first and tokens + example.tokens > most_tokens:
            yield first, number
            first, tokens = number, 0
        tokens += example.tokens
    if encoded:
        yield first, len(encoded)
