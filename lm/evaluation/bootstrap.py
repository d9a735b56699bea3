"""Accuracy with its standard error, by bootstrap."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 1000
# Log-likelihoods closer than this count as equal: packed into another row, a sentence differs by about 1e-6 nats.
TIE_NATS = 1e-5


@dataclass(frozen=True)
class Accuracy:
    """A mean score with its standard error (bootstrap over the examples)."""

    mean: float
    error: float

    @classmethod
    def of(cls, scores: NDArray[np.float64]) -> Accuracy:
        """Return the accuracy from the scores of examples, (examples,)."""
        return cls(float(scores.mean()), standard_error(resampled_means(scores, 0)))

    def as_dict(self) -> dict[str, float]:
        return dict(vars(self))


def as_dicts(results: Mapping[str, Mapping[str, Accuracy]]) -> dict[str, dict[str, Any]]:
    """Results by name, ready for JSON."""
    return {name: {key: value.as_dict() for key, value in each.items()} for name, each in results.items()}


def resampled_means(scores: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Return means of scores resampled with replacement, (RESAMPLES,)."""
    draw = np.random.default_rng(seed)
    return np.array([scores[draw.integers(0, len(scores), len(scores))].mean() for _ in range(RESAMPLES)])


def standard_error(means: NDArray[np.float64]) -> float:
    """Return the standard error of a mean from its resampled values."""
    return float(means.std(ddof=1))
