from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from lm.inference.language_model import LanguageModel
from lm.inference.scoring import log_likelihoods
from lm.kernels import masks
from tests.lm.inference.test_generator import restless_model


@pytest.fixture(scope="module")
def model(dataset) -> LanguageModel:
    return restless_model(dataset.tokenizer)


def one_by_one(model, text, readout, first=0) -> float:
    """A text's score by its definition: each token by itself, nothing packed, from all logits."""
    total, row = 0.0, [model.tokenizer.end_of_text_id, *text]
    for i in range(first + 1, len(row)):
        if readout == "next_token":
            read, place = row[:i], i - 1
            lo, hi = masks.causal(1, len(read))
        else:
            read = [*row[:i], model.tokenizer.mask_id, *row[i + 1 :]]
            place = i - 1 if readout == "masked_next_token" else i
            lo, hi = masks.bidirectional(1, len(read))
        with torch.no_grad():
            hidden = model.model(torch.tensor([read]), torch.arange(len(read))[None], lo, hi)
            total += float(model.model.logits(hidden)[0, place].double().log_softmax(-1)[row[i]])
    return total


@pytest.mark.parametrize("readout", ["next_token", "masked_next_token", "masked_token"])
@given(lengths=st.lists(st.integers(1, 15), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_packed_scores_are_those_of_each_text_by_itself(model, readout, lengths, seed):
    draw = np.random.default_rng(seed)
    texts = [draw.integers(5, 400, length).tolist() for length in lengths]
    firsts = [int(draw.integers(0, length)) for length in lengths]
    for starts in (None, firsts):
        found = log_likelihoods(model, texts, readout, firsts=starts)
        wanted = [
            one_by_one(model, text, readout, first)
            for text, first in zip(texts, starts or [0] * len(texts), strict=True)
        ]
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


def test_texts_of_equal_tokens_are_equally_likely_wherever_they_are_packed(model):
    text = list(range(20, 29))
    found = log_likelihoods(model, [text, [7] * 13, text, [9] * 3, text], "next_token")
    np.testing.assert_allclose(found[[2, 4]], found[0], rtol=1e-5)


def test_an_empty_text_and_no_texts_cost_nothing(model):
    for readout in ("next_token", "masked_next_token"):
        assert log_likelihoods(model, [[]], readout).tolist() == [0.0]
        assert log_likelihoods(model, [], readout).tolist() == []


def test_a_text_beyond_the_context_is_refused(model):
    log_likelihoods(model, [[5] * 31], "next_token")
    with pytest.raises(UserError, match="has 32 tokens; this model reads at most 31"):
        log_likelihoods(model, [[5] * 32], "next_token")
