"""Prefix language modeling: who sees whom, and what is predicted."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.config.settings import Config
from lm.data.batch import IGNORED, Batch, Rows, Vocabulary, rows_of_windows
from lm.data.corpora import Corpora
from lm.kernels import masks
from lm.model.transformer import Transformer
from lm.objectives.batches import TrainingBatches
from lm.objectives.prefix_lm import PrefixLM

END = 0
VOCABULARY = Vocabulary(50, END, 2)


def rows_of(rows: int, length: int, seed: int = 0, ends: float = 0.1, padding: int = 0) -> Rows:
    draw = np.random.default_rng(seed)
    windows = draw.integers(3, 50, (rows, length + 1))
    windows[draw.random(windows.shape) < ends] = END
    made = rows_of_windows(windows, VOCABULARY)
    return replace(made, lengths=length - draw.integers(0, padding + 1, rows))


def objective(**changes) -> PrefixLM:
    return PrefixLM(Config().replace(objective="prefix_lm", vocab_size=50, **changes), VOCABULARY)


def documents(rows: Rows, row: int) -> list[tuple[int, int]]:
    """First position and end of each document in the used part of a row."""
    length = int(rows.lengths[row])
    begins = [n for n in range(length) if n == 0 or rows.inputs[row, n] == END]
    return [*zip(begins, [*begins[1:], length], strict=True)]


@given(seed=st.integers(0, 50), length=st.integers(1, 24), ends=st.sampled_from([0.0, 0.1, 0.9]))
def test_a_prefix_sees_itself_and_what_follows_is_predicted_from_all_before_it(seed, length, ends):
    rows = rows_of(3, length, seed, ends, padding=length // 2)
    batch = objective().drawn(rows, seed)
    sees = masks.dense(batch.lo, batch.hi, length)
    for row in range(3):
        for begin, end in documents(rows, row):
            causal = torch.ones(end - begin, end - begin).tril().bool()
            inside = sees[row, begin:end, begin:end]
            fits = []
            for size in range(end - begin):
                expected = causal.clone()
                expected[:size, :size] = True
                fits += [size] if torch.equal(inside, expected) else []
            assert fits  # sizes 0 and 1 are the same
            shown = max(0, fits[0] - 1)
            wanted = [IGNORED] * shown + rows.targets[row, begin + shown : end].tolist()
            assert batch.targets[row, begin:end].tolist() == wanted
            assert not sees[row, begin:end, :begin].any()
            assert not sees[row, begin:end, end:].any()
            assert batch.positions[row, begin:end].tolist() == list(range(end - begin))
        assert not sees[row, int(rows.lengths[row]) :].any()
        assert (batch.targets[row, int(rows.lengths[row]) :] == IGNORED).all()
    assert (batch.hi.diff(dim=1) >= 0).all()
    assert torch.equal(batch.loss_weights, (batch.targets != IGNORED).float())


def shares(batch: Batch, length: int) -> np.ndarray:
    """The prefix of each row that is one document, as a share of it."""
    return (batch.hi[:, 0].numpy() - 1) / length


def test_prefixes_are_drawn_evenly_from_the_seed_and_the_row():
    rows = rows_of(2000, 100, ends=0.0)
    found = shares(objective().drawn(rows, 1), 100)
    for level in (0.1, 0.5, 0.9):
        assert float((found < level).mean()) == pytest.approx(level, abs=0.04)
    assert shares(objective(longest_prefix=0.3).drawn(rows, 1), 100).max() < 0.3
    assert (shares(objective(longest_prefix=0.0).drawn(rows, 1), 100) == 0).all()
    some = rows.chosen(np.array([7, 3]))
    assert shares(objective().drawn(some, 1), 100).tolist() == found[[7, 3]].tolist()
    assert shares(objective().drawn(some, 2), 100).tolist() != found[[7, 3]].tolist()


def test_no_prediction_depends_on_its_target_or_on_what_follows_it():
    """The model itself is the witness: changing a later token changes no prediction that counts."""
    rows = rows_of(4, 16, seed=3)
    batch = objective().drawn(rows, 5)
    model = Transformer(Config().replace(num_layers=2, hidden_size=32, num_heads=2, vocab_size=50).model).initialize(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.1)
        before = model.read(batch)
        for changed in range(1, 16):
            other = batch.inputs.clone()
            other[:, changed] = 1
            after = model.read(replace(batch, inputs=other))
            predicts = batch.targets[:, :changed] != IGNORED
            assert torch.allclose(before[:, :changed][predicts], after[:, :changed][predicts], atol=1e-6)


def test_a_step_weighs_all_predicted_tokens_alike_and_has_a_part_of_its_name(dataset, small):
    batches = TrainingBatches(Corpora([dataset]), small.replace(objective="prefix_lm", packing="documents"))
    batch = batches.batch(2)
    assert batch.parts == {"prefix_lm": 8}
    predicted = batch.targets != IGNORED
    assert torch.equal(batch.loss_weights, predicted / predicted.sum())


def test_a_run_learns_after_prefixes_and_without(small, quietly, tmp_path):
    config = small.replace(objective="prefix_lm", steps=40, validate_every=20, learning_rate=0.01)
    first, last = (line["validation"] for line in quietly(config, tmp_path / "run").metrics() if "validation" in line)
    assert list(first) == ["next_token", "prefix_lm"]
    assert list(first["prefix_lm"]) == ["nats_per_token", "predicted"]
    assert 0 < first["prefix_lm"]["predicted"] < first["next_token"]["predicted"]
    assert all(last[name]["nats_per_token"] < first[name]["nats_per_token"] for name in first)
