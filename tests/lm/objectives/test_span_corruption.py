"""Span corruption: what a document becomes, who sees whom, and what is predicted."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.config.settings import Config
from lm.data.batch import IGNORED
from lm.kernels import masks
from lm.objectives.span_corruption import SpanCorruption, parts_of
from tests.lm.objectives.test_prefix_lm import END, VOCABULARY, documents, rows_of

MASK = VOCABULARY.mask


def objective(**changes) -> SpanCorruption:
    return SpanCorruption(Config().replace(objective="span_corruption", vocab_size=50, **changes), VOCABULARY)


def split(tokens: list[int], at: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        parts += [[]] if token == at else []
        parts[-1] += [] if token == at else [token]
    return parts


@given(
    seed=st.integers(0, 50),
    length=st.integers(1, 60),
    ends=st.sampled_from([0.0, 0.05, 0.9]),
    rate=st.sampled_from([0.01, 0.15, 0.5]),
    mean=st.sampled_from([1.0, 3.0, 20.0]),
    reads=st.sampled_from(["bidirectional", "causal"]),
)
def test_the_spans_in_the_order_of_their_gaps_make_the_text_whole(seed, length, ends, rate, mean, reads):
    rows = rows_of(3, length, seed, ends, padding=length // 2)
    made = objective(span_corruption_rate=rate, mean_span_length=mean, span_attention=reads)
    batch = made.drawn(rows, seed)
    sees = masks.dense(batch.lo, batch.hi, length)
    for row in range(3):
        for begin, end in documents(rows, row):
            targets = batch.targets[row, begin:end].tolist()
            assert not sees[row, begin:end, :begin].any()
            assert not sees[row, begin:end, end:].any()
            if end - begin < 5:
                assert set(targets) == {IGNORED}
                continue
            tokens = [*batch.inputs[row, begin + 1 : end].tolist(), targets[-1]]
            assert tokens[-1] == END
            kept, spans = (split(part, MASK) for part in split(tokens[:-1], END))
            assert kept.pop() == []  # a gap is at the end
            assert len(kept) == len(spans)
            assert all(kept)
            assert all(spans)
            whole = [token for pair in zip(kept, spans, strict=True) for part in pair for token in part]
            assert whole == rows.targets[row, begin : begin + len(whole)].tolist()
            hidden, gaps = sum(map(len, spans)), len(spans)
            assert len(whole) + 2 * gaps + 1 == end - begin
            assert hidden == min(max(gaps, round(rate * len(whole))), len(whole) - gaps)
            seen = len(whole) - hidden + gaps + 2  # with what begins the document, and the end of text before the spans
            assert targets == [IGNORED] * (seen - 1) + tokens[seen - 1 :]
            expected = torch.ones(end - begin, end - begin).tril().bool()
            if reads == "bidirectional":
                expected[:seen, :seen] = True
            assert torch.equal(sees[row, begin:end, begin:end], expected)
        assert (batch.targets[row, int(rows.lengths[row]) :] == IGNORED).all()
    assert (batch.hi.diff(dim=1) >= 0).all()


def test_rate_and_mean_length_are_those_of_the_settings():
    rows = rows_of(20, 1000, ends=0.0)
    for rate, mean in ((0.15, 3.0), (0.5, 8.0)):
        spans, hidden, text = objective(span_corruption_rate=rate, mean_span_length=mean).sizes(1000)
        assert hidden / text == pytest.approx(rate, abs=0.002)
        assert hidden / spans == pytest.approx(mean, rel=0.02)
        batch = objective(span_corruption_rate=rate, mean_span_length=mean).drawn(rows, 0)
        assert int((batch.targets != IGNORED).sum()) == 20 * (hidden + spans)


def test_parts_of_a_number_are_drawn_evenly_from_all_there_are():
    draw = np.random.default_rng(0)
    found = Counter(tuple(parts_of(5, 3, draw.random(9)).tolist()) for _ in range(3000))
    assert set(found) == {(1, 1, 3), (1, 3, 1), (3, 1, 1), (1, 2, 2), (2, 1, 2), (2, 2, 1)}
    assert all(400 < count < 600 for count in found.values())
    assert parts_of(4, 4, draw.random(4)).tolist() == [1] * 4
    assert parts_of(4, 1, draw.random(4)).tolist() == [4]


def test_gaps_depend_on_the_seed_and_the_number_of_the_row_alone():
    rows = rows_of(8, 60)
    whole = objective().drawn(rows, 1)
    some = objective().drawn(rows.chosen(np.array([5, 2])), 1)
    assert torch.equal(some.inputs, whole.inputs[[5, 2]])
    assert not torch.equal(objective().drawn(rows, 2).inputs, whole.inputs)


@pytest.mark.parametrize("reads", ["bidirectional", "causal"])
def test_a_run_learns_to_fill_spans(small, quietly, tmp_path, reads):
    config = small.replace(objective="span_corruption", steps=40, validate_every=20, learning_rate=0.01)
    run = quietly(config.replace(span_attention=reads), tmp_path / "run")
    first, last = (line["validation"] for line in run.metrics() if "validation" in line)
    assert list(first) == ["span_corruption"]
    assert last["span_corruption"]["nats_per_token"] < first["span_corruption"]["nats_per_token"]
