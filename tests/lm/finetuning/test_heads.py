"""Vectors of items and losses of answers, against plain formulas, text by text."""

from __future__ import annotations

import math

import pytest
import torch

from lm.data.examples import Example
from lm.finetuning.heads import TaskModel, by_example, item_batch, losses, probabilities
from lm.finetuning.task_inputs import Encoder
from lm.model.transformer import Transformer

TEXTS = ("the old fox", "a", "an owl found the long river before the rain came", "", "seven apples " * 12)


def model_of(random_run, outputs=2) -> TaskModel:
    model = TaskModel(random_run.load_model(torch.device("cpu")), outputs, 0.0).eval()
    model.initialise_head(1)
    return model


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("reads", ["causal", "bidirectional"])
@torch.no_grad()
def test_an_item_is_the_mean_of_its_places_window_by_window(random_run, reads, pooling):
    tokenizer, model = random_run.tokenizer, model_of(random_run)
    encoder = Encoder(tokenizer, "classification", 16, pooling, windows=True)
    encoded = encoder.encode([Example((text,), None, "") for text in TEXTS])
    found = model.vectors(item_batch(encoded, reads, tokenizer.end_of_text_id, 16))
    for example, vector in zip(encoded, found, strict=True):
        means = []
        for sequence in example.sequences:
            inputs, length = torch.tensor([sequence]), len(sequence)
            positions = torch.arange(length, dtype=torch.int32)[None]
            lo = torch.zeros_like(positions)
            hi = positions + 1 if reads == "causal" else torch.full_like(positions, length)
            hidden = model.trunk(inputs, positions, lo, hi)[0]
            means.append(hidden[-1] if pooling == "last" else hidden.mean(0))
        torch.testing.assert_close(vector, torch.stack(means).mean(0), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pairs_that_are_read_apart_are_put_together_from_their_texts_vectors(random_run):
    tokenizer = random_run.tokenizer
    model = TaskModel(random_run.load_model(torch.device("cpu")), 3, 0.0, pairs=True).eval()
    model.initialise_head(1)
    encoder = Encoder(tokenizer, "classification", 16, "mean", windows=True, apart=True)
    pairs = [("the old fox", "seven apples " * 12), ("a", ""), ("", "an owl"), ("an owl", "an owl")]
    batch = item_batch(
        encoder.encode([Example(pair, None, "") for pair in pairs]), "causal", tokenizer.end_of_text_id, 16
    )
    alone = [
        model.vectors(item_batch(encoder.encode([Example((text,), None, "")]), "causal", tokenizer.end_of_text_id, 16))
        for pair in pairs
        for text in pair
    ]
    assert batch.items.tolist() == [1, 1, 1, 1]
    for number, found in enumerate(model(batch)):
        u, v = alone[2 * number][0], alone[2 * number + 1][0]
        wanted = model.head(torch.cat((u, v, (u - v).abs(), u * v)))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_losses_are_those_of_the_plain_formulas():
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels, items = torch.tensor([0, 2, 1, 1, 0, 2]), torch.ones(6, dtype=torch.int64)
    wanted = [-math.log(float(row.softmax(0)[label])) for row, label in zip(outputs, labels, strict=True)]
    assert losses("classification", outputs, labels, items).tolist() == pytest.approx(wanted, rel=1e-5)
    smooth = losses("tokens", outputs, labels, items, 0.3)
    everywhere = -outputs.log_softmax(1).mean(1)
    assert smooth.tolist() == pytest.approx((0.7 * torch.tensor(wanted) + 0.3 * everywhere).tolist(), rel=1e-5)
    numbers = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, 0.0])
    assert losses("regression", outputs[:, :1], numbers, items).tolist() == pytest.approx(
        ((outputs[:, 0] - numbers) ** 2).tolist()
    )


def test_a_choice_is_among_as_many_as_the_example_has():
    scores, items = torch.tensor([[1.0], [2.0], [0.5], [3.0], [1.0]]), torch.tensor([2, 3])
    found = losses("choice", scores, torch.tensor([1, 0]), items)
    wanted = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(2.5) + math.exp(0.5))]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert by_example(scores[:, 0], items).tolist() == [[1.0, 2.0, -math.inf], [0.5, 3.0, 1.0]]
    chances = probabilities("choice", scores, items)
    assert chances.sum(1) == pytest.approx([1, 1])
    assert chances[0, 2] == 0


def test_the_vocabulary_head_of_a_task_model_does_not_learn(random_run):
    trunk = Transformer(random_run.config.replace(tie_embeddings=False).model)
    model = TaskModel(trunk, 2, 0.0)
    assert "trunk.head.weight" in model.state_dict()
    assert not trunk.head.weight.requires_grad
