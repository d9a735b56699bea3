from __future__ import annotations

import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.shards.counts import token_counts
from lm.config.consistency import inconsistencies
from lm.config.corpus_entry import corpus_of
from lm.config.settings import Config
from lm.data.corpora import Corpora, JoinedSplit, open_corpora
from lm.evaluation.validation_loss import evaluate


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("data/wiki", ("data/wiki", 1)),
        ("data/wiki@2", ("data/wiki", 2)),
        ("data/wiki@0.25", ("data/wiki", Fraction(1, 4))),
        ("me@home/wiki", ("me@home/wiki", 1)),
        ("me@home/wiki@3", ("me@home/wiki", 3)),
        ("data@1/0", ("data@1/0", 1)),  # no number, so a path
    ],
)
def test_an_entry_is_a_path_and_perhaps_a_weight(text, expected):
    assert corpus_of(text) == expected


def test_a_weight_that_is_not_above_zero_is_told():
    assert list(inconsistencies(Config().replace(data=("a@0", "b@2")))) == ['data: the weight of "a@0" must be above 0']


@given(data=st.data())
def test_joined_splits_are_one_stream(dataset, other_dataset, data):
    parts = [d.split("train") for d in (dataset, other_dataset, dataset)]
    joined = JoinedSplit(parts)
    stream = np.concatenate([part.read(0, part.tokens) for part in parts])
    assert joined.tokens == len(stream)
    assert joined.documents == sum(part.documents for part in parts)
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert np.array_equal(joined.read(start, stop), stream[start:stop])
    out = np.full(stop - start, -1)
    joined.read_into(start, out)
    assert np.array_equal(out, stream[start:stop])


def test_reading_beyond_joined_splits_is_refused(dataset):
    joined = JoinedSplit([dataset.split("train")] * 2)
    with pytest.raises(IndexError):
        joined.read(0, joined.tokens + 1)
    with pytest.raises(IndexError):
        joined.read_into(-1, np.empty(5))


def test_another_tokenizer_is_refused_with_the_mend(dataset, byte_dataset):
    message = (
        rf"{byte_dataset.directory} was made with another tokenizer than {dataset.directory}: "
        rf"prepare it with --tokenizer {dataset.directory}/tokenizer.json"
    )
    with pytest.raises(UserError, match=message):
        open_corpora((str(dataset.directory), f"{byte_dataset.directory}@2"))


@pytest.mark.parametrize("nothing", [(), ("",)])
def test_no_data_is_told(nothing):
    with pytest.raises(UserError, match="no data: name a folder"):
        open_corpora(nothing)


def test_the_fingerprint_names_content_and_shares(dataset, other_dataset):
    def fingerprint(*data: str) -> str:
        return open_corpora(data).fingerprint

    a, b = str(dataset.directory), str(other_dataset.directory)
    assert fingerprint(a) == fingerprint(f"{a}@5") == dataset.fingerprint
    assert fingerprint(a, b) == fingerprint(f"{a}@2", f"{b}@2.0")
    assert len({fingerprint(a), fingerprint(b), fingerprint(a, b), fingerprint(b, a), fingerprint(f"{a}@2", b)}) == 5


def test_moved_folders_have_the_same_fingerprint(dataset, other_dataset, tmp_path):
    shutil.copytree(other_dataset.directory, tmp_path / "moved")
    before = open_corpora((str(dataset.directory), str(other_dataset.directory)))
    assert open_corpora((str(dataset.directory), str(tmp_path / "moved"))).fingerprint == before.fingerprint


def test_training_on_two_corpora_validates_on_both_and_goes_on_bit_for_bit(
    dataset, other_dataset, small, quietly, tmp_path
):
    data = (f"{dataset.directory}@3", str(other_dataset.directory))
    config = small.replace(data=data, packing="documents", steps=6, checkpoint_every=3, log_every=1)
    straight = quietly(config, tmp_path / "straight")
    shutil.copytree(straight.path, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step_00000006")  # as if killed after step 3
    resumed = quietly(config, tmp_path / "resumed")
    losses = [[line["loss"] for line in run.metrics() if "loss" in line] for run in (straight, resumed)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    weights = [run.newest().model() for run in (straight, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    result = evaluate(straight)
    validation = [d.split("validation") for d in (dataset, other_dataset)]
    assert result["validation_tokens"] == sum(split.tokens for split in validation)
    assert token_counts(Corpora([dataset, other_dataset]).split("validation"), 400).sum() == result["validation_tokens"]
    with pytest.raises(UserError, match="was trained on other data"):
        quietly(config.replace(data=(str(dataset.directory), str(other_dataset.directory))), tmp_path / "resumed")
