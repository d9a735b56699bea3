"""Views of texts: spans of a piece of text with some of its tokens left out.

    a row of tokens -> pieces, each of one document -> spans of a piece, drawn for each view -> rows of spans to read

Overlapping spans are those of DeCLUTR (Giorgi et al. 2021), left-out tokens those of CLEAR (Wu et al. 2020); with
dropout alone, views are those of SimCSE (Gao, Yao and Chen 2021).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.data.batch import Rows, TensorBatch, Vocabulary, assemble
from lm.data.keyed_random import Stream, key, uniform

Piece = NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """A view or several of each piece of some rows, each view of a row's pieces in a row of its own.

    Attributes:
        inputs: int64 (rows, views, T), the spans of a row's pieces one after another, each after a beginning.
        positions, lo, hi: int32 (rows, views, T), as of ``lm.data.batch.Batch``.
        borders: int64 (rows, views, pieces, 2), the first and last position of each piece's span.
    """

    inputs: Tensor
    positions: Tensor
    lo: Tensor
    hi: Tensor
    borders: Tensor

    def each(self, change: Callable[[Tensor], Tensor]) -> Spans:
        """The spans with each of the tensors changed."""
        return Spans(*(change(part) for part in vars(self).values()))

    def flat(self) -> Spans:
        """Each view as a row: all tensors without the dimension of the views."""
        return self.each(lambda part: part.flatten(0, 1))


@dataclass(frozen=True)
class TextViewBatch(TensorBatch):
    """Views of the pieces of some rows: the first two, or only one, in ``large``, shorter ones in ``small``.

    ``loss_weights``, float32 (rows,), and ``parts`` are as of ``lm.data.batch.Batch``.
    """

    large: Spans
    small: Spans | None
    loss_weights: Tensor
    parts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.loss_weights)

    def each(self, change: Callable[[Tensor], Tensor]) -> TextViewBatch:
        """As of ``TensorBatch``."""
        small = self.small.each(change) if self.small else None
        return replace(self, large=self.large.each(change), small=small, loss_weights=change(self.loss_weights))


def pieces_of(rows: Rows, count: int, length: int, end_of_text: int, seed: int) -> list[list[Piece]]:
    """``count`` pieces of each row: its documents, those longer than ``length`` tokens in equal parts.

    Of more pieces than ``count`` some are drawn, by the seed and the row's number. A row with fewer, which is not full,
    has some of them again.
    """
    drawn, found = uniform(key(seed, Stream.PIECES), rows.numbers, rows.targets.shape[1]), []
    for row, chance in zip(rows.targets, drawn, strict=True):
        pieces = [part for part in _parts(row, length, end_of_text) if len(part)] or [row[:0]]
        kept = np.sort(np.argsort(chance[: len(pieces)], kind="stable")[:count])
        found.append([pieces[kept[number % len(kept)]] for number in range(count)])
    return found


def _parts(tokens: Piece, length: int, end_of_text: int) -> Iterator[Piece]:
    first = 0
    for end in [*np.flatnonzero(tokens == end_of_text).tolist(), len(tokens)]:
        yield from np.array_split(tokens[first:end], -(-(end - first) // length) or 1)
        first = end + 1


def draw_spans(
    pieces: list[list[Piece]],
    length: int,
    numbers: NDArray[np.int64],
    seed: int,
    vocabulary: Vocabulary,
    views: range,
    *,
    shares: tuple[float, float] = (1.0, 1.0),
    deletion: float = 0.0,
    bidirectional: bool,
) -> Spans:
    """Some views of each piece; they depend on ``seed``, a row's number, the piece and the view's number alone.

    Args:
        pieces: of each row, as of ``pieces_of``; none is longer than ``length``.
        numbers: int64 (rows,), the rows' numbers.
        views: the views' numbers.
        shares: the smallest and largest share of a piece's tokens in a span; the share is drawn evenly between them.
        deletion: how likely it is that a token of a span is left out; one always stays.
        bidirectional: how a span is read.
    """
    count = len(pieces[0])
    begin = [] if vocabulary.begin is None else [vocabulary.begin]
    texts: list[list[NDArray[np.int64]]] = []
    for view in views:
        draws = uniform(key(seed, Stream.SPANS, view), numbers, 2 * count).reshape(-1, count, 2)
        lost = uniform(key(seed, Stream.DELETED_TOKENS, view), numbers, count * length).reshape(-1, count, length)
        for row, (of_row, drawn) in enumerate(zip(pieces, draws, strict=True)):
            spans = []
            for number, (piece, (share, place)) in enumerate(zip(of_row, drawn.tolist(), strict=True)):
                size = min(len(piece), max(1, round(len(piece) * (shares[0] + (shares[1] - shares[0]) * share))))
                first = int(place * (len(piece) - size + 1))
                chance = lost[row, number, :size]
                stays = (chance >= deletion) | (chance == chance.max(initial=0.0))
                spans.append(np.array([*begin, *piece[first : first + size][stays]], dtype=np.int64))
            texts.append(spans)
    lengths = np.array([[max(1, len(span)) for span in spans] for spans in texts])
    ends = lengths.cumsum(1)
    used = ends[:, -1]
    inputs = np.full((len(texts), int(used.max())), vocabulary.end_of_text, dtype=np.int64)
    starts = np.zeros(inputs.shape, dtype=bool)
    for row, (spans, firsts) in enumerate(zip(texts, ends - lengths, strict=True)):
        starts[row, firsts] = True
        for span, first in zip(spans, firsts, strict=True):
            inputs[row, first : first + len(span)] = span
    unused = np.zeros(inputs.shape, dtype=np.float32)
    batch = assemble(inputs, inputs, unused, starts, np.full(len(texts), bidirectional), used)
    borders = torch.from_numpy(np.stack([ends - lengths, ends - 1], axis=2))
    made = Spans(batch.inputs, batch.positions, batch.lo, batch.hi, borders)
    return made.each(lambda part: part.unflatten(0, (len(views), -1)).transpose(0, 1).contiguous())


def pooled_spans(hidden: Tensor, borders: Tensor, pooling: str) -> Tensor:
    """A vector of each span, (rows, pieces, hidden), from hidden states (rows, T, hidden) and ``borders``.

    As of ``lm.data.packed_sequences.pooled``, without a loop over sequences.
    """
    if pooling == "last":
        return hidden.gather(1, borders[..., 1:].expand(-1, -1, hidden.shape[2]))
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    inside = (borders[..., :1] <= positions) & (positions <= borders[..., 1:])
    return (inside / inside.sum(2, keepdim=True)).to(hidden.dtype) @ hidden
