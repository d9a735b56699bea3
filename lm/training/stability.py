"""Training instabilities: loss spikes and values that are not finite.

A step is bad if its loss or gradient is not finite, or if its loss is far above the running mean. Escalate: skip the
step, lower the rate and let training recover, roll back, abort. Nothing here depends on time or random numbers, so a
run that is killed and resumed escalates in the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


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
        highest = self.mean + threshold * max(math.sqrt(self.variance), 1e-3 * abs(self.mean))
        if finite and not (threshold > 0 and self.seen >= MEMORY and loss > highest):
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
