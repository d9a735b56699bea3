"""Several objectives at once: each has its share of a step's rows.

A ``TextMixture`` is of objectives that predict tokens; a ``Mixture`` is of one of these, or of a single such objective,
and one that compares views.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.config.settings import Config
from lm.data.batch import Batch, Rows, Vocabulary, joined
from lm.data.keyed_random import Stream, key, uniform
from lm.data.rows import ValidationRows
from lm.data.text_views import TextViewBatch
from lm.model.transformer import Transformer
from lm.objectives.objective import Measure
from lm.objectives.text import TextObjective
from lm.objectives.text_views import TextViews


class TextMixture(TextObjective):
    """The rows of a step are drawn for several objectives; the loss is the mean of theirs, weighted by their shares.

    A batch has the rows of the first objective, then those of the second, …, and the parts of all of them.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary, objectives: Sequence[TextObjective]) -> None:
        super().__init__(config, vocabulary)
        self.objectives = objectives
        shares = [config.objective.shares[each.name] for each in objectives]
        self.shares = [share / sum(shares) for share in shares]

    def _counts(self, rows: int) -> list[int]:
        """How many of ``rows`` rows each objective has; exactly its share, if that is a whole number."""
        ends = [int(sum(self.shares[:number]) * rows) for number in range(len(self.shares) + 1)]
        return [end - start for start, end in pairwise(ends)]

    def example(self, rows: int) -> Batch:
        return joined([each.example(n) for each, n in zip(self.objectives, self._counts(rows), strict=True) if n])

    def flops_per_token(self, model: nn.Module, context_length: int) -> float:
        pairs = zip(self.shares, self.objectives, strict=True)
        return sum(float(share) * each.flops_per_token(model, context_length) for share, each in pairs)

    def prepare(self, rows: Rows) -> Batch:
        counts = self._counts(len(rows.numbers))
        chosen = np.split(drawn_order(self.seed, Stream.TEXT_MIXTURE, rows), np.cumsum(counts)[:-1])
        step, batches = int(rows.numbers[0]) // self.data.batch_rows, []
        for objective, share, some in zip(self.objectives, self.shares, chosen, strict=True):
            batch = objective.prepare(share_of(rows, some, step))
            batches.append(replace(batch, loss_weights=batch.loss_weights * float(share)))
        return joined(batches)

    def measured(
        self, held_out: ValidationRows, numbers: NDArray[np.int64], measure: Measure, *, every_token: bool
    ) -> dict[str, dict[str, float]]:
        found: dict[str, dict[str, float]] = {}
        for each in self.objectives:
            found |= each.measured(held_out, numbers, measure, every_token=every_token)
        return found


def drawn_order(seed: int, stream: Stream, rows: Rows) -> NDArray[np.int64]:
    """The rows of a step in an order that is drawn for each step, so that a schedule of corpora cannot decide it."""
    return np.argsort(uniform(key(seed, stream), rows.numbers, 1)[:, 0], kind="stable")


def share_of(rows: Rows, chosen: NDArray[np.int64], step: int) -> Rows:
    """An objective's rows of a step, in the order of the step, their turns being those among all rows it has had."""
    turns = step * len(chosen) + np.arange(len(chosen), dtype=np.int64)
    return replace(rows.chosen(np.sort(chosen)), turns=turns)


@dataclass(frozen=True)
class MixedBatch:
    """The rows whose tokens are ``predicted``, and those that are ``compared``."""

    predicted: Batch
    compared: TextViewBatch

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.predicted) + len(self.compared)

    @property
    def parts(self) -> dict[str, int]:
        """As of ``Batch``."""
        return self.predicted.parts | self.compared.parts

    def rows(self, start: int, stop: int) -> MixedBatch:
        """A share of both kinds of rows, as large as that of the rows from ``start`` to ``stop``."""
        whole = len(self)
        cuts = [(start * len(part) // whole, -(-stop * len(part) // whole)) for part in (self.predicted, self.compared)]
        return MixedBatch(self.predicted.rows(*cuts[0]), self.compared.rows(*cuts[1]))

    def every(self, first: int, step: int) -> MixedBatch:
        """One rank's share: every ``step``-th row of both kinds from ``first`` on."""
        return MixedBatch(self.predicted.every(first, step), self.compared.every(first, step))

    def each(self, change: Callable[[Tensor], Tensor]) -> MixedBatch:
        """The batch with each of its tensors changed."""
        return MixedBatch(self.predicted.each(change), self.compared.each(change))

    def to(self, device: torch.device) -> MixedBatch:
        """The batch on a device."""
        return MixedBatch(self.predicted.to(device), self.compared.to(device))


class Mixture:
    """An ``lm.objectives.objective.Comparing`` of two: the loss is the mean of theirs, weighted by their shares."""

    compares, comparable = True, True
    memory: nn.Module | None = None  # that of the views

    def __init__(self, config: Config, text: TextObjective, views: TextViews) -> None:
        self.text, self.views, self.seed = text, views, config.training.seed
        self.share = float(config.objective.shares[views.name])  # of the rows that are compared

    def new_model(self) -> Transformer:
        return self.views.new_model()

    def example(self, rows: int) -> MixedBatch:
        return MixedBatch(self.text.example(rows), self.views.example(rows))

    def flops_per_token(self, model: nn.Module, context_length: int) -> float:
        predicted, compared = (each.flops_per_token(model, context_length) for each in (self.text, self.views))
        return (1 - self.share) * predicted + self.share * compared

    def prepare(self, rows: Rows) -> MixedBatch:
        count = len(rows.numbers)
        drawn = drawn_order(self.seed, Stream.MIXTURE, rows)
        compared, predicted = np.split(drawn, [round(self.share * count)])
        batch = self.text.prepare(share_of(rows, predicted, int(rows.numbers[0]) // count))
        weighted = replace(batch, loss_weights=batch.loss_weights * (1 - self.share))
        return MixedBatch(weighted, self.views.prepare(rows.chosen(np.sort(compared))))

    def loss(self, model: nn.Module, batch: Batch | MixedBatch) -> dict[str, Tensor]:
        """Of rows that are predicted, or of a whole step with both kinds."""
        if isinstance(batch, Batch):
            return self.text.loss(model, batch)
        targets = self.targets(model, batch.compared) if self.memory is not None else None
        compared = self.compare(self.vectors(model, batch.compared), targets)
        return self.text.loss(model, batch.predicted) | compared

    def vectors(self, model: nn.Module, batch: TextViewBatch) -> Tensor:
        return self.views.vectors(model, batch)

    def targets(self, model: nn.Module, batch: TextViewBatch) -> Tensor:
        return self.views.targets(model, batch)

    def features(self, model: nn.Module, batch: TextViewBatch) -> Tensor:
        """As of ``TextViews``."""
        return self.views.features(model, batch)

    def compare(self, vectors: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        return {name: self.share * loss for name, loss in self.views.compare(vectors, targets).items()}

    def observe(self, targets: Tensor) -> None:
        self.views.observe(targets)

    def begin(self, model: nn.Module) -> None:
        self.views.begin(model)
        self.memory = self.views.memory

    def after_step(self, model: nn.Module, step: int) -> None:
        self.views.after_step(model, step)

    def warnings(self, rows: int) -> list[str]:
        return self.views.warnings(rows)

    def collapse(self, found: Mapping[str, dict[str, float]], step: int) -> str:
        return self.views.collapse(found, step)

    def validate(
        self, held_out: ValidationRows, measure: Measure, *, rows: int, every_token: bool
    ) -> dict[str, dict[str, float]]:
        arguments: dict[str, Any] = {"rows": rows, "every_token": every_token}
        return self.text.validate(held_out, measure, **arguments) | self.views.validate(held_out, measure, **arguments)
