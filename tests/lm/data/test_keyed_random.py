from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data import keyed_random


def permutation(size: int, seed: int) -> np.ndarray:
    return keyed_random.permuted(np.arange(size, dtype=np.int64), size, seed)


def test_permuted_is_a_permutation_of_every_size():
    for size in [*range(1, 301), 1023, 1024, 1025, 65_537, 100_000]:
        assert np.array_equal(np.sort(permutation(size, size)), np.arange(size))


@given(st.integers(1, 2**40), st.integers(0, 2**63 - 1), st.data())
def test_permuted_stays_inside_and_is_one_to_one_for_any_size(size, seed, data):
    numbers = np.array(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1, max_size=20))), dtype=np.int64)
    moved = keyed_random.permuted(numbers, size, seed)
    assert ((moved >= 0) & (moved < size)).all()
    assert len(set(moved.tolist())) == len(numbers)


def test_each_number_moves_the_same_whether_alone_or_together():
    together = permutation(1000, 7)
    alone = [int(keyed_random.permuted(np.array([number]), 1000, 7)[0]) for number in (0, 1, 500, 999)]
    assert alone == together[[0, 1, 500, 999]].tolist()


def test_seeds_give_different_orders_without_fixed_structure():
    orders = [permutation(2000, seed) for seed in range(20)]
    for a, b in itertools.pairwise(orders):
        assert (a == b).mean() < 0.01
    # Neighbours do not stay neighbours, and the order is not correlated with the numbers.
    for order in orders:
        assert (np.abs(np.diff(order)) == 1).mean() < 0.01
        assert abs(np.corrcoef(order, np.arange(2000))[0, 1]) < 0.1


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 2**40), min_size=1, max_size=6), st.integers(1, 9))
def test_a_row_of_uniform_depends_only_on_its_own_number(seed, rows, width):
    together = keyed_random.uniform(seed, np.array(rows, dtype=np.int64), width)
    for i, row in enumerate(rows):
        assert np.array_equal(keyed_random.uniform(seed, np.array([row], dtype=np.int64), width)[0], together[i])
        assert np.array_equal(
            keyed_random.uniform(seed, np.array([row], dtype=np.int64), width + 3)[0, :width], together[i]
        )


def test_uniform_is_uniform_and_uncorrelated():
    draws = keyed_random.uniform(3, np.arange(2000), 200)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = np.histogram(draws, bins=20, range=(0, 1))[0] / draws.size
    assert np.abs(counts - 0.05).max() < 0.002  # six standard deviations of a share of 400,000
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.01
    assert abs(np.corrcoef(draws.ravel(), keyed_random.uniform(4, np.arange(2000), 200).ravel())[0, 1]) < 0.01


def test_key_is_a_64_bit_number_that_depends_on_the_order_and_number_of_its_parts():
    keys = [keyed_random.key(*parts) for parts in ((1, 2), (2, 1), (1,), (1, 2, 0), (0, 1, 2), (-1, 2), (2**63, 2))]
    assert len(set(keys)) == len(keys)
    assert all(0 <= key < 2**64 for key in keys)
    assert keyed_random.key(1, 2) == keyed_random.key(1, 2)


def test_mix_is_the_finaliser_of_splitmix64():
    """Checked against plain Python integers."""

    def plain(value: int) -> int:
        value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
        return value ^ (value >> 31)

    values = [0, 1, 2**63, 2**64 - 1, 0x9E3779B97F4A7C15]
    assert keyed_random.mix(np.array(values, dtype=np.uint64)).tolist() == [plain(value) for value in values]
    assert plain(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # SplitMix64's first output for seed 0


@pytest.mark.parametrize("size", [1, 2, 3])
def test_permuted_of_nothing_is_nothing(size):
    assert len(keyed_random.permuted(np.empty(0, dtype=np.int64), size, 0)) == 0
