"""Training instabilities: loss spikes and values that are not finite.

A step is bad if its loss or gradient is not finite, or if its loss is far above the running mean. Escalate: skip the
step, lower the rate and let training recover, roll back, abort. Nothing here depends on time or random numbers, so a
run that is killed and resumed escalates in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor


class Verdict(Enum):
    """What to do with a step's gradient."""

    APPLY = "apply"
    SKIP = "skip"
    LOWER = "lower"  # skip it, and lower the learning rate
    ROLL_BACK = "roll_back"  # to the previous checkpoint
    ABORT = "abort"


SKIPS = 4  # bad steps in a row that are only skipped
RECOVERY = 50  # steps in which training may recover after the rate was lowered
CALM = 10  # good steps in a row that end the recovery
ROLL_BACKS = 3  # rollbacks before the run is aborted
FORGIVEN = 1000  # good steps in a row after which rollbacks are counted from 0 again
MEMORY = 100  # steps of the running mean, and the number of good steps before spikes are detected


@dataclass
class Ladder:
    """The state of the escalation, as plain numbers, saved with every checkpoint.

    Attributes:
        seen: good steps so far.
        mean, variance: of the loss of good steps, as exponential averages over about ``MEMORY`` steps.
        bad, calm: bad and good steps in a row.
        recovering: steps left to recover in; 0: not recovering.
        rate: the factor by which the learning rate has been lowered.
        roll_backs: rollbacks so far.
        went_back_to: the step of the last rollback; -1: none.
    """

    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0
    bad: int = 0
    calm: int = 0
    recovering: int = 0
    rate: float = 1.0
    roll_backs: int = 0
    went_back_to: int = -1

    def judge(self, loss: float, gradient_norm: float, threshold: float) -> Verdict:
        """Decide what to do with a step; ``threshold`` of a spike is in standard deviations (0: no step is a spike)."""
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        if finite and loss <= self._highest(threshold):
            return self._good(loss)
        self.calm = 0
        self.bad += 1
        if self.recovering:
            self.recovering -= 1
            if finite and self.recovering:
                return Verdict.APPLY
            return self.roll_back()
        if self.bad <= SKIPS:
            return Verdict.SKIP
        if not finite:
            return self.roll_back()  # a lower rate does not help if nothing is finite
        self.recovering = RECOVERY
        self.rate /= 2
        return Verdict.LOWER

    def limit(self, threshold: float) -> float:
        """The highest finite loss of a next step that ``judge`` applies; infinity: any."""
        return math.inf if self.recovering > 1 else self._highest(threshold)

    def _highest(self, threshold: float) -> float:
        """The highest loss that is no spike."""
        if threshold <= 0 or self.seen < MEMORY:
            return math.inf
        return self.mean + threshold * max(math.sqrt(self.variance), 1e-3 * abs(self.mean))

    @property
    def in_trouble(self) -> bool:
        """Whether the weights may be damaged, so that a rollback should not return to them."""
        return self.bad > 0 or self.recovering > 0

    def _good(self, loss: float) -> Verdict:
        self.bad = 0
        self.calm += 1
        if self.calm >= CALM:
            self.recovering = 0
        if self.calm >= FORGIVEN:
            self.roll_backs, self.went_back_to = 0, -1
        self.seen += 1
        share = 1 / min(self.seen, MEMORY)
        deviation = loss - self.mean
        self.mean += share * deviation
        self.variance = (1 - share) * (self.variance + share * deviation * deviation)
        return Verdict.APPLY

    def roll_back(self) -> Verdict:
        """Decide what to do if skipping does not help, or if the weights themselves are not finite."""
        self.bad = self.calm = self.recovering = 0
        self.rate /= 2
        self.roll_backs += 1
        return Verdict.ROLL_BACK if self.roll_backs <= ROLL_BACKS else Verdict.ABORT


class Outcome:
    """The losses and the gradient norm of a step, which a GPU may still be computing; reading them waits for it.

    ``step`` is its number from 0, and ``shares`` are those of ``TrainModule.gradients``.
    """

    def __init__(
        self, step: int, losses: Mapping[str, Tensor], shares: Mapping[str, float], gradient_norm: Tensor
    ) -> None:
        self.step, self.shares, self._names = step, shares, list(losses)
        self._numbers = [*losses.values(), gradient_norm]
        self._copied: torch.cuda.Event | None = None

    def skip(self, limit: float) -> Tensor:
        """Decide on the device, without waiting: true (bool, a scalar) if the step is to be skipped.

        ``limit`` is ``Ladder.limit`` after all earlier steps. The numbers are those that ``Ladder.judge`` gets, in
        float64 and added in the same order, so both decide alike. Their copies to the CPU are queued here: ``read``
        then waits for them, and not for what is queued later.
        """
        numbers = torch.stack([number.detach().double() for number in self._numbers])
        *losses, norm = numbers.unbind()
        loss = sum(losses, start=torch.zeros_like(norm))
        self._numbers = list(numbers.to("cpu", non_blocking=True).unbind())  # into pinned memory
        if numbers.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        return ~(loss.isfinite() & norm.isfinite() & (loss <= limit))

    def read(self) -> tuple[dict[str, float], float]:
        """The losses by name, and the gradient norm."""
        if self._copied is not None:
            self._copied.synchronize()
        *losses, norm = map(float, self._numbers)
        return dict(zip(self._names, losses, strict=True)), norm
