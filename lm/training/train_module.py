"""What the training loop asks of the thing it trains."""

from __future__ import annotations

from typing import Any, Protocol, TypeVar

from torch import Tensor, nn

from lm.config.settings import Config
from lm.runs.metrics_log import Best
from lm.runs.resume import Source

Batch = TypeVar("Batch")


class TrainModule(Source, Protocol[Batch]):
    """What a run does where runs differ (``pretraining``, ``finetune``); the loop does what they share.

    Whatever is asked of it depends on the settings, the seed and the step alone. ``config`` has every setting, with
    ``training.steps`` the last step. The weights that are trained and saved are those that require a gradient.
    """

    config: Config

    def prepare(self, done: int) -> list[str]:
        """Get ready to go on at step ``done`` and say what a person wants to know first; may change ``config``."""
        ...

    def model(self) -> nn.Module:
        """A model with the weights of step 0."""
        ...

    def lr_multipliers(self, model: nn.Module) -> dict[str, float]:
        """Shares of the learning rate, by the name of a parameter; 1 for those left out."""
        ...

    def batch(self, step: int) -> Batch:
        """This rank's part of the batch of step ``step``, from 0; called in a thread of its own."""
        ...

    def gradients(self, model: nn.Module, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Leave a step's gradient in the parameters; each part of its loss (they add up), and that part's share."""
        ...

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        """What the log says of a validation, and the number it is judged by: the lower the better; None: by none."""
        ...

    def remark(self, best: Best) -> str:
        """What a person should know after a validation; "" for nothing."""
        ...

    def should_stop(self, best: Best) -> bool:
        """Whether to end here, a validation having said so."""
        ...

    def progress(self, steps: int) -> dict[str, float]:
        """What ``steps`` steps have read, for the log: ``tokens`` and ``epoch``."""
        ...

    def throughput(self, seconds_per_step: float) -> dict[str, float]:
        """How fast that is, for the log: ``tokens_per_second``, and more where it is known."""
        ...
