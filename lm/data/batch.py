"""A batch: the rows of one forward pass, and the rows of tokens that it is made from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.kernels import masks

IGNORED = -100
TENSORS = ("inputs", "targets", "loss_weights", "positions", "lo", "hi")


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that objectives need to know.

    A document is read from ``begin`` on, which stands in the place of the end of text before it; None leaves that end
    of text there. ``mask`` is -1 in a vocabulary without one. ``infill`` introduces the prefix, the suffix and the
    middle of a document that is rearranged. ``joints`` finds which tokens make a word
    (``data_prep.tokenizers.words.word_joints``).
    """

    size: int
    end_of_text: int
    mask: int
    begin: int | None = None
    infill: tuple[int, int, int] | None = None
    joints: Callable[[], NDArray[np.bool_]] | None = field(default=None, compare=False)

    def with_beginnings(self, inputs: NDArray[np.int64]) -> NDArray[np.int64]:
        """Inputs of any shape, with ``begin`` in the places of ends of text."""
        if self.begin in (None, self.end_of_text):
            return inputs
        return np.where(inputs == self.end_of_text, self.begin, inputs)

    def borders(self, inputs: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Where the inputs are ends of text or beginnings."""
        ends = inputs == self.end_of_text
        return ends if self.begin in (None, self.end_of_text) else ends | (inputs == self.begin)


@dataclass(frozen=True)
class Batch:
    """Rows for one forward pass; every tensor is (rows, T).

    Attributes:
        inputs: int64, the tokens that are read.
        targets: int64, the tokens to predict; -100 where nothing is predicted.
        loss_weights: float32. They already hold the normalization of the whole optimizer step: the step's loss is the
            plain sum of weight × cross-entropy over all of its micro-batches.
        positions: int32, the rotary positions.
        lo, hi: int32, the key intervals (``lm.kernels.masks``).
        parts: the named parts of the loss, with the number of rows that each is about, in the order of the rows.
        ahead: the weights of the tokens after the next one in rows of next_token (``lm.objectives.ahead``); (): none.
        predicted: the number of targets of each part, once the batch is on a GPU, which would have to be waited for.
    """

    inputs: Tensor
    targets: Tensor
    loss_weights: Tensor
    positions: Tensor
    lo: Tensor
    hi: Tensor
    parts: dict[str, int] = field(default_factory=dict)
    ahead: tuple[float, ...] = ()
    predicted: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.inputs)

    def rows(self, start: int, stop: int) -> Batch:
        """A micro-batch: the rows from ``start`` to ``stop``."""
        return self._taken(slice(start, stop))

    def every(self, first: int, step: int) -> Batch:
        """One rank's share: every ``step``-th row from ``first`` on, so that each part of the loss is shared evenly."""
        return self._taken(slice(first, None, step))

    def _taken(self, chosen: slice) -> Batch:
        start, stop, step = chosen.indices(len(self))
        parts, begin = {}, 0
        for name, rows in self.parts.items():
            before, to_end = (len(range(start, min(stop, at), step)) for at in (begin, begin + rows))
            parts[name], begin = to_end - before, begin + rows
        taken: dict[str, Any] = {name: getattr(self, name)[chosen].contiguous() for name in TENSORS}
        return replace(self, parts=parts, predicted={}, **taken)

    def each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each of its tensors changed."""
        changed: dict[str, Any] = {name: change(getattr(self, name)) for name in TENSORS}
        return replace(self, **changed)

    def to(self, device: torch.device) -> Batch:
        """The batch on a device."""
        moved = self.each(lambda part: part.to(device, non_blocking=True))
        if device.type == "cpu" or self.targets.device.type != "cpu":
            return moved
        by_part = (self.targets >= 0).split(list(self.parts.values())) if self.parts else ()
        predicted = {name: int(there.sum()) for name, there in zip(self.parts, by_part, strict=True)}
        return replace(moved, predicted=predicted)


def joined(batches: Sequence[Batch]) -> Batch:
    """The rows of all ``batches``, one after another; no two have parts of the same name."""
    tensors: dict[str, Any] = {name: torch.cat([getattr(batch, name) for batch in batches]) for name in TENSORS}
    parts = {name: rows for batch in batches for name, rows in batch.parts.items()}
    return Batch(**tensors, parts=parts, ahead=next((batch.ahead for batch in batches if batch.ahead), ()))


class TensorBatch(ABC):
    """A batch whose tensors are all cut by rows; each row is about all ``parts`` of the loss, as of ``Batch``."""

    parts: dict[str, int]

    @abstractmethod
    def __len__(self) -> int:
        """The number of rows."""

    @abstractmethod
    def each(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The batch with each of its tensors changed."""

    def rows(self, start: int, stop: int) -> Self:
        """A micro-batch: the rows from ``start`` to ``stop``."""
        return self._taken(slice(start, stop))

    def every(self, first: int, step: int) -> Self:
        """One rank's share: every ``step``-th row from ``first`` on."""
        return self._taken(slice(first, None, step))

    def _taken(self, chosen: slice) -> Self:
        taken = self.each(lambda part: part[chosen].contiguous())
        changes: Any = {"parts": dict.fromkeys(self.parts, len(taken))}
        return replace(taken, **changes)  # type: ignore[type-var]

    def to(self, device: torch.device) -> Self:
        """The batch on a device."""
        return self.each(lambda part: part.to(device, non_blocking=True))


@dataclass(frozen=True)
class Rows:
    """Rows of tokens before an objective prepares them; T positions, each with its target.

    Attributes:
        inputs, targets: int64 (rows, T), the input being the token before the target.
        starts: bool (rows, T), true where a document or a part of one begins.
        lengths: int64 (rows,), how many positions are used; the ones after them hold end-of-text tokens.
        numbers: int64 (rows,), the rows' numbers in the whole run; with the seed they decide what is hidden.
        turns: int64 (rows,), the rows' numbers among those of their own corpus; they decide which rows are masked, so
            that each corpus has the same share of masked rows.
    """

    inputs: NDArray[np.int64]
    targets: NDArray[np.int64]
    starts: NDArray[np.bool_]
    lengths: NDArray[np.int64]
    numbers: NDArray[np.int64]
    turns: NDArray[np.int64]

    def chosen(self, rows: NDArray[np.int64]) -> Rows:
        """Some of the rows."""
        return Rows(*(getattr(self, part.name)[rows] for part in fields(self)))


def rows_of_windows(windows: NDArray[np.int64], vocabulary: Vocabulary) -> Rows:
    """Rows that are windows of the stream, (rows, T + 1) tokens, with a document beginning at each end of text.

    They are numbered from 0.
    """
    inputs, numbers = windows[:, :-1], np.arange(len(windows), dtype=np.int64)
    starts = inputs == vocabulary.end_of_text
    starts[:, 0] = True
    inputs = vocabulary.with_beginnings(inputs)
    return Rows(inputs, windows[:, 1:], starts, np.full(len(inputs), inputs.shape[1]), numbers, numbers)


def assemble(
    inputs: NDArray[np.int64],
    targets: NDArray[np.int64],
    weights: NDArray[np.float32],
    starts: NDArray[np.bool_],
    bidirectional: NDArray[np.bool_],
    lengths: NDArray[np.int64] | None = None,
    parts: dict[str, int] | None = None,
) -> Batch:
    """Tensors of a batch whose documents begin where ``starts`` is true.

    Args:
        bidirectional: bool (rows,), the rows that are read in both directions; the others are read causally.
        lengths: (rows,), the used positions of each row: those after them see nothing and are not seen. None: all.
        parts: as of ``Batch``.
    """
    used = None if lengths is None else torch.from_numpy(lengths)
    lo, hi = masks.packed(torch.from_numpy(starts), torch.from_numpy(bidirectional), used)
    positions = torch.from_numpy(np.arange(inputs.shape[1], dtype=np.int32) - lo.numpy())
    read, predicted, loss_weights = (torch.from_numpy(np.ascontiguousarray(a)) for a in (inputs, targets, weights))
    return Batch(read, predicted, loss_weights, positions, lo, hi, parts or {})
