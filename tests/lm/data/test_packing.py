from __future__ import annotations

from unittest import mock

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from lm.data import packing
from lm.data.packing import best_fit, plan_rows


def one_at_a_time(lengths: list[int], capacity: int) -> list[int]:
    """Best-fit decreasing as it is defined: the room that is left in each row, sorted."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, room in enumerate(rooms) if room >= length]
        if not fitting:
            fitting = [len(rooms)]
            rooms.append(capacity)
        rooms[min(fitting, key=lambda number: rooms[number])] -= length
    return sorted(rooms)


@given(st.integers(1, 60).flatmap(lambda t: st.tuples(st.just(t), st.lists(st.integers(1, t), max_size=80))))
def test_packing_many_at_once_is_packing_one_at_a_time(drawn):
    capacity, lengths = drawn
    rows = best_fit(np.array(lengths, dtype=np.int64), capacity)
    used = np.bincount(rows, weights=lengths).astype(int) if lengths else np.zeros(0, dtype=int)
    assert sorted((capacity - used).tolist()) == one_at_a_time(lengths, capacity)


class Lengths:
    """As much of a split as a plan reads."""

    class Record:
        def __init__(self, documents: list[int]) -> None:
            self.documents, self.tokens = documents, sum(documents)

    def __init__(self, shards: list[list[int]]) -> None:
        self.records = [self.Record(shard) for shard in shards]

    def shard_lengths(self, record: Record) -> np.ndarray:
        return np.array(record.documents, dtype="<i4")


shards = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=12), min_size=1, max_size=6)


@given(shards, st.integers(1, 12), st.integers(1, 20), st.data())
def test_a_plan_has_every_token_once_and_cuts_only_what_does_not_fit(shards, context, block, data):

    documents = [length for shard in shards for length in shard]
    ends = np.cumsum(documents)
    first = data.draw(st.integers(0, len(documents) - 1))
    last = data.draw(st.integers(first, len(documents) - 1))
    start, stop = int(ends[first]) - documents[first], int(ends[last])
    with mock.patch.object(packing, "BLOCK_DOCUMENTS", block):
        plan = plan_rows(Lengths(shards), start, stop, context)

    covered = np.concatenate([np.arange(s, s + n) for s, n in zip(plan.starts, plan.lengths, strict=True)])
    assert np.array_equal(np.sort(covered), np.arange(start, stop))
    in_row = np.add.reduceat(plan.lengths, plan.first[:-1])
    assert in_row.max() <= context
    assert plan.first[0] == 0
    assert plan.first[-1] == len(plan.starts) == len(plan.lengths)
    for document in range(first, last + 1):
        begin, end = int(ends[document]) - documents[document], int(ends[document])
        parts = plan.lengths[(plan.starts >= begin) & (plan.starts < end)]
        assert len(parts) == -(-documents[document] // context)
        assert sorted(parts, reverse=True)[:-1] == [context] * (len(parts) - 1)


def test_a_block_is_packed_as_if_it_were_alone(monkeypatch):
    monkeypatch.setattr(packing, "BLOCK_DOCUMENTS", 3)
    whole = plan_rows(Lengths([[5, 3, 8], [2, 9, 1]]), 0, 28, 10)
    parts = [plan_rows(Lengths([[5, 3, 8], [2, 9, 1]]), start, stop, 10) for start, stop in ((0, 16), (16, 28))]
    assert np.array_equal(whole.starts, np.concatenate([part.starts for part in parts]))
    assert whole.rows == sum(part.rows for part in parts)


def test_rows_are_nearly_full_and_the_plan_is_small():
    lengths = (np.random.default_rng(0).lognormal(6, 1, 20_000).astype(int) + 1).tolist()
    plan = plan_rows(Lengths([lengths]), 0, sum(lengths), 1024)
    assert sum(lengths) / (plan.rows * 1024) > 0.995
    assert plan.nbytes / len(lengths) < 25
