"""What a task of fine-tuning has to provide."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from lm.config.settings import Config
from lm.data.examples import Example
from lm.finetuning.task_inputs import TaskExample


class Task(ABC):
    """The part of a fine-tuning that depends on its task; ``lm.finetuning.finetune.Finetuning`` does the rest.

    ``train`` and ``validation`` are the encoded examples, ``validation`` possibly empty. ``hashed_texts`` are texts
    besides the examples that determine what is learned; they are part of the run's data fingerprint.
    """

    train: Sequence[TaskExample]
    validation: Sequence[TaskExample]
    hashed_texts: tuple[str, ...] = ()

    @abstractmethod
    def __init__(self, config: Config, processor: Any, train: Sequence[Example], validation: Sequence[Example]) -> None:
        """Encode the examples with the base's tokenizer, or its format of images.

        The settings have no "auto" left (``finetune.settle_reading``).

        Raise UserError if the task cannot be learned from these examples, or from this base run.
        """

    def introduction(self) -> list[str]:
        """What the user should know before the first step, one sentence each."""
        return []

    def save(self, path: Path) -> None:
        """Write the files that the run directory ``path`` needs besides weights and settings."""
        return

    def model(self, trunk: Any) -> nn.Module:
        """The model to train: the pretrained trunk, with a head if the task needs one."""
        return trunk

    @abstractmethod
    def batch(self, numbers: NDArray[Any], epochs: NDArray[Any]) -> Any:
        """The batch of one step, from the training examples ``numbers``, int64; called in a background thread.

        ``epochs``, int64, are those in which the examples are read, from 0: each may see them in another way.
        """

    @abstractmethod
    def gradients(self, model: nn.Module, batch: Any, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """As ``lm.training.train_module.TrainModule.gradients``."""

    @abstractmethod
    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        """As ``lm.training.train_module.TrainModule.validate``."""
