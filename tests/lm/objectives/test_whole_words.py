"""Masked objectives that hide whole words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from lm.config.settings import Config
from lm.data.batch import IGNORED, Batch, Vocabulary
from lm.data.corpora import Corpora
from lm.objectives.batches import TrainingBatches
from lm.objectives.text import TextObjective
from tests.lm.objectives.test_prefix_lm import END, rows_of

INSIDE = 20  # tokens from here on continue the word before them
JOINTS = np.array([np.arange(50) >= INSIDE, np.arange(50) != END])
VOCABULARY = Vocabulary(50, END, 2, joints=lambda: JOINTS)


def batch_of(rows, objective: str, **changes) -> Batch:
    config = Config().replace(objective=objective, mask_whole_words=True, vocab_size=50, **changes)
    return TextObjective(config, VOCABULARY).prepare(rows)


@given(seed=st.integers(0, 50), rate=st.sampled_from([0.15, 0.4]), shifted=st.booleans())
def test_a_word_is_hidden_with_all_its_tokens_or_not_at_all(seed, rate, shifted):
    rows = rows_of(4, 30, seed)
    batch = batch_of(rows, "masked_next_token" if shifted else "masked_token", seed=seed, mask_rate=rate)
    hidden = (batch.targets != IGNORED).numpy()
    if shifted:  # the target of a token is at its left neighbor
        hidden = np.concatenate([np.zeros((4, 1), dtype=bool), hidden[:, :-1]], axis=1)
    for row in range(4):
        words: list[list[int]] = []
        for place, token in enumerate(rows.inputs[row].tolist()):
            goes_on = words and token >= INSIDE and rows.inputs[row, place - 1] != END
            words = [*words[:-1], [*words[-1], place]] if goes_on else [*words, [place]]
        for word in words:
            if shifted and word[0] == 0:
                word = word[1:]  # a row's first token has no neighbor to predict it
            assert len({bool(hidden[row, place]) for place in word}) <= 1
            assert not any(hidden[row, place] for place in word if rows.inputs[row, place] == END)
    assert hidden.any(1).all()


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.7])
def test_each_token_is_hidden_at_the_mask_rate(rate):
    rows = rows_of(400, 200, ends=0.02)
    batch = batch_of(rows, "masked_token", mask_rate=rate, batch_tokens=400 * 256)
    text = rows.inputs != END
    hidden = (batch.targets != IGNORED).numpy()
    for some in (text, text & (rows.inputs >= INSIDE), text & (rows.inputs < INSIDE)):
        assert hidden[some].mean() == pytest.approx(rate, abs=0.012)


def test_without_the_setting_and_with_words_of_one_token_it_is_the_same():
    rows = rows_of(4, 30)
    alone = replace(VOCABULARY, joints=lambda: np.zeros((2, 50), dtype=bool))
    config = Config().replace(objective="hybrid", vocab_size=50)
    plain = TextObjective(config, alone).prepare(rows)
    words = TextObjective(config.replace(mask_whole_words=True), alone).prepare(rows)
    assert np.array_equal(plain.inputs, words.inputs)
    assert np.array_equal(plain.targets, words.targets)


def test_a_tokenizer_tells_its_words_or_is_refused(dataset, byte_dataset, small):
    config = small.replace(objective="masked_token", mask_whole_words=True)
    batch = TrainingBatches(Corpora([dataset]), config).batch(0)
    assert (batch.targets != IGNORED).any()
    with pytest.raises(UserError, match="where a token is a byte"):
        TrainingBatches(Corpora([byte_dataset]), config)
    TrainingBatches(Corpora([byte_dataset]), config.replace(objective="next_token"))  # hides nothing
