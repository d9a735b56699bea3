"""What objectives that compare views share, be they views of images or of texts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.config.settings import Config
from lm.objectives.objective import BatchOf, Measure
from lm.objectives.view_method import FEWEST_STEPS, ViewMethod


class Views(ABC):
    """A ``Comparing`` objective (``lm.objectives.objective``) that learns by a ``ViewMethod``."""

    compares = True
    config: Config
    memory: nn.Module | None = None

    def __init__(self, method: ViewMethod) -> None:
        self.method, self.name, self.comparable = method, method.name, not method.with_teacher

    def remember(self, teacher: nn.Module, student: nn.Module) -> None:
        """Make the memory of step 0, as of ``ViewMethod.new_memory``."""
        self.memory = self.method.memory = self.method.new_memory(teacher, student)

    @property
    def teacher(self) -> nn.Module:
        """The teacher's model."""
        assert self.method.memory is not None
        return self.method.memory.model

    @abstractmethod
    def vectors(self, model: nn.Module, batch: Any) -> Tensor:
        """As of ``Comparing``."""

    @abstractmethod
    def targets(self, model: nn.Module, batch: Any) -> Tensor:
        """As of ``Comparing``."""

    def by_thing(self, found: Tensor) -> Tensor:
        """What the method compares, (n, …), of the vectors or targets of rows, (rows, …)."""
        return found

    def compare(self, vectors: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        return self.method.compare(self.by_thing(vectors), None if targets is None else self.by_thing(targets))

    def observe(self, targets: Tensor) -> None:
        self.method.observe(self.by_thing(targets))

    def after_step(self, model: nn.Module, step: int) -> None:
        self.method.after_step(model, step)

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The loss of a batch that is a whole step."""
        targets = self.targets(model, batch) if self.memory is not None else None
        return self.compare(self.vectors(model, batch), targets)

    def measured_by(self, batch: BatchOf, numbers: NDArray[np.int64], measure: Measure) -> dict[str, float]:
        """The ``loss`` of held-out rows whose views are the same in every validation, and what the method measures."""
        vectors = measure.vectors("vectors", numbers, batch)
        targets = measure.vectors("targets", numbers, batch) if self.memory is not None else None
        found = {"loss": float(sum(self.compare(vectors, targets).values()))}
        return found if targets is None else found | self.method.measured(self.by_thing(targets))

    def warnings(self, rows: int) -> list[str]:
        return self.method.warnings(rows)

    def collapse(self, found: Mapping[str, dict[str, float]], step: int) -> str:
        early = step < max(FEWEST_STEPS, self.method.slow_start * self.config.training.steps)
        if early or self.name not in found or not (why := self.method.collapse(found[self.name])):
            return ""
        return f"the model has collapsed at step {step:,}: {why}; start again with {self.method.against_collapse}"
