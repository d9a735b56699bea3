"""k-means, step by step in float64."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.pipeline import kmeans
from data_prep.pipeline.kmeans import fit_codes, improved, random_numbers


def some_patches(count: int, width: int, seed: int = 0) -> np.ndarray:
    """Patches around a few colors, some of them equal."""
    rng = np.random.default_rng(seed)
    colors = rng.integers(30, 226, (7, width))
    return (colors[rng.integers(0, 7, count)] + rng.integers(-2, 3, (count, width))).astype(np.uint8)


def distances_to(codes: np.ndarray, patches: np.ndarray) -> np.ndarray:
    return ((patches[:, None].astype(np.float64) - codes[None]) ** 2).sum(2)


def test_the_codes_are_the_means_of_their_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kmeans, "AT_ONCE", 100)
    patches = some_patches(1000, 4)
    codes = fit_codes(patches, 20, seed=1)
    nearest = distances_to(codes, patches).argmin(1)
    assert sorted(set(nearest.tolist())) == list(range(20)), "every code is used"
    for code in range(20):
        mean = patches[nearest == code].astype(np.float64).mean(0)
        assert np.abs(mean - codes[code]).max() <= 0.5 + 1e-9, "Lloyd's algorithm has converged, up to rounding"


def test_a_round_takes_rounded_means_of_all_patches_and_moves_unused_codes_to_the_farthest_ones() -> None:
    patches = np.array([[0, 10], [1, 20], [9, 9], [200, 7]], np.uint8)
    codes = np.array([[150, 7], [255, 255], [3, 3], [0, 14]], np.uint8)
    assert improved(codes, patches, np.array([1, 2, 300, 1])).tolist() == [[200, 7], [200, 7], [9, 9], [1, 17]]


def test_the_seed_decides_and_the_order_of_the_patches_does_not() -> None:
    patches = some_patches(400, 5)
    codes = fit_codes(patches, 12, seed=0)
    assert np.array_equal(codes, fit_codes(patches[::-1], 12, seed=0))
    assert not np.array_equal(codes, fit_codes(patches, 12, seed=1))


def test_random_numbers_are_those_of_the_published_generator() -> None:
    # PCG64 seeded with 0 by SeedSequence, whose stream NumPy promises to keep.
    assert random_numbers(2, 0).tolist() == [11749869230777074271, 4976686463289251617]


def test_fewer_different_patches_than_codes_are_told() -> None:
    with pytest.raises(UserError, match=r"only 3 different patches: choose --codes at most that"):
        fit_codes(np.repeat(np.arange(3, dtype=np.uint8)[:, None], 50, 0), 4, seed=0)
