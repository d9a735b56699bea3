"""What a task yields without training the model: baselines from the text alone, and probes of frozen features.

Each function learns from training examples and predicts others: ``majority`` and ``tfidf`` from their texts,
``nearest`` (k-NN) and ``linear`` (logistic or ridge regression) from their vectors (``lm.inference.embedding``). The
hyperparameter, k or the strength of the regularization, is chosen on a fifth of the training examples, drawn by
``seed``; then the model is fitted on all of them. Test examples play no part in the choice.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lm.finetuning.heads import pair_features
from lm.finetuning.metrics import metrics_of, require_libraries

HELD_OUT = 0.2  # of the training examples, to choose hyperparameters
STRENGTHS = tuple(10.0**power for power in range(-3, 4))  # C of logistic regression, 1 / alpha of ridge regression
NEIGHBORS = (1, 3, 5, 9, 17, 33, 65)

Texts = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Predictions:
    """Predictions for test examples, and the number of ``parameters`` that were learned for them.

    ``outputs`` are probabilities, float64 (examples, classes), or for a regression numbers, float64 (examples,);
    ``chosen`` describes what was chosen on training examples; ``seconds`` is the time of all processes, if several.
    """

    outputs: NDArray[np.float64]
    parameters: int
    chosen: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Target:
    """What is learned: ``values`` of the training examples, and the metric (``lm.finetuning.metrics``) to maximize.

    The values are int64, classes from 0 up to ``classes``, or if that is 0 float64, the numbers of a regression.
    """

    values: NDArray[Any]
    classes: int
    metric: str


def majority(target: Target, examples: int) -> Predictions:
    """Predict the frequencies of the classes, or for a regression the mean, for every example."""
    if target.classes:
        shares = np.bincount(target.values, minlength=target.classes) / len(target.values)
        return Predictions(np.tile(shares, (examples, 1)), 0)
    return Predictions(np.full(examples, target.values.mean()), 0)


def tfidf(train: Texts, target: Target, test: Texts, seed: int) -> Predictions:
    """A linear model (logistic regression; ridge for numbers) over TF-IDF of words and word pairs.

    The features of a pair of texts are combined by ``lm.finetuning.heads.pair_features``.
    """
    require_libraries()
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Single characters and punctuation count as words: "?" says a lot about a question.
    counting = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]")
    counting.fit(part for text in train for part in text)

    def features(texts: Texts) -> Any:
        first, *others = (sparse.csr_array(counting.transform(column)) for column in zip(*texts, strict=True))
        return sparse.hstack(pair_features(first, others[0]), format="csr") if others else first

    return _linear(features(train), features(test), target, seed)


def linear(train: NDArray[np.float32], target: Target, test: NDArray[np.float32], seed: int) -> Predictions:
    """A linear model (logistic regression; ridge for numbers) on standardized vectors (examples, width)."""
    return _linear(*_standardized(train, test), target, seed)


def linear_of_many(train: NDArray[np.float32], target: Target, test: NDArray[np.float32], seed: int) -> Predictions:
    """As ``linear`` for classes, by ``lm.evaluation.logistic``, for many examples of many numbers, such as images."""
    from lm.evaluation.logistic import LogisticRegression

    train, test = _standardized(train, test)
    fitted, strength = _chosen(STRENGTHS, LogisticRegression, train, target, seed)
    parameters = fitted.coef_.size + fitted.intercept_.size
    return Predictions(_outputs(fitted, test, target.classes), parameters, f"C {strength:g}")


def _standardized(
    train: NDArray[np.float32], test: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    mean, deviation = train.mean(0), train.std(0)
    scale = np.where(deviation > 0, deviation, 1)
    return (train - mean) / scale, (test - mean) / scale


def nearest(train: NDArray[np.float32], target: Target, test: NDArray[np.float32], seed: int) -> Predictions:
    """k nearest neighbors by the cosine of vectors (examples, width), each with one vote."""
    require_libraries()
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    kind = KNeighborsClassifier if target.classes else KNeighborsRegressor
    numbers = [k for k in NEIGHBORS if k <= len(train) * (1 - HELD_OUT)]
    fitted, k = _chosen(numbers, lambda k: kind(k, metric="cosine", algorithm="brute"), train, target, seed)
    return Predictions(_outputs(fitted, test, target.classes), 0, f"k {k}")


def _linear(train: Any, test: Any, target: Target, seed: int) -> Predictions:
    require_libraries()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    def untrained(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=500) if target.classes else Ridge(alpha=1 / strength)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # an unconverged candidate is still a candidate
        fitted, strength = _chosen(STRENGTHS, untrained, train, target, seed)
    parameters = int(np.size(fitted.coef_) + np.size(fitted.intercept_))
    name = f"C {strength:g}" if target.classes else f"alpha {1 / strength:g}"
    return Predictions(_outputs(fitted, test, target.classes), parameters, name)


def _chosen(
    candidates: Sequence[Any], untrained: Callable[[Any], Any], features: Any, target: Target, seed: int
) -> tuple[Any, Any]:
    """Choose the best candidate on held-out training examples (the first of equals), and fit it on all of them."""
    order = np.random.default_rng(seed).permutation(len(target.values))
    held = max(1, round(len(order) * HELD_OUT))
    out, rest = order[:held], order[held:]
    if target.classes and len(np.unique(target.values[rest])) < 2:
        best = candidates[len(candidates) // 2]  # too few examples to choose
    else:
        scores = []
        for candidate in candidates:
            fitted = untrained(candidate).fit(features[rest], target.values[rest])
            outputs = _outputs(fitted, features[out], target.classes)
            scores.append(metrics_of(target.values[out], outputs, target.classes)[target.metric])
        best = candidates[int(np.argmax(scores))]
    return untrained(best).fit(features, target.values), best


def _outputs(fitted: Any, features: Any, classes: int) -> NDArray[np.float64]:
    """Predictions of a fitted model of scikit-learn; a class that it has not seen has probability 0."""
    if not classes:
        return np.asarray(fitted.predict(features), dtype=np.float64)
    outputs = np.zeros((features.shape[0], classes))
    outputs[:, fitted.classes_] = fitted.predict_proba(features)
    return outputs
