"""The face that all objectives share: what the training loop, and all that goes with it, asks of one.

    rows of the data -> prepare -> a batch -> loss(model, batch) -> named parts, which add up -> gradient -> after_step

``lm.config.objective_settings.OBJECTIVES`` lists the objectives, each with the file of this room that makes it. To add
one, see docs/adding-an-objective.md.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.config.objective_settings import OBJECTIVES, TEXT_VIEW_OBJECTIVES
from lm.config.settings import Config
from lm.data.training_data import stand_in
from lm.model.image_transformer import Model

BatchOf = Callable[[NDArray[np.int64]], Any]  # prepares the rows with these numbers


class Measure(Protocol):
    """What a model makes of held-out rows, over all ranks (``lm.training.validation``)."""

    def __call__(self, numbers: NDArray[np.int64], batches: Sequence[BatchOf]) -> tuple[float, float]:
        """The summed loss and the summed loss weights of the rows ``numbers``, as each of ``batches`` prepares them."""

    def vectors(self, what: str, numbers: NDArray[np.int64], batch_of: BatchOf) -> Tensor:
        """What the objective's method ``what`` returns for the rows, in order: float32 (rows, …), on the CPU."""


class Objective(Protocol):
    """What a model learns: how rows become a batch, and a batch a loss.

    Everything it does depends on the settings, the seed and the step alone, and on its ``memory``.

    Attributes:
        compares: its loss compares the rows of a whole step with each other. Then it is a ``Comparing`` objective. The
            batches of a ``Mixture`` (``lm.objectives.mixture``) also have rows that are predicted one by one.
        memory: what it keeps from step to step, if anything: a module with a teacher, a queue, a center. Checkpoints
            have its tensors; the optimizer does not see them.
        comparable: whether the losses of validations at different steps can be compared. A teacher's targets move.
    """

    compares: bool
    comparable: bool
    memory: nn.Module | None

    def new_model(self) -> Model:
        """The model to train, whose weights are not drawn yet."""

    def example(self, rows: int) -> Any:
        """A batch of the shapes of a training batch with ``rows`` rows, without data, to count its memory."""

    def flops_per_token(self, model: nn.Module, context_length: int) -> float:
        """Floating-point operations of one training token, or patch, of the data (``Transformer.flops_per_token``)."""

    def prepare(self, rows: Any) -> Any:
        """The batch of a whole optimizer step from its rows; called in a thread.

        The rows are ``lm.data.batch.Rows`` for text, ``lm.data.images.ImageRows`` for images.

        A batch has a length, its rows; ``rows(start, stop)``, a micro-batch; ``every(first, step)``, one rank's share;
        ``to(device)``; and ``parts``, the number of rows that a part of its loss is about, where these are not all.
        """

    def loss(self, model: nn.Module, batch: Any) -> dict[str, Tensor]:
        """The loss of a micro-batch, scalars by name: always the same parts, 0 if no row of it is about a part.

        The losses of a step's micro-batches, and of all ranks, add up to the step's loss.
        """

    def begin(self, model: nn.Module) -> None:
        """Make the ``memory`` of step 0, for a model with the weights of step 0, on the model's device."""

    def after_step(self, model: nn.Module, step: int) -> None:
        """Called after optimizer step ``step``, from 0, has changed the weights: a teacher follows, a queue moves."""

    def warnings(self, rows: int) -> list[str]:
        """What experience says against the settings, for data with ``rows`` training rows: a sentence each."""

    def collapse(self, found: Mapping[str, dict[str, float]], step: int) -> str:
        """A sentence with what to change if a validation at ``step`` shows that the model has collapsed; or ""."""

    def validate(self, held_out: Any, measure: Measure, *, rows: int, every_token: bool) -> dict[str, dict[str, float]]:
        """The numbers of a validation: groups by the name of what was measured, as the log has them.

        The first number of each group is what validations are compared by, lower is better.

        Args:
            held_out: the validation split (``lm.data.rows.ValidationRows`` for text, ``lm.data.images.ImageValidation``
                for images).
            rows: how many rows of the split to read; 0: all.
            every_token: predict everything that can be predicted, however long it takes.
        """


class Comparing(Objective, Protocol):
    """An objective whose loss compares the rows of a whole step, in any number of micro-batches and ranks.

    ``lm.training.gradients`` computes vectors and targets micro-batch by micro-batch, and the loss from all of them.
    """

    def vectors(self, model: nn.Module, batch: Any) -> Tensor:
        """What is compared of each row, with a gradient: float32 (rows, …)."""

    def targets(self, model: nn.Module, batch: Any) -> Tensor:
        """What the memory, as a teacher, makes of each row, without a gradient: float32 (rows, …).

        Called only if there is a ``memory``.
        """

    def compare(self, vectors: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """The loss of a whole step from the vectors and targets of all its rows, as of ``loss``."""

    def observe(self, targets: Tensor) -> None:
        """Note the targets of all rows of a training step for ``after_step``."""


def restore(objective: Objective, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Bring back the memory that a checkpoint with the weights of ``model`` has; empty: that of step 0."""
    objective.begin(model)
    if objective.memory is not None and state:
        objective.memory.load_state_dict(dict(state))


def open_objective(config: Config, inputs: Any = None) -> Objective:
    """The objective that the settings name.

    ``inputs`` is what it needs to know of the model's inputs: ``lm.data.batch.Vocabulary`` for text, for images
    ``data_prep.shards.images.ImageFormat``. None: one that fits the settings, without data.
    """
    inputs, shares = inputs or stand_in(config), config.objective.shares

    def opened(name: str, config: Config) -> Any:
        return importlib.import_module(f"lm.objectives.{OBJECTIVES[name][0]}").open_objective(config, inputs)

    if len(shares) == 1:
        return cast(Objective, opened(next(iter(shares)), config))
    mixture = importlib.import_module("lm.objectives.mixture")
    text = [opened(name, config.replace(objective=name)) for name in shares if name not in TEXT_VIEW_OBJECTIVES]
    predicting = mixture.TextMixture(config, inputs, text) if len(text) > 1 else text[0]
    views = [opened(name, config) for name in shares if name in TEXT_VIEW_OBJECTIVES]
    return cast(Objective, mixture.Mixture(config, predicting, *views) if views else predicting)
