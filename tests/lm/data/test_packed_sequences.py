from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.config.settings import usual_pooling, usual_reading
from lm.data.packed_sequences import packed, pooled, sequence_of

END = 0


def test_a_sequence_begins_with_the_end_of_text_and_a_pair_has_one_between():
    assert sequence_of([[1, 2]], END, END, 8) == ([END, 1, 2], False)
    assert sequence_of([[1, 2], [3]], END, END, 8) == ([END, 1, 2, END, 3], False)
    assert sequence_of([[]], END, END, 8) == ([END], False)


def test_what_is_too_long_is_cut_the_longer_text_of_a_pair_first():
    assert sequence_of([[1, 2, 3, 4]], END, END, 3) == ([END, 1, 2], True)
    assert sequence_of([[1] * 9, [2, 2]], END, END, 7) == ([END, 1, 1, 1, END, 2, 2], True)
    assert sequence_of([[1] * 9, [2] * 9], END, END, 6) == ([END, 1, 1, END, 2, 2], True)
    assert sequence_of([[1] * 2, [2] * 1_000_000], END, END, 6) == ([END, 1, 1, END, 2, 2], True)
    assert sequence_of([[1, 2, 3]], END, END, 4) == ([END, 1, 2, 3], False)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=40), st.integers(1, 4), st.sampled_from(["mean", "last"]))
def test_every_sequence_is_packed_once_and_pooled_over_its_own_positions(lengths, rows, pooling):
    draw = np.random.default_rng(1)
    sequences = [draw.integers(1, 90, length).tolist() for length in lengths]
    seen = []
    for some in packed(sequences, "bidirectional", END, 12, rows):
        assert len(some.batch.inputs) <= rows
        hidden = torch.randn(*some.batch.inputs.shape, 5)
        vectors = pooled(hidden, some, pooling)
        for vector, n, row, first, last in zip(vectors, some.numbers, some.rows, some.first, some.last, strict=True):
            assert some.batch.inputs[row, first : last + 1].tolist() == sequences[n]
            assert (some.batch.lo[row, first : last + 1] == first).all()
            assert (some.batch.hi[row, first : last + 1] == last + 1).all()
            wanted = hidden[row, last] if pooling == "last" else hidden[row, first : last + 1].mean(0)
            torch.testing.assert_close(vector, wanted)
            seen.append(int(n))
    assert sorted(seen) == list(range(len(lengths)))


def test_a_causal_reading_sees_no_later_token():
    (some,) = packed([[1, 2, 3], [4, 5]], "causal", END, 5, 4)
    assert some.batch.hi.tolist() == [[1, 2, 3, 4, 5]]
    assert some.batch.lo.tolist() == [[0, 0, 0, 3, 3]]


def test_no_sequences_make_no_batch():
    assert list(packed([], "causal", END, 5, 4)) == []


@pytest.mark.parametrize(
    ("objective", "reads", "pooling"),
    [("next_token", "causal", "last"), ("hybrid", "bidirectional", "mean"), ("masked_token", "bidirectional", "mean")],
)
def test_the_usual_reading_is_bidirectional_if_the_objective_is(small, objective, reads, pooling):
    assert usual_reading(small.replace(objective=objective)) == reads
    assert usual_pooling(reads) == pooling
