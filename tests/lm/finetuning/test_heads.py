"""Vectors of items against plain formulas, text by text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from lm.data.examples import Example
from lm.finetuning.heads import TaskModel, item_batch, pair_features
from lm.finetuning.task_inputs import Encoder
from lm.model.transformer import Transformer

TEXTS = ("the old fox", "a", "an owl found the long river before the rain came", "", "seven apples " * 12)


def model_of(random_run, outputs=2) -> TaskModel:
    model = TaskModel(random_run.load_model(torch.device("cpu")), outputs, 0.0).eval()
    model.initialize_head(1)
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
    model.initialize_head(1)
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


def test_the_features_of_a_pair_are_both_their_distance_and_their_product():
    u, v = np.array([[1.0, 2.0]], dtype=np.float32), np.array([[3.0, -1.0]], dtype=np.float32)
    wanted = [[1, 2, 3, -1, 2, 3, 3, -2]]
    assert np.concatenate(pair_features(u, v), axis=1).tolist() == wanted
    assert torch.cat(pair_features(torch.from_numpy(u), torch.from_numpy(v)), dim=1).tolist() == wanted
    assert sparse.hstack(pair_features(sparse.csr_array(u), sparse.csr_array(v))).todense().tolist() == wanted


def test_the_vocabulary_head_of_a_task_model_does_not_learn(random_run):
    trunk = Transformer(random_run.config.replace(tie_embeddings=False).model)
    model = TaskModel(trunk, 2, 0.0)
    assert "trunk.head.weight" in model.state_dict()
    assert not trunk.head.weight.requires_grad
