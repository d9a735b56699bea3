from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lm.kernels import masks


def tables_of(element: st.SearchStrategy) -> st.SearchStrategy[Tensor]:
    """Tensors (1 to 3 rows, 1 to 14 columns) of drawn elements."""
    return st.tuples(st.integers(1, 3), st.integers(1, 14)).flatmap(
        lambda shape: st.lists(
            st.lists(element, min_size=shape[1], max_size=shape[1]), min_size=shape[0], max_size=shape[0]
        ).map(torch.tensor)
    )


def document_numbers(starts: Tensor) -> Tensor:
    """Which document each position belongs to, counted from the left."""
    numbers = starts.clone()
    numbers[:, 0] = False
    return numbers.cumsum(1)


def never_decreases(bound: Tensor) -> bool:
    return bool((bound.diff(dim=1) >= 0).all())


@given(tables_of(st.booleans()), st.lists(st.booleans(), min_size=3, max_size=3), st.data())
def test_packed_queries_see_exactly_their_document_causal_ones_up_to_themselves_and_no_padding(
    starts, bidirectional, data
):
    rows, length = starts.shape
    both = torch.tensor(bidirectional[:rows])
    lengths = data.draw(st.none() | st.lists(st.integers(0, length), min_size=rows, max_size=rows).map(torch.tensor))
    lo, hi = masks.packed(starts, both, lengths)
    numbers, at = document_numbers(starts), torch.arange(length)
    expected = (numbers[:, :, None] == numbers[:, None, :]) & (both[:, None, None] | (at <= at[:, None]))
    if lengths is not None:
        used = at < lengths[:, None]
        expected &= used[:, :, None] & used[:, None, :]
    assert torch.equal(masks.dense(lo, hi, length), expected)
    assert lo.dtype == hi.dtype == torch.int32
    assert never_decreases(lo)
    assert never_decreases(hi)


@given(st.integers(1, 3), st.integers(1, 9), st.integers(0, 9))
def test_causal_queries_see_the_past_and_themselves(rows, queries, past):
    lo, hi = masks.causal(rows, queries, past=past)
    expected = torch.ones(queries, past + queries, dtype=torch.bool).tril(past)
    assert torch.equal(masks.dense(lo, hi, past + queries), expected.expand(rows, -1, -1))


def test_bidirectional_queries_see_everything():
    assert masks.dense(*masks.bidirectional(2, 5), 5).all()


@given(tables_of(st.booleans()), st.booleans(), st.integers(1, 6))
def test_sliding_window_leaves_the_keys_less_than_a_window_away(starts, bidirectional, window):
    lo, hi = masks.packed(starts, torch.full((len(starts),), bidirectional))
    length = starts.shape[1]
    at = torch.arange(length)
    near = (at[:, None] - at).abs() < window
    narrowed = masks.sliding_window(lo, hi, window)
    assert torch.equal(masks.dense(*narrowed, length), masks.dense(lo, hi, length) & near)
    assert all(map(never_decreases, narrowed))


@given(st.integers(1, 6), st.integers(0, 8), st.integers(1, 5))
def test_sliding_window_counts_from_the_end_of_the_past(queries, past, window):
    keys = past + queries
    lo, hi = masks.sliding_window(*masks.causal(1, queries, past=past), window, past=past)
    query, key = torch.arange(past, keys)[:, None], torch.arange(keys)
    assert torch.equal(masks.dense(lo, hi, keys)[0], (key <= query) & (key > query - window))


@given(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=3))
def test_a_prefix_is_bidirectional_and_the_rest_causal(queries, lengths):
    lengths = [min(length, queries) for length in lengths]
    lo, hi = masks.prefix(len(lengths), queries, torch.tensor(lengths))
    query, key = torch.arange(queries)[:, None], torch.arange(queries)
    for row, length in enumerate(lengths):
        assert torch.equal(masks.dense(lo, hi, queries)[row], (key <= query) | (key < length))
    assert never_decreases(hi)
