"""What the training loop asks of what it trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from lm.config.settings import Config
from lm.objectives.objective import Objective
from lm.runs.directory import Processor
from lm.runs.metrics_log import Best

Batch = TypeVar("Batch")


class TrainModule(ABC, Generic[Batch]):
    """The part of a run that depends on what is trained (``pretraining``, ``lm.finetuning.finetune``).

    Everything it returns depends on the settings, the seed and the step alone. The weights that are trained and saved
    are those that require a gradient.

    Attributes:
        name, fingerprint, processor: as of ``lm.runs.resume.TrainingSource``.
        config: every setting, with ``training.steps`` the last step.
        objective: what is learned, if it may keep state of its own or be trained by several processes.
    """

    name: str
    fingerprint: str
    processor: Processor
    config: Config
    objective: Objective | None = None

    @abstractmethod
    def prepare(self, done: int) -> list[str]:
        """Get ready to start or resume at step ``done``; return the lines to print first. May change ``config``."""

    @abstractmethod
    def model(self) -> nn.Module:
        """A model with the weights of step 0."""

    def lr_multipliers(self, model: nn.Module) -> dict[str, float]:
        """Learning-rate multipliers by the name of a parameter; 1 for those left out."""
        return {}

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """This rank's share of the batch of step ``step``, from 0; called in a thread of its own."""

    @abstractmethod
    def gradients(self, model: nn.Module, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Leave a step's gradient in the parameters; return the loss by named part (they add up), and their shares."""

    @abstractmethod
    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        """The log's line of a validation, and its score (lower is better; None: there is none)."""

    def remark(self, step: int, line: dict[str, Any], best: Best) -> str:
        """A remark for the user after a validation at ``step``, which has the log's ``line``; or ""."""
        return ""

    def should_stop(self, best: Best) -> bool:
        """Whether the last validation ends the run early."""
        return False

    @abstractmethod
    def progress(self, steps: int) -> dict[str, float]:
        """What ``steps`` steps have read, for the log: ``tokens`` and ``epoch``."""

    @abstractmethod
    def throughput(self, seconds_per_step: float) -> dict[str, float]:
        """The speed, for the log: ``tokens_per_second``, and more where it is known."""
