"""Predict the tokens of some rows and compare views of others: each objective has its share of a step's rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lm.config.settings import Config
from lm.data.batch import Batch, Rows
from lm.data.keyed_random import Stream, key, uniform
from lm.data.rows import ValidationRows
from lm.data.text_views import TextViewBatch
from lm.model.transformer import Transformer
from lm.objectives.objective import Measure
from lm.objectives.text import TextObjective
from lm.objectives.text_views import TextViews


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
        """Which rows are compared is drawn for each step, so that a schedule of several corpora cannot decide it."""
        count = len(rows.numbers)
        drawn = np.argsort(uniform(key(self.seed, Stream.MIXTURE), rows.numbers, 1)[:, 0], kind="stable")
        compared, predicted = (np.sort(some) for some in np.split(drawn, [round(self.share * count)]))
        first = int(rows.numbers[0]) // count * len(predicted)
        turns = first + np.arange(len(predicted), dtype=np.int64)
        batch = self.text.prepare(replace(rows.chosen(predicted), turns=turns))
        weighted = replace(batch, loss_weights=batch.loss_weights * (1 - self.share))
        return MixedBatch(weighted, self.views.prepare(rows.chosen(compared)))

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
