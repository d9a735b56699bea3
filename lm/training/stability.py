"""Trouble while training: steps that cannot be trusted, and weights that learn the text by heart.

A step is bad when its loss or gradient is not finite, or its loss stands far above the running mean. The answer climbs
a ladder: leave the step out; after some in a row lower the learning rate and let the weights mend; if they do not, go
back to a checkpoint with a lower rate still; at last give up. Nothing here looks at a clock or a random number, so a
run that is killed and continued meets its trouble the same way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """What to do with a step's gradient."""

    APPLY = "apply"
    SKIP = "skip"
    LOWER = "lower"  # skip it, and go on with a lower learning rate
    ROLL_BACK = "roll_back"  # to the checkpoint before
    GIVE_UP = "give_up"


SKIPS = 4  # bad steps in a row that are only left out
RECOVERY = 50  # steps that the weights have to mend themselves after the rate was lowered
CALM = 10  # good steps in a row after which trouble is over
ROLL_BACKS = 3  # that may be tried before the run ends
FORGIVEN = 1000  # good steps in a row after which they are counted anew
MEMORY = 100  # steps over which the running mean forgets, and the first at which a spike can be told


@dataclass
class Ladder:
    """What has been tried; plain numbers, saved with every checkpoint.

    ``mean`` and ``variance`` are of the loss of good steps (exponential, over about ``MEMORY`` steps); ``rate`` is the
    factor by which trouble has lowered the learning rate; ``went_back_to`` the step of the last going back (-1: none).
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
        """What to do with a step of this loss; ``threshold`` is in standard deviations (0: no step is a spike)."""
        finite = math.isfinite(loss) and math.isfinite(gradient_norm)
        if finite and not self._is_spike(loss, threshold):
            return self._good(loss)
        self.calm = 0
        self.bad += 1
        if self.recovering:
            self.recovering -= 1
            if finite and self.recovering:
                return Verdict.APPLY
            return self._go_back()
        if self.bad <= SKIPS:
            return Verdict.SKIP
        if not finite:
            return self._go_back()  # a lower rate mends no weights that give no number
        self.recovering = RECOVERY
        self.rate /= 2
        return Verdict.LOWER

    @property
    def in_trouble(self) -> bool:
        """Whether the weights are under suspicion, and should not be saved for going back to."""
        return self.bad > 0 or self.recovering > 0

    def broken(self) -> Verdict:
        """What to do when the weights themselves are not finite."""
        return self._go_back()

    def _is_spike(self, loss: float, threshold: float) -> bool:
        deviation = max(math.sqrt(self.variance), 1e-3 * abs(self.mean))
        return threshold > 0 and self.seen >= MEMORY and loss > self.mean + threshold * deviation

    def _good(self, loss: float) -> Verdict:
        self.bad = 0
        self.calm += 1
        if self.calm >= CALM:
            self.recovering = 0
        if self.calm >= FORGIVEN:
            self.roll_backs, self.went_back_to = 0, -1
        self.seen += 1
        share = 1 / min(self.seen, MEMORY)
        apart = loss - self.mean
        self.mean += share * apart
        self.variance = (1 - share) * (self.variance + share * apart * apart)
        return Verdict.APPLY

    def _go_back(self) -> Verdict:
        self.bad = self.calm = self.recovering = 0
        self.rate /= 2
        self.roll_backs += 1
        return Verdict.ROLL_BACK if self.roll_backs <= ROLL_BACKS else Verdict.GIVE_UP
