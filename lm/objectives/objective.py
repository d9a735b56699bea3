"""The face that all objectives share: what the training loop, and all that goes with it, asks of one.

    rows of the data -> prepare -> a batch -> loss(model, batch) -> named parts, which add up -> gradient -> after_step

``lm.config.settings.OBJECTIVES`` lists the objectives, each with the file of this room that makes it. To add one, see
docs/adding-an-objective.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.config.settings import OBJECTIVES, Config

# Sums the loss of a model on held-out rows over all ranks (``lm.training.validation``): from the rows' numbers, and
# functions that each prepare such rows, to the summed loss and the summed loss weights.
Measure = Callable[[NDArray[np.int64], Sequence[Callable[[NDArray[np.int64]], Any]]], tuple[float, float]]


class Objective(Protocol):
    """What a model learns: how rows become a batch, and a batch a loss.

    Everything it does depends on the settings, the seed and the step alone. What else it keeps (a teacher, a queue, a
    center) is its ``state``.
    """

    def prepare(self, rows: Any) -> Any:
        """The batch of a whole optimizer step from its rows (``lm.data.batch.Rows`` for text); called in a thread.

        A batch has a length, its rows; ``rows(start, stop)``, a micro-batch; ``every(first, step)``, one rank's share;
        ``to(device)``; and ``parts``, the number of rows that a part of its loss is about, where these are not all.
        """

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The loss of a micro-batch, scalars by name: always the same parts, 0 if no row of it is about a part.

        The losses of a step's micro-batches, and of all ranks, add up to the step's loss.
        """

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after optimizer step ``step``, from 0, has changed the weights: a teacher follows, a queue moves."""

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps besides weights and optimizer; empty if there is nothing."""

    def restore(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Take up the state of a checkpoint whose weights ``model`` has; empty: that of step 0."""

    def validate(self, held_out: Any, measure: Measure, *, rows: int, every_token: bool) -> dict[str, dict[str, float]]:
        """The numbers of a validation: groups by the name of what was measured, as the log has them.

        The first number of each group is what validations are compared by, lower is better.

        Args:
            held_out: the validation split (``lm.data.rows.ValidationRows`` for text).
            rows: how many rows of the split to read; 0: all.
            every_token: predict everything that can be predicted, however long it takes.
        """


def open_objective(config: Config, vocabulary: Any) -> Objective:
    """The objective that the settings name, for data with this vocabulary (``lm.data.batch.Vocabulary`` for text)."""
    file, _ = OBJECTIVES[config.objective.objective]
    objective: Objective = importlib.import_module(f"lm.objectives.{file}").open_objective(config, vocabulary)
    return objective
