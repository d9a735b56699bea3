from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from lm.batches import TrainingBatches, ValidationRows, read_ring, vocabulary_of
from lm.objectives import IGNORED


@pytest.fixture
def causal(small):
    return small.replace(objective="next_token")


@pytest.fixture(scope="module")
def stream(dataset) -> np.ndarray:
    split = dataset.split("train")
    return split.read(0, split.tokens).astype(np.int64)


def test_the_vocabulary_is_the_tokenizers(dataset):
    vocabulary = vocabulary_of(dataset)
    assert (vocabulary.size, vocabulary.end_of_text, vocabulary.mask) == (400, 0, 2)


@given(data=st.data())
def test_the_ring_is_the_stream_repeated(dataset, stream, data):
    start = data.draw(st.integers(-len(stream), 3 * len(stream)))
    count = data.draw(st.integers(1, 100) | st.integers(len(stream) - 2, 2 * len(stream) + 2))
    expected = np.take(stream, np.arange(start, start + count), mode="wrap")
    assert np.array_equal(read_ring(dataset.split("train"), start, count), expected)


def test_a_batch_is_a_function_of_its_step_alone(dataset, small):
    forwards = TrainingBatches(dataset, small)
    first = [forwards.batch(step) for step in range(5)]
    for step in (4, 0, 2):
        again = TrainingBatches(dataset, small).batch(step)
        assert all(torch.equal(a, b) for a, b in zip(vars(first[step]).values(), vars(again).values(), strict=True))
    assert not torch.equal(first[0].inputs, first[1].inputs)
    other_seed = TrainingBatches(dataset, small.replace(seed=1)).batch(0)
    assert not torch.equal(first[0].inputs, other_seed.inputs)


@pytest.mark.parametrize("context", [32, 50, 61])
def test_every_epoch_visits_each_window_once_in_an_order_of_its_own(dataset, causal, context):
    config = causal.replace(context_length=context, batch_tokens=context)
    batches = TrainingBatches(dataset, config)
    tokens, windows = dataset.split("train").tokens, batches.windows_per_epoch
    assert windows == tokens // context
    orders = []
    for epoch in range(3):
        starts = batches.window_starts(np.arange(epoch * windows, (epoch + 1) * windows))
        covered = Counter(((starts[:, None] + np.arange(context)) % tokens).ravel().tolist())
        assert len(covered) == windows * context  # no token twice
        assert max(covered.values()) == 1
        orders.append(starts.tolist())
    assert orders[0] != orders[1] != orders[2]
    assert len({min(order) for order in orders}) > 1  # each epoch cuts at an offset of its own


def test_a_row_holds_the_tokens_from_its_start_and_the_one_before(dataset, causal, stream):
    batches = TrainingBatches(dataset, causal)
    batch = batches.batch(3)
    starts = batches.window_starts(np.arange(24, 32))
    for row, start in enumerate(starts.tolist()):
        assert np.array_equal(batch.targets[row], np.take(stream, np.arange(start, start + 32), mode="wrap"))
        assert np.array_equal(batch.inputs[row], np.take(stream, np.arange(start - 1, start + 31), mode="wrap"))


@pytest.mark.parametrize("objective", ["next_token", "masked_token"])
def test_the_rows_of_a_run_do_not_depend_on_the_batch_size(dataset, small, objective):
    def rows_of(batch_rows: int) -> list[torch.Tensor]:
        config = small.replace(objective=objective, batch_tokens=batch_rows * 32)
        batches = [TrainingBatches(dataset, config).batch(step) for step in range(12 // batch_rows)]
        return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("inputs", "targets", "lo", "hi")]

    for size in (1, 2, 3, 6):
        assert all(torch.equal(a, b) for a, b in zip(rows_of(12), rows_of(size), strict=True))


def test_epochs_counts_passes_over_the_text(dataset, small):
    batches = TrainingBatches(dataset, small)
    assert batches.epochs(batches.windows_per_epoch) == 8
    assert batches.epochs(0) == 0


def test_a_context_longer_than_the_text_is_refused_with_both_numbers(dataset, small):
    tokens = dataset.split("train").tokens
    with pytest.raises(UserError, match=rf"context_length {tokens} .* {tokens:,} tokens"):
        TrainingBatches(dataset, small.replace(context_length=tokens, batch_tokens=tokens))
    TrainingBatches(dataset, small.replace(context_length=tokens - 1, batch_tokens=tokens - 1)).batch(0)


@pytest.mark.parametrize("context", [7, 32, 100_000])
def test_validation_windows_cover_every_token_once(dataset, context):
    split = dataset.split("validation")
    rows = ValidationRows(split, vocabulary_of(dataset), context)
    batches = list(rows.batches(rows.choose(0), "next_token", 0, 1, 5))
    assert all(len(batch.masked) <= 5 for batch in batches)
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    assert np.array_equal(targets[targets != IGNORED], split.read(0, split.tokens))


def test_chosen_validation_windows_are_spread_evenly_and_always_the_same(dataset):
    rows = ValidationRows(dataset.split("validation"), vocabulary_of(dataset), 16)
    assert rows.count > 20
    assert rows.choose(0).tolist() == rows.choose(rows.count + 5).tolist() == list(range(rows.count))
    for wanted in (1, 3, rows.count - 1):
        chosen = rows.choose(wanted)
        assert len(set(chosen.tolist())) == wanted
        assert chosen.min() == 0
        assert chosen.max() < rows.count
        assert np.ptp(np.diff([*chosen, rows.count])) <= 1  # equal gaps, the one after the last included
