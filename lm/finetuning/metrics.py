"""Metrics of predicted labels from scikit-learn and SciPy, and calibration.

Higher is better for every metric. A constant answer scores 0 in all but accuracy and the F1s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError

# By task; the first one is the default that a task is judged by.
METRICS = {
    "classification": ("accuracy", "f1", "macro_f1", "matthews"),
    "regression": ("spearman", "pearson"),
    "image_classification": ("accuracy", "f1", "macro_f1", "matthews"),
}
CALIBRATION_BINS = 10


def require_libraries() -> None:
    """Raise ``UserError`` if the packages of the extra ``tasks`` are not installed."""
    try:
        import scipy  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError('task metrics need the package "scikit-learn": pip install "kindling-lm[tasks]"') from None


def metrics_of(truth: NDArray[Any], outputs: NDArray[np.float64], classes: int) -> dict[str, float]:
    """All metrics of a model's outputs: probabilities (examples, classes), or if ``classes`` is 0 numbers (examples,).

    ``truth`` (examples,) holds classes from 0, or numbers.
    """
    return classification_metrics(truth, outputs.argmax(1), classes) if classes else regression_metrics(truth, outputs)


def classification_metrics(truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> dict[str, float]:
    """Metrics of predicted classes, numbers from 0; both arguments are (examples,).

    ``accuracy``; ``f1`` of the second class, where there are two (what GLUE reports for MRPC); ``macro_f1``, the mean
    over all classes; ``matthews``, the correlation of Matthews 1975, for more than two classes that of Gorodkin 2004.
    """
    require_libraries()
    from sklearn import metrics

    found = {"accuracy": float(metrics.accuracy_score(truth, predicted))}
    if classes == 2:
        found["f1"] = float(metrics.f1_score(truth, predicted, zero_division=0))
    every = range(classes)
    found["macro_f1"] = float(metrics.f1_score(truth, predicted, labels=every, average="macro", zero_division=0))
    constant = np.ptp(truth) == 0 or np.ptp(predicted) == 0  # then it is undefined
    found["matthews"] = 0.0 if constant else float(metrics.matthews_corrcoef(truth, predicted))
    return found


def regression_metrics(truth: NDArray[np.float64], predicted: NDArray[np.float64]) -> dict[str, float]:
    """``pearson`` and ``spearman`` correlation of numbers, both (examples,); 0 where a constant leaves it undefined."""
    require_libraries()
    from scipy import stats

    constant = np.ptp(truth) == 0 or np.ptp(predicted) == 0
    measures = {"spearman": stats.spearmanr, "pearson": stats.pearsonr}
    return {name: 0.0 if constant else float(of(truth, predicted).statistic) for name, of in measures.items()}


def confusion_matrix(truth: NDArray[np.int64], predicted: NDArray[np.int64], classes: int) -> NDArray[np.int64]:
    """How many examples of each true class (row) got each predicted class (column): int64 (classes, classes)."""
    return np.bincount(truth * classes + predicted, minlength=classes * classes).reshape(classes, classes)


@dataclass(frozen=True)
class Bin:
    """Predictions with confidence in one part of [0, 1]: their mean confidence and their accuracy."""

    confidence: float
    accuracy: float
    examples: int


def calibration(
    probabilities: NDArray[np.float64], truth: NDArray[np.int64], bins: int = CALIBRATION_BINS
) -> tuple[list[Bin], float]:
    """Calibration: whether predictions made with 70% confidence are right 70% of the time (Guo et al. 2017).

    Returns the bins that hold predictions, and the expected calibration error: the mean over examples of |confidence -
    accuracy| of their bin. ``probabilities`` are (examples, classes), ``truth`` their classes, (examples,).
    """
    confidence = probabilities.max(1)
    right = probabilities.argmax(1) == truth
    number = np.minimum((confidence * bins).astype(np.int64), bins - 1)
    found = [
        Bin(float(confidence[inside].mean()), float(right[inside].mean()), int(inside.sum()))
        for inside in (number == n for n in range(bins))
        if inside.any()
    ]
    error = math.fsum(each.examples * abs(each.confidence - each.accuracy) for each in found)
    return found, error / max(len(truth), 1)
