"""Mixtures of objectives that predict tokens; those with views are in test_text_views.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lm.config.settings import Config
from lm.data.batch import Batch
from lm.data.corpora import Corpora
from lm.model.transformer import Transformer
from lm.objectives.batches import TrainingBatches
from lm.objectives.objective import open_objective
from lm.training.gradients import step_gradients
from lm.training.pretraining import train
from tests.conftest import StopAt

THREE = "next_token:0.5,masked_token:0.25,masked_next_token:0.25"


@pytest.fixture
def opened(dataset, small):
    """objective → (config, batches, a model in which every weight has a gradient)."""

    def make(objective: str, **changes):
        config = small.replace(vocab_size=400, objective=objective, batch_tokens=512, **changes)
        model = Transformer(config.model).initialize(0)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
        return config, TrainingBatches(Corpora([dataset]), config), model

    return make


def part_of(batch: Batch, name: str) -> Batch:
    first = 0
    for part, rows in batch.parts.items():
        if part == name:
            return batch.rows(first, first + rows)
        first += rows
    raise KeyError(name)


def as_lists(batch: Batch) -> list[tuple]:
    return [*zip(batch.inputs.tolist(), batch.targets.tolist(), batch.lo.tolist(), batch.hi.tolist(), strict=True)]


def test_each_step_has_exactly_the_share_of_each_objective_and_every_row_has_one(opened):
    config, batches, _ = opened(THREE)
    taken = []
    for step in range(8):
        rows, batch = batches.rows.of_step(step), batches.batch(step)
        assert batch.parts == {"next_token": 8, "masked_token": 4, "masked_next_token": 4}
        chosen = {}
        for name in batch.parts:
            alone = open_objective(config.replace(objective=name), batches.rows.inputs)
            # What an objective makes of a row depends on the seed and the number of the row alone.
            found = [as_lists(alone.prepare(rows.chosen(np.array([n]))))[0] for n in range(16)]
            chosen[name] = [found.index(row) for row in as_lists(part_of(batch, name))]
        assert sorted(n for each in chosen.values() for n in each) == list(range(16))
        taken.append(chosen["next_token"])
    assert len({tuple(each) for each in taken}) == 8
    assert len({n for each in taken for n in each}) == 16


@pytest.mark.parametrize("shares", [THREE, "masked_token:1/8,next_token:7/8", "hybrid:0.5,masked_token:0.5"])
def test_the_loss_is_the_mean_of_the_losses_of_the_parts_by_their_shares(opened, shares):
    config, batches, model = opened(shares, masked_fraction=0.25)
    batch = batches.batch(3)
    losses, told = step_gradients(batches.objective, model, batch, config, 3)
    assert sum(told.values()) == 1
    expected = {}
    for name, rows in batch.parts.items():
        part = part_of(batch, name)
        logits = model.logits(model(part.inputs, part.positions, part.lo, part.hi)).double()
        expected[name] = float(F.cross_entropy(logits.flatten(0, 1), part.targets.flatten()).detach()) * rows / 16
        assert told[name] == rows / 16
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        assert float(losses[name]) == pytest.approx(loss, rel=1e-5)


def test_a_hybrid_in_a_mixture_keeps_its_own_masked_fraction(opened):
    _, batches, _ = opened("hybrid:0.75,masked_token:0.25", masked_fraction=0.125)
    masked = [batches.batch(step).parts["masked_next_token"] for step in range(8)]
    assert sum(masked) == 8 * 12 / 8
    assert max(masked) - min(masked) == 1


def test_both_corpora_are_learned_by_every_objective(dataset, other_dataset, opened):
    """Two corpora by turns, and half of the rows for each of two objectives, must not mean one objective a corpus."""
    config, *_ = opened("next_token:0.5,masked_token:0.5")
    both = TrainingBatches(Corpora([dataset, other_dataset], [Fraction(1)] * 2), config)
    found: Counter[tuple[str, int]] = Counter()
    for step in range(30):
        rows, batch = both.rows.of_step(step), both.batch(step)
        texts = both.rows.locate(rows.numbers).texts.tolist()
        causal = {tuple(row) for row in part_of(batch, "next_token").inputs.tolist()}
        found.update(("next_token" if tuple(row) in causal else "other", text) for row, text in
                     zip(rows.inputs.tolist(), texts, strict=True))  # fmt: skip
    assert sum(found.values()) == 480
    assert all(80 < count < 160 for count in found.values())


def test_settings_name_the_readouts_of_all_objectives_once_the_causal_one_first():
    def of(objective: str) -> Config:
        return Config().replace(objective=objective)

    assert of("masked_token:0.5,next_token:0.5").readouts == ("next_token", "masked_token")
    assert of(THREE).predicting().objective.shares == of(THREE).objective.shares
    mixed = of("next_token:0.5,masked_token:0.25,simclr:0.25")
    assert {name: str(share) for name, share in mixed.predicting().objective.shares.items()} == {
        "next_token": "2/3", "masked_token": "1/3"
    }  # fmt: skip
    assert of("hybrid:0.75,simclr:0.25").predicting().objective.objective == "hybrid"


def test_rows_are_shared_exactly_beside_views_too(opened):
    _, batches, _ = opened("next_token:0.5,masked_token:0.25,simclr:0.25", view_tokens=10)
    for step in range(3):
        batch = batches.batch(step)
        assert batch.parts == {"next_token": 8, "masked_token": 4, "simclr": 4}
        assert float(batch.predicted.loss_weights.sum()) == pytest.approx(0.75, abs=1e-5)
        assert float(part_of(batch.predicted, "masked_token").loss_weights.sum()) == pytest.approx(0.25, abs=1e-5)


def test_operations_are_counted_by_share(opened):
    _, batches, model = opened(THREE)
    one = open_objective(Config().replace(objective="next_token"), batches.rows.inputs)
    assert batches.objective.flops_per_token(model, 32) == pytest.approx(one.flops_per_token(model, 32))


def test_a_stopped_run_ends_with_the_same_bits(small, quietly, tmp_path):
    config = small.replace(objective=THREE, steps=9, checkpoint_every=2, dropout=0.1, micro_batch_rows=2)
    whole = quietly(config, tmp_path / "whole")
    for stop in (3, 7):
        with pytest.raises(InterruptedError):
            train(config, tmp_path / "stopped", StopAt(stop))
    again = quietly(config, tmp_path / "stopped")
    for read in ("model", "optimizer"):
        expected, found = (getattr(run.newest(), read)() for run in (whole, again))
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())
    lines = [line for line in whole.metrics() if "loss" in line]
    assert all(set(line) >= {"loss_next_token", "loss_masked_token", "loss_masked_next_token"} for line in lines)


def test_a_validation_has_the_number_of_every_objective(small, quietly, tmp_path):
    run = quietly(small.replace(objective=THREE, steps=40, validate_every=20, learning_rate=0.01), tmp_path / "run")
    first, last = (line["validation"] for line in run.metrics() if "validation" in line)
    assert list(first) == ["next_token", "masked_token", "masked_next_token"]
    assert all(last[name]["nats_per_token"] < first[name]["nats_per_token"] for name in first)


def test_the_example_of_a_micro_batch_has_the_rows_asked_for(opened):
    _, batches, _ = opened(THREE)
    for rows in (1, 2, 3, 16):
        example = batches.objective.example(rows)
        assert len(example) == sum(example.parts.values()) == rows
        assert replace(example, parts={}).inputs.shape == (rows, 32)
