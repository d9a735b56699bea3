"""k-means over patches of images, in whole numbers: its result depends on the patches and the seed alone."""

from __future__ import annotations

import numpy as np

from data_prep.errors import UserError
from data_prep.shards.codebook import Codebook

MOST_ROUNDS = 50
AT_ONCE = 8192  # patches compared at a time


def random_numbers(count: int, seed: int) -> np.ndarray:
    """Return 64-bit random numbers, the same ones with every version of NumPy: uint64, shape ``(count,)``."""
    return np.random.PCG64(seed).random_raw(count)


def fit_codes(patches: np.ndarray, codes: int, seed: int) -> np.ndarray:
    """Return the codes of Lloyd's algorithm, rounded to whole pixel values: uint8, shape ``(codes, width)``.

    It begins with random patches, all different, and ends after ``MOST_ROUNDS`` at the latest.

    Args:
        patches: uint8, shape ``(n, width)``.

    Raises:
        UserError: there are not as many different patches.
    """
    different, counts = np.unique(patches, axis=0, return_counts=True)
    if len(different) < codes:
        raise UserError(f"the images have only {len(different):,} different patches: choose --codes at most that")
    first = np.argsort(random_numbers(len(different), seed), kind="stable")[:codes]
    found = different[np.sort(first)]
    for _ in range(MOST_ROUNDS):
        before, found = found, improved(found, different, counts)
        if np.array_equal(before, found):
            break
    return found


def improved(codes: np.ndarray, patches: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Return the codes after one round: each is the rounded mean of the patches nearest to it.

    The k-th unused code becomes the patch that is k-th farthest from its code.

    Args:
        patches: uint8, shape ``(n, width)``, all different.
        counts: how often each one occurs.
    """
    nearest, distances = encode(codes, patches)
    order = np.argsort(nearest, kind="stable")
    used, starts = np.unique(nearest[order], return_index=True)
    weights = counts[order].astype(np.int64)[:, None]
    sums, totals = (np.add.reduceat(each, starts, axis=0) for each in (patches[order] * weights, weights))
    moved = codes.copy()
    moved[used] = (2 * sums + totals) // (2 * totals)
    unused = np.setdiff1d(np.arange(len(codes)), used)
    moved[unused] = patches[np.argsort(-distances, kind="stable")[: len(unused)]]
    return moved


def encode(codes: np.ndarray, patches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what ``Codebook.encode`` does, for codes ``(codes, width)``, some patches at a time."""
    codebook = Codebook(codes[:, None, None])
    parts = [codebook.encode(patches[start : start + AT_ONCE]) for start in range(0, len(patches), AT_ONCE)]
    nearest, distances = (np.concatenate(part) for part in zip(*parts, strict=True))
    return nearest, distances
