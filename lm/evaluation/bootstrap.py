"""Accuracy with its standard error, by bootstrap."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
# Log-likelihoods that differ by less are equal: the same sentence packed into another row differs by some 1e-6 nats.
TIE_NATS = 1e-5


@dataclass(frozen=True)
class Accuracy:
    """A mean score, and its standard error (bootstrap over the examples)."""

    mean: float
    error: float

    @classmethod
    def of(cls, scores: NDArray[np.float64]) -> Accuracy:
        """Of the scores of some examples, (examples,)."""
        return cls(float(scores.mean()), standard_error(resampled_means(scores, 0)))

    def as_dict(self) -> dict[str, float]:
        return dict(vars(self))


def resampled_means(scores: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Means of the scores drawn with replacement, (RESAMPLES,)."""
    draw = np.random.default_rng(seed)
    return np.array([scores[draw.integers(0, len(scores), len(scores))].mean() for _ in range(RESAMPLES)])


def standard_error(means: NDArray[np.float64]) -> float:
    """Of a mean whose resampled values are ``means``."""
    return float(means.std(ddof=1))
