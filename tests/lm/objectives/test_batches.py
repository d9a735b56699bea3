from __future__ import annotations

from collections import Counter
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.shards.tokens import SourceSpan, Split
from lm.data.batch import IGNORED, TENSORS, Batch
from lm.data.corpora import Corpora
from lm.data.order import BLOCK_ROWS
from lm.data.rows import Ring, ValidationRows, vocabulary_of
from lm.objectives.batches import TrainingBatches
from tests.conftest import masked_rows_of


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
    begin = data.draw(st.just(0) | st.integers(0, len(stream) // 2))
    out = np.empty(count, dtype=np.int64)
    Ring(dataset.split("train"), begin, len(stream)).read_into(start, out)
    assert np.array_equal(out, np.take(stream[begin:], np.arange(start, start + count), mode="wrap"))


def test_a_batch_is_a_function_of_its_step_alone(dataset, small):
    forwards = TrainingBatches(Corpora([dataset]), small)
    first = [forwards.batch(step) for step in range(5)]
    for step in (4, 0, 2):
        again = TrainingBatches(Corpora([dataset]), small).batch(step)
        assert same(first[step], again)
    assert not torch.equal(first[0].inputs, first[1].inputs)
    other_seed = TrainingBatches(Corpora([dataset]), small.replace(seed=1)).batch(0)
    assert not torch.equal(first[0].inputs, other_seed.inputs)


@pytest.mark.parametrize("context", [32, 50, 61])
def test_every_epoch_visits_each_window_once_in_an_order_of_its_own(dataset, causal, context):
    config = causal.replace(context_length=context, batch_tokens=context)
    batches = TrainingBatches(Corpora([dataset]), config)
    tokens, windows = dataset.split("train").tokens, batches.rows.texts[0].per_epoch
    assert windows == tokens // context
    orders = []
    for epoch in range(3):
        *_, starts = batches.rows.locate(np.arange(epoch * windows, (epoch + 1) * windows))
        covered = Counter(((starts[:, None] + np.arange(context)) % tokens).ravel().tolist())
        assert len(covered) == windows * context  # no token twice
        assert max(covered.values()) == 1
        orders.append(starts.tolist())
    assert orders[0] != orders[1] != orders[2]
    assert len({min(order) for order in orders}) > 1  # each epoch cuts at an offset of its own


def test_a_row_holds_the_tokens_from_its_start_and_the_one_before(dataset, causal, stream):
    batches = TrainingBatches(Corpora([dataset]), causal)
    batch = batches.batch(3)
    *_, starts = batches.rows.locate(np.arange(24, 32))
    for row, start in enumerate(starts.tolist()):
        assert np.array_equal(batch.targets[row], np.take(stream, np.arange(start, start + 32), mode="wrap"))
        assert np.array_equal(batch.inputs[row], np.take(stream, np.arange(start - 1, start + 31), mode="wrap"))


@pytest.mark.parametrize("objective", ["next_token", "masked_token"])
def test_the_rows_of_a_run_do_not_depend_on_the_batch_size(dataset, small, objective):
    def rows_of(batch_rows: int) -> list[torch.Tensor]:
        config = small.replace(objective=objective, batch_tokens=batch_rows * 32)
        batches = [TrainingBatches(Corpora([dataset]), config).batch(step) for step in range(12 // batch_rows)]
        return [torch.cat([getattr(batch, name) for batch in batches]) for name in ("inputs", "targets", "lo", "hi")]

    for size in (1, 2, 3, 6):
        assert all(torch.equal(a, b) for a, b in zip(rows_of(12), rows_of(size), strict=True))


def test_epochs_counts_passes_over_the_text(dataset, small):
    batches = TrainingBatches(Corpora([dataset]), small)
    assert batches.rows.epochs(batches.rows.texts[0].per_epoch) == 8
    assert batches.rows.epochs(0) == 0


def test_a_context_longer_than_the_text_is_refused_with_both_numbers(dataset, small):
    tokens = dataset.split("train").tokens
    with pytest.raises(UserError, match=rf"context_length {tokens} .* {tokens:,} tokens"):
        TrainingBatches(Corpora([dataset]), small.replace(context_length=tokens, batch_tokens=tokens))
    TrainingBatches(Corpora([dataset]), small.replace(context_length=tokens - 1, batch_tokens=tokens - 1)).batch(0)


def mixed(value: int) -> int:
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB % 2**64
    return value ^ (value >> 31)


def key(*parts: int) -> int:
    state = 0
    for part in parts:
        state = mixed((state + 0x9E3779B97F4A7C15) % 2**64 ^ part)
    return state


def window_start(row: int, tokens: int, context: int, seed: int) -> int:
    """The rule for one dataset as it was before there were several, in plain integers."""
    windows = tokens // context
    epoch, place = divmod(row, windows)
    epoch_key = key(seed, 0, epoch)
    half = max(1, ((windows - 1).bit_length() + 1) // 2)
    while True:  # Feistel, walked until it lands inside
        left, right = place >> half, place % 2**half
        for number in range(4):
            left, right = right, left ^ mixed(right ^ key(epoch_key, number)) % 2**half
        place = left << half | right
        if place < windows:
            return (epoch_key % context + place * context) % tokens


@pytest.mark.parametrize("context", [32, 61])
def test_the_batches_of_one_dataset_are_those_of_earlier_versions(dataset, causal, stream, context):
    """Runs that were begun before go on with the same batches, to the bit."""
    config = causal.replace(context_length=context, batch_tokens=7 * context, seed=3)
    batches = TrainingBatches(Corpora([dataset]), config)
    for step in (0, 1, 100, BLOCK_ROWS // 7, 12_345):
        batch = batches.batch(step)
        for row in range(7):
            start = window_start(step * 7 + row, len(stream), context, 3)
            inputs = np.take(stream, np.arange(start - 1, start + context - 1), mode="wrap")
            begins = np.maximum.accumulate(np.where(inputs == 0, np.arange(context), 0))
            assert np.array_equal(batch.inputs[row], inputs)
            assert np.array_equal(batch.targets[row], np.take(stream, np.arange(start, start + context), mode="wrap"))
            assert np.array_equal(batch.lo[row], begins)
            assert np.array_equal(batch.hi[row], np.arange(1, context + 1))
            assert np.array_equal(batch.positions[row], np.arange(context) - begins)
        assert (batch.loss_weights == np.float32(1 / (7 * context))).all()


def same(a: Batch, b: Batch) -> bool:
    return a.parts == b.parts and all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)


@pytest.mark.parametrize("packing", ["windows", "documents"])
@pytest.mark.parametrize(
    "objective", ["next_token", "hybrid", "next_token:0.5,masked_token:0.25,masked_next_token:0.25"]
)
def test_the_parts_of_all_ranks_are_the_batch_of_one(dataset, small, packing, objective):
    config = small.replace(objective=objective, packing=packing, batch_tokens=24 * 32)
    whole = TrainingBatches(Corpora([dataset]), config).batch(5)
    for world in (1, 2, 3, 8):
        parts = [TrainingBatches(Corpora([dataset]), config).batch(5, rank, world) for rank in range(world)]
        for name in TENSORS:
            interleaved = torch.stack([getattr(part, name) for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(interleaved, getattr(whole, name))
        assert {name: sum(part.parts[name] for part in parts) for name in whole.parts} == whole.parts
        assert {len(part) for part in parts} == {24 // world}
        assert np.ptp([int(masked_rows_of(part).sum()) for part in parts]) <= 1


def test_rows_that_do_not_divide_among_the_ranks_are_refused(dataset, small):
    with pytest.raises(UserError, match="8 rows do not divide among 3 ranks"):
        TrainingBatches(Corpora([dataset]), small).batch(0, 1, 3)


@pytest.mark.parametrize("context", [16, 40, 200])
def test_packed_documents_have_each_token_once_an_epoch_and_documents_whole(dataset, causal, stream, context):
    config = causal.replace(packing="documents", context_length=context, batch_tokens=context)
    batches = TrainingBatches(Corpora([dataset]), config)
    documents = np.split(stream, np.flatnonzero(stream == 0)[:-1] + 1)
    expected = Counter()
    for document in documents:
        expected.update(tuple(document[i : i + context].tolist()) for i in range(0, len(document), context))
    orders = []
    for epoch in range(2):
        found, order = Counter(), []
        for step in range(epoch * batches.rows.texts[0].per_epoch, (epoch + 1) * batches.rows.texts[0].per_epoch):
            batch = batches.batch(step)
            bounds = [*np.flatnonzero(batch.positions[0].numpy() == 0), context]
            used = int((batch.targets[0] != IGNORED).sum())
            pieces = [batch.targets[0, a : min(b, used)].tolist() for a, b in pairwise(bounds) if a < used]
            found.update(map(tuple, pieces))
            order.append(pieces)
        assert found == expected
        orders.append(order)
    assert orders[0] != orders[1]


@pytest.mark.parametrize("objective", ["next_token", "masked_token", "masked_next_token", "hybrid"])
def test_places_that_no_document_fills_see_nothing_are_not_seen_and_weigh_nothing(dataset, small, objective):
    config = small.replace(objective=objective, packing="documents", context_length=64, batch_tokens=64 * 8)
    batches = TrainingBatches(Corpora([dataset]), config)
    padded = 0
    for step in range(batches.rows.texts[0].per_epoch // 8):
        batch, rows = batches.batch(step), batches.rows.of_step(step)
        used = (batch.lo < batch.hi).sum(1)
        assert sorted(used.tolist()) == sorted(rows.lengths.tolist())
        for row, length in enumerate(used.tolist()):
            padded += 64 - length
            assert (batch.hi[row] <= length).all()
            assert (batch.lo[row, length:] == length).all()
            assert (batch.targets[row, length:] == IGNORED).all()
            assert (batch.loss_weights[row, length:] == 0).all()
            assert (batch.inputs[row, length:] == 0).all()
        assert (batch.lo.diff(dim=1) >= 0).all()
        assert (batch.hi.diff(dim=1) >= 0).all()
        assert float(batch.loss_weights.sum()) == pytest.approx(1, abs=1e-5)
    assert padded > 0


def test_the_first_token_of_a_fragment_is_never_predicted_from_another_document(dataset, small):
    config = small.replace(objective="masked_next_token", packing="documents", mask_rate=1.0, mask_token_share=1.0)
    batches = TrainingBatches(Corpora([dataset]), config.replace(random_token_share=0.0, context_length=16))
    for step in range(20):
        batch = batches.batch(step)
        predicts = batch.targets != IGNORED
        here = torch.arange(16)
        assert (batch.hi[predicts] > (here + 1).expand(batch.hi.shape)[predicts]).all()  # the hidden token is in view


def test_the_introduction_tells_how_full_packed_rows_are(dataset, causal):
    batches = TrainingBatches(Corpora([dataset]), causal.replace(packing="documents"))
    told = batches.rows.introduction(10)
    plan = batches.rows.texts[0].plan
    assert len(told) == 1
    assert f"{dataset.split('train').tokens / (plan.rows * 32):.2%} full" in told[0]
    assert TrainingBatches(Corpora([dataset]), causal).rows.introduction(10) == []


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_corpora_share_the_rows_by_weight_and_each_has_its_own_epochs(dataset, other_dataset, causal, packing):
    corpora = Corpora([dataset, other_dataset], [Fraction(1), Fraction("0.5")])
    config = causal.replace(packing=packing, batch_tokens=32 * 9)
    batches = TrainingBatches(corpora, config)
    alone = [TrainingBatches(Corpora([d]), config) for d in (dataset, other_dataset)]
    size = batches.rows.texts[1].per_epoch
    texts, _, places = batches.rows.locate(np.arange(3 * 2 * size))
    assert Counter(texts.tolist()) == {0: 4 * size, 1: 2 * size}
    of_second = places[texts == 1]
    for epoch in (of_second[:size], of_second[size:]):
        assert len(set(epoch.tolist())) == size
    if packing == "documents":
        assert sorted(of_second[:size].tolist()) == list(range(size))
    assert of_second[:size].tolist() != of_second[size:].tolist()
    # The first corpus is visited in the order that it has by itself.
    assert np.array_equal(places[texts == 0], alone[0].rows.locate(np.arange(4 * size)).places)
    assert "66.7% of the rows" in batches.rows.introduction(1)[0]


@pytest.mark.parametrize("fraction", [0.5, 0.25])
def test_each_corpus_has_its_own_share_of_masked_rows(dataset, other_dataset, small, fraction):
    """Two corpora by turns and every second row masked must not mean that one of them is never masked."""
    corpora = Corpora([dataset, other_dataset], [Fraction(1), Fraction(1)])
    config = small.replace(objective="hybrid", masked_fraction=fraction, batch_tokens=32)
    batches = TrainingBatches(corpora, config)
    texts = batches.rows.locate(np.arange(80)).texts
    masked = np.array([bool(masked_rows_of(batches.batch(step))[0]) for step in range(80)])
    assert [int(masked[texts == text].sum()) for text in (0, 1)] == [40 * fraction, 40 * fraction]


def test_corpora_of_one_size_have_orders_of_their_own(dataset, causal):
    located = TrainingBatches(Corpora([dataset] * 2, [Fraction(1)] * 2), causal).rows.locate(np.arange(200))
    assert located.places[located.texts == 0].tolist() != located.places[located.texts == 1].tolist()


def test_sources_of_unequal_weight_take_turns_and_equal_ones_are_one_stream(dataset, causal, monkeypatch):
    split = dataset.split("train")
    middle = int(np.flatnonzero(split.read(0, split.tokens) == 0)[100]) + 1

    def spans(weight: float) -> list[SourceSpan]:
        return [SourceSpan("a", 1.0, 0, middle), SourceSpan("b", weight, middle, split.tokens)]

    plain = TrainingBatches(Corpora([dataset]), causal).batch(7)
    monkeypatch.setattr(Split, "source_spans", spans(1.0))
    assert same(TrainingBatches(Corpora([dataset]), causal).batch(7), plain)
    monkeypatch.setattr(Split, "source_spans", spans(3.0))
    batches = TrainingBatches(Corpora([dataset]), causal)
    assert batches.rows.names == [f"{name} in {dataset.directory}" for name in "ab"]
    texts, *_ = batches.rows.locate(np.arange(400))
    assert (texts == 1).sum() == 300
    first = split.read(0, middle)
    of_first = [row for row, text in zip(batches.rows.of_step(0).targets, texts[:8], strict=True) if text == 0]
    circle = " ".join(map(str, [*first.tolist(), *first[:32].tolist()]))
    assert len(of_first) == 2
    assert all(" ".join(map(str, row.tolist())) in circle for row in of_first)
    told = batches.rows.introduction(50)
    assert len(told) == 2
    assert f"{middle:,} tokens" in told[0]


@pytest.mark.parametrize("context", [7, 32, 100_000])
def test_validation_windows_cover_every_token_once(dataset, context):
    split = dataset.split("validation")
    rows = ValidationRows(split, context)
    windows, real = rows.windows(rows.choose(0))
    targets = np.concatenate([window[1 : 1 + count] for window, count in zip(windows, real, strict=True)])
    assert np.array_equal(targets, split.read(0, split.tokens))


def test_chosen_validation_windows_are_spread_evenly_and_always_the_same(dataset):
    rows = ValidationRows(dataset.split("validation"), 16)
    assert rows.count > 20
    assert rows.choose(0).tolist() == rows.choose(rows.count + 5).tolist() == list(range(rows.count))
    for wanted in (1, 3, rows.count - 1):
        chosen = rows.choose(wanted)
        assert len(set(chosen.tolist())) == wanted
        assert chosen.min() == 0
        assert chosen.max() < rows.count
        assert np.ptp(np.diff([*chosen, rows.count])) <= 1  # equal gaps, the one after the last included
