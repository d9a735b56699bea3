from __future__ import annotations

import math

import pytest

from data_prep.errors import UserError
from lm.inference.language_model import LanguageModel
from lm.inference.scoring import log_likelihoods, texts_of_tokens, token_probabilities
from tests.lm.inference.test_generator import restless_model

TEXT = "The old miller found a café."


@pytest.fixture(scope="module")
def model(dataset) -> LanguageModel:
    return restless_model(dataset.tokenizer)


def found(model, text, readout, top=5):
    tokens = model.tokenizer.encode(text)
    return tokens, [each for part in token_probabilities(model, tokens, readout, top) for each in part]


@pytest.mark.parametrize("readout", ["next_token", "masked_next_token"])
def test_they_add_up_to_the_score_of_the_text(model, readout):
    tokens, each = found(model, TEXT, readout)
    assert [one.token for one in each] == tokens
    (score,) = log_likelihoods(model, [tokens], readout)
    assert sum(one.logprob for one in each) == pytest.approx(score, abs=1e-4)


def test_rank_and_alternatives_are_those_of_the_whole_distribution(model):
    tokens, each = found(model, TEXT, "next_token", top=model.tokenizer.vocab_size)
    for token, one in zip(tokens, each, strict=True):
        assert one.alternatives[one.rank - 1][0] == token
        assert one.alternatives[one.rank - 1][1] == one.logprob
        assert sum(math.exp(logprob) for _, logprob in one.alternatives) == pytest.approx(1, abs=1e-4)
        assert sorted((logprob for _, logprob in one.alternatives), reverse=True) == [p for _, p in one.alternatives]


def test_nothing_has_no_probabilities(model):
    assert found(model, "", "next_token") == ([], [])


def test_a_text_beyond_the_context_is_refused(model):
    with pytest.raises(UserError, match="at most 31"):
        found(model, TEXT * 10, "next_token")


def test_the_texts_of_tokens_add_up_to_the_text_and_cut_no_character(dataset, byte_dataset):
    for tokenizer in (dataset.tokenizer, byte_dataset.tokenizer):
        for text in (TEXT, "né €😀"):
            parts = texts_of_tokens(tokenizer, tokenizer.encode(text))
            assert "".join(parts) == text
    assert texts_of_tokens(byte_dataset.tokenizer, byte_dataset.tokenizer.encode("é")) == ["", "é"]
    assert texts_of_tokens(byte_dataset.tokenizer, byte_dataset.tokenizer.encode("é")[:1]) == ["�"]
