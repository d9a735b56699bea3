from __future__ import annotations

import math

import pytest
import torch

from data_prep.errors import UserError
from lm.inference.scoring import log_likelihoods, texts_of_tokens, token_probabilities
from lm.model.transformer import Transformer

TEXT = "The old miller found a café."


@pytest.fixture(scope="module")
def model(random_run) -> Transformer:
    return random_run.load_model(torch.device("cpu"))


def found(model, run, text, readout, top=5):
    tokens = run.tokenizer.encode(text)
    passes = token_probabilities(model, run.tokenizer, tokens, readout, run.config.data.context_length, top)
    return tokens, [each for part in passes for each in part]


@pytest.mark.parametrize("readout", ["next_token", "masked_next_token"])
def test_they_add_up_to_the_score_of_the_text(model, random_run, readout):
    tokens, each = found(model, random_run, TEXT, readout)
    assert [one.token for one in each] == tokens
    (score,) = log_likelihoods(model, random_run.tokenizer, [tokens], readout, random_run.config.data.context_length)
    assert sum(one.logprob for one in each) == pytest.approx(score, abs=1e-4)


def test_rank_and_alternatives_are_those_of_the_whole_distribution(model, random_run):
    tokens, each = found(model, random_run, TEXT, "next_token", top=random_run.tokenizer.vocab_size)
    for token, one in zip(tokens, each, strict=True):
        assert one.alternatives[one.rank - 1][0] == token
        assert one.alternatives[one.rank - 1][1] == one.logprob
        assert sum(math.exp(logprob) for _, logprob in one.alternatives) == pytest.approx(1, abs=1e-4)
        assert sorted((logprob for _, logprob in one.alternatives), reverse=True) == [p for _, p in one.alternatives]


def test_nothing_has_no_probabilities(model, random_run):
    assert found(model, random_run, "", "next_token") == ([], [])


def test_a_text_beyond_the_context_is_refused(model, random_run):
    with pytest.raises(UserError, match="at most 31"):
        found(model, random_run, TEXT * 10, "next_token")


def test_the_texts_of_tokens_add_up_to_the_text_and_cut_no_character(random_run, byte_dataset):
    for tokenizer in (random_run.tokenizer, byte_dataset.tokenizer):
        for text in (TEXT, "né €😀"):
            parts = texts_of_tokens(tokenizer, tokenizer.encode(text))
            assert "".join(parts) == text
    assert texts_of_tokens(byte_dataset.tokenizer, byte_dataset.tokenizer.encode("é")) == ["", "é"]
    assert texts_of_tokens(byte_dataset.tokenizer, byte_dataset.tokenizer.encode("é")[:1]) == ["�"]
