from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data.mixture import Schedule

weights = st.lists(st.fractions(Fraction(1, 1000), 1000, max_denominator=1000), min_size=1, max_size=9)


@given(weights, st.integers(1, 400))
def test_a_place_is_the_number_of_rows_that_the_corpus_had_before(weights, rows):
    """Found directly, it is what counting row by row gives."""
    schedule = Schedule(weights)
    had = [0] * len(weights)
    for corpus, place in zip(*(part.tolist() for part in schedule.place(np.arange(rows))), strict=True):
        assert place == had[corpus]
        had[corpus] += 1
    assert schedule.counts(rows) == had


@given(weights, st.integers(0, 2**53))
def test_counts_are_off_their_share_by_at_most_half_the_depth_at_any_row(weights, rows):
    schedule = Schedule(weights)
    bound = Fraction((len(weights) - 1).bit_length(), 2)
    counts = schedule.counts(rows)
    assert sum(counts) == rows
    for count, weight in zip(counts, weights, strict=True):
        # Shares finer than a 2^30th are rounded to one, which shows after 2^30 rows.
        assert abs(count - rows * weight / sum(weights)) <= bound + Fraction(rows, 2**30)
    corpora, places = schedule.place(np.array([rows]))
    after = schedule.counts(rows + 1)
    assert after[corpora[0]] == counts[corpora[0]] + 1
    assert places[0] == counts[corpora[0]]


@given(weights, st.lists(st.integers(0, 2**40), min_size=1, max_size=20))
def test_a_row_is_placed_the_same_alone_and_in_any_company(weights, numbers):
    schedule = Schedule(weights)
    together = np.stack(schedule.place(np.array(numbers)))
    alone = np.stack([np.concatenate(schedule.place(np.array([number]))) for number in numbers], axis=1)
    assert np.array_equal(together, alone)


def test_two_to_one_takes_turns():
    corpora, places = Schedule([Fraction(2), Fraction(1)]).place(np.arange(9))
    assert corpora.tolist() == [0, 1, 0] * 3
    assert places.tolist() == [0, 0, 1, 2, 1, 3, 4, 2, 5]


def test_one_corpus_has_every_row():
    corpora, places = Schedule([Fraction(7, 3)]).place(np.array([0, 5, 2**60]))
    assert corpora.tolist() == [0, 0, 0]
    assert places.tolist() == [0, 5, 2**60]


@pytest.mark.parametrize("wanted", [[Fraction("0.7"), Fraction("0.2"), Fraction("0.1")]])
def test_shares_add_up_to_one(wanted):
    assert Schedule(wanted).shares == wanted
    assert Schedule([30 * share for share in wanted]).shares == wanted
