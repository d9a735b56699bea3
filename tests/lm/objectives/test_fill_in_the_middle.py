"""Fill in the middle: what a document becomes, and what is predicted of it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from lm.config.settings import Config
from lm.data.batch import IGNORED, Rows, Vocabulary
from lm.objectives.fill_in_the_middle import FillInTheMiddle
from tests.lm.objectives.test_prefix_lm import END, documents, rows_of

BEFORE, AFTER, MIDDLE = 50, 51, 52
VOCABULARY = Vocabulary(53, END, 2, END, (BEFORE, AFTER, MIDDLE))


def objective(**changes) -> FillInTheMiddle:
    return FillInTheMiddle(Config().replace(objective="fill_in_the_middle", vocab_size=53, **changes), VOCABULARY)


def as_it_was(tokens: list[int]) -> tuple[list[int], list[list[int]]]:
    """A rearranged document in its order, less what was added, and its three parts."""
    assert (tokens[0], tokens[-1]) == (BEFORE, END)
    if tokens[1] == AFTER:  # the suffix comes first; where the prefix ends is not to be seen
        suffix, rest = (part.split() for part in " ".join(map(str, tokens[2:-1])).split(str(MIDDLE)))
        return [*map(int, rest), *map(int, suffix)], []
    text = " ".join(map(str, tokens[1:-1]))
    prefix, text = text.split(str(AFTER))
    suffix, middle = text.split(str(MIDDLE))
    parts = [[*map(int, part.split())] for part in (prefix, middle, suffix)]
    return [token for part in parts for token in part], parts


def predicted(rows: Rows, batch) -> list[list[int]]:
    """The inputs of each document after its first, and its last target, which is what a reader reads."""
    found = []
    for row in range(len(rows.inputs)):
        for begin, end in documents(rows, row):
            found.append([*batch.inputs[row, begin + 1 : end].tolist(), int(batch.targets[row, end - 1])])
    return found


@given(seed=st.integers(0, 50), length=st.integers(1, 30), ends=st.sampled_from([0.0, 0.05, 0.9]))
def test_each_document_is_itself_rearranged_less_its_last_tokens(seed, length, ends):
    rows = rows_of(3, length, seed, ends, padding=length // 2)
    batch = objective(infill_rate=1.0).drawn(rows, seed)
    places = [(row, *each) for row in range(3) for each in documents(rows, row)]
    for (row, begin, end), tokens in zip(places, predicted(rows, batch), strict=True):
        original = rows.targets[row, begin:end].tolist()
        if end - begin < 7:
            assert tokens == original
        else:
            assert as_it_was(tokens)[0] == original[: end - begin - 4]
        # The target of each position is the token after it, unless that introduces a part.
        wanted = [IGNORED if token in (BEFORE, AFTER, MIDDLE) else token for token in tokens]
        assert batch.targets[row, begin:end].tolist() == wanted
        assert batch.inputs[row, begin] == rows.inputs[row, begin]
        assert batch.lo[row, begin:end].tolist() == [begin] * (end - begin)
        assert batch.hi[row, begin:end].tolist() == list(range(begin + 1, end + 1))
    for row in range(3):
        assert (batch.targets[row, int(rows.lengths[row]) :] == IGNORED).all()


def test_shares_of_the_documents_are_rearranged_and_cut_evenly():
    rows = rows_of(3000, 44, ends=0.0)
    tokens = predicted(rows, objective(infill_rate=0.4, suffix_first_rate=0.25).drawn(rows, 0))
    kinds = ["no" if each[0] != BEFORE else "suffix" if each[1] == AFTER else "prefix" for each in tokens]
    assert kinds.count("no") / 3000 == pytest.approx(0.6, abs=0.03)
    assert kinds.count("suffix") / 3000 == pytest.approx(0.1, abs=0.03)
    parts = [as_it_was(each)[1] for each, kind in zip(tokens, kinds, strict=True) if kind == "prefix"]
    for which in range(3):  # two even cuts leave a third to each part
        assert np.mean([len(part[which]) for part in parts]) == pytest.approx(40 / 3, abs=1)


def test_it_depends_on_the_seed_and_the_number_of_the_row_alone():
    rows, made = rows_of(8, 40), objective(infill_rate=1.0)
    whole = made.drawn(rows, 1)
    some = made.drawn(rows.chosen(np.array([5, 2])), 1)
    assert torch.equal(some.inputs, whole.inputs[[5, 2]])
    assert not torch.equal(made.drawn(rows, 2).inputs, whole.inputs)
    plain = objective(infill_rate=0.0).drawn(rows, 1)
    assert np.array_equal(plain.inputs, rows.inputs)
    assert np.array_equal(plain.targets, rows.targets)


def test_a_tokenizer_without_the_tokens_is_refused_in_a_sentence():
    config = Config().replace(objective="fill_in_the_middle")
    with pytest.raises(UserError, match="build the data with --extra-token infill"):
        FillInTheMiddle(config, replace(VOCABULARY, infill=None))
