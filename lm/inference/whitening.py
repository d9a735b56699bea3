"""Vectors whose numbers are uncorrelated: for language models, the cosine then says more about meaning.

Hidden states of all texts share a few large directions, such as that of frequent words, and the cosine measures those.
Whitening (Su et al. 2021, "Whitening Sentence Representations for Better Semantics and Faster Retrieval") subtracts the
mean and scales every direction to the same variance, which takes unlabeled texts of the kind to compare.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError

# Directions with less than this share of the largest variance are scaled as if they had so much: they are mostly noise.
LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class Whitening:
    """``mean`` (width,) and the symmetric ``matrix`` (width, width), float64."""

    mean: NDArray[np.float64]
    matrix: NDArray[np.float64]

    def __call__(self, vectors: NDArray[np.float32]) -> NDArray[np.float32]:
        """Vectors (n, width) with about the identity as covariance, as near to the given ones as that allows."""
        return ((vectors - self.mean) @ self.matrix).astype(np.float32)


def fit_whitening(parts: Iterable[NDArray[np.float32]]) -> Whitening:
    """The whitening of all vectors in ``parts``, each (n, width), which are read one after another.

    Raises:
        UserError: there are fewer vectors than a vector has numbers, or all are equal.
    """
    count, total, products = 0, np.zeros(()), np.zeros(())
    for part in parts:
        exact = part.astype(np.float64)
        count, total, products = count + len(part), total + exact.sum(0), products + exact.T @ exact
    if not count:
        raise UserError("there are no texts to whiten by")
    if count <= total.size:
        raise UserError(
            f"whitening takes more texts than a vector has numbers: there are {count:,} for {total.size:,} numbers"
        )
    mean = total / count
    variances, directions = np.linalg.eigh(products / count - np.outer(mean, mean))
    if not variances[-1] > 1e-12 * mean @ mean:
        raise UserError("the texts to whiten by all have the same vector")
    scales = np.maximum(variances, LEAST_VARIANCE * variances[-1]) ** -0.5
    return Whitening(mean, (directions * scales) @ directions.T)
