"""What a task gives to those who do not train the model: floors of the text alone, and probes of frozen features.

Each function learns from training examples and answers others: ``majority`` and ``tfidf`` from their texts, ``nearest``
(k-NN) and ``linear`` (logistic or ridge regression) from their vectors (``embedding``). What must be chosen, k or the
strength of the regularisation, is chosen on a fifth of the training examples, drawn by ``seed``; then all are learnt
from. Test examples choose nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lm.finetuning import heads
from lm.finetuning.metrics import metrics_of, require_libraries

HELD_OUT = 0.2  # of the training examples, to choose by
STRENGTHS = tuple(10.0**power for power in range(-3, 4))  # C of logistic regression, 1 / alpha of ridge regression
NEIGHBOURS = (1, 3, 5, 9, 17, 33, 65)

Texts = Sequence[tuple[str, ...]]


@dataclass(frozen=True)
class Answers:
    """What was answered for test examples, ``parameters`` being the numbers that were learnt for it.

    ``outputs`` are probabilities, float64 (examples, classes), or for a regression numbers, float64 (examples,);
    ``chosen`` says in words what was chosen on training examples; ``seconds`` is the time that it took, if it was not
    all in one go.
    """

    outputs: NDArray[np.float64]
    parameters: int
    chosen: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Target:
    """What is learnt: ``values`` of the training examples, and the metric (``metrics``) that is maximised.

    The values are int64, classes from 0 up to ``classes``, or if that is 0 float64, the numbers of a regression.
    """

    values: NDArray[Any]
    classes: int
    metric: str

    def score(self, truth: NDArray[Any], outputs: NDArray[np.float64]) -> float:
        return metrics_of(truth, outputs, self.classes)[self.metric]


def majority(target: Target, examples: int) -> Answers:
    """Each class as likely as it is common; for a regression the mean. Nothing of the examples is looked at."""
    if target.classes:
        shares = np.bincount(target.values, minlength=target.classes) / len(target.values)
        return Answers(np.tile(shares, (examples, 1)), 0)
    return Answers(np.full(examples, target.values.mean()), 0)


def tfidf(train: Texts, target: Target, test: Texts, seed: int) -> Answers:
    """Linear regression (logistic for classes) on how often words and pairs of neighbouring words occur (TF-IDF).

    Of a pair of texts, u and v being theirs, the features are u, v, |u - v| and u * v.
    """
    require_libraries()
    from scipy import sparse
    from sklearn.feature_extraction.text import TfidfVectorizer

    # Single characters and punctuation are words too: "?" tells much about a question.
    counting = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]")
    counting.fit(part for text in train for part in text)

    def features(texts: Texts) -> Any:
        first, *others = (counting.transform(column) for column in zip(*texts, strict=True))
        if not others:
            return first
        second = others[0]  # put together as ``lm.finetuning.heads.pair_vectors`` does
        return sparse.hstack([first, second, abs(first - second), first.multiply(second)], format="csr")

    return _linear(features(train), target, features(test), seed)


def linear(train: NDArray[np.float32], target: Target, test: NDArray[np.float32], seed: int) -> Answers:
    """Linear regression (logistic for classes) on vectors (examples, width), standardised by those of training."""
    mean, deviation = train.mean(0), train.std(0)
    scale = np.where(deviation > 0, deviation, 1)
    return _linear((train - mean) / scale, target, (test - mean) / scale, seed)


def nearest(train: NDArray[np.float32], target: Target, test: NDArray[np.float32], seed: int) -> Answers:
    """The k nearest training examples by the cosine of their vectors (examples, width), each with one vote."""
    require_libraries()
    from sklearn.neighbors import KNeighborsClassifier, KNeighborsRegressor

    kind = KNeighborsClassifier if target.classes else KNeighborsRegressor
    numbers = [k for k in NEIGHBOURS if k <= len(train) * (1 - HELD_OUT)]
    fitted, k = _chosen(numbers, lambda k: kind(k, metric="cosine", algorithm="brute"), train, target, seed)
    return Answers(_outputs(fitted, test, target.classes), 0, f"k {k}")


def pair_vectors(first: NDArray[np.float32], second: NDArray[np.float32]) -> NDArray[np.float32]:
    """One vector for each pair of vectors (examples, width): u, v, |u - v| and u * v (Conneau et al. 2017)."""
    return heads.pair_vectors(torch.from_numpy(first), torch.from_numpy(second)).numpy()


def _linear(train: Any, target: Target, test: Any, seed: int) -> Answers:
    require_libraries()
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression, Ridge

    def untrained(strength: float) -> Any:
        return LogisticRegression(C=strength, max_iter=500) if target.classes else Ridge(alpha=1 / strength)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # where it stops is one more candidate, chosen or not
        fitted, strength = _chosen(STRENGTHS, untrained, train, target, seed)
    parameters = int(np.size(fitted.coef_) + np.size(fitted.intercept_))
    name = f"C {strength:g}" if target.classes else f"alpha {1 / strength:g}"
    return Answers(_outputs(fitted, test, target.classes), parameters, name)


def _chosen(
    candidates: Sequence[Any], untrained: Callable[[Any], Any], features: Any, target: Target, seed: int
) -> tuple[Any, Any]:
    """Fit each candidate on a part of the training examples; the best on the rest, the first of equals, on all."""
    order = np.random.default_rng(seed).permutation(len(target.values))
    held = max(1, round(len(order) * HELD_OUT))
    out, rest = order[:held], order[held:]
    if target.classes and len(np.unique(target.values[rest])) < 2:
        best = candidates[len(candidates) // 2]  # too few examples to choose by
    else:
        scores = []
        for candidate in candidates:
            fitted = untrained(candidate).fit(features[rest], target.values[rest])
            scores.append(target.score(target.values[out], _outputs(fitted, features[out], target.classes)))
        best = candidates[int(np.argmax(scores))]
    return untrained(best).fit(features, target.values), best


def _outputs(fitted: Any, features: Any, classes: int) -> NDArray[np.float64]:
    """Answers of a fitted model of scikit-learn; a class that it has not seen has probability 0."""
    if not classes:
        return np.asarray(fitted.predict(features), dtype=np.float64)
    outputs = np.zeros((features.shape[0], classes))
    outputs[:, fitted.classes_] = fitted.predict_proba(features)
    return outputs
