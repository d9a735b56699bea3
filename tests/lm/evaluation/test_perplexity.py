from __future__ import annotations

import bz2
import dataclasses
import json
import math

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.settings import ReadSettings
from lm.cli.main import main
from lm.evaluation.perplexity import document_queries, evaluate_text, windows
from lm.kernels import masks
from tests.conftest import loaded

SENTENCES = ["The old miller found a silver key. " * 6, "An owl.", "Nobody sold the winter coat again. " * 3]


@pytest.fixture(scope="module")
def model(trained):
    return loaded(trained)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in SENTENCES))
    return str(path)


@given(st.integers(1, 90), st.integers(2, 30), st.integers(1, 30), st.booleans())
def test_every_token_but_the_first_is_predicted_once_within_the_context(length, context, stride, bidirectional):
    stride = min(stride, context - 1 if bidirectional else context)
    predicted = []
    for window in windows(length, context, stride, bidirectional=bidirectional):
        assert 0 <= window.begin < window.first
        assert window.end - window.begin <= context
        assert window.last <= window.end + (0 if bidirectional else 1)
        assert window.end <= length
        if not bidirectional:  # context - stride tokens before each, as far as there are so many
            assert window.first - window.begin >= min(window.first, context - stride + 1)
        predicted += range(window.first, window.last)
    assert predicted == list(range(1, length))


def test_windows_lie_side_by_side_but_for_the_last_which_reaches_back():
    assert [(w.begin, w.end) for w in windows(10, 4, 4, bidirectional=False)] == [(0, 4), (4, 8), (5, 9)]


def nats_by_definition(model, text, context, stride):
    """One token after the other, each read by itself with what is before it in its window."""
    tokenizer, model = model.tokenizer, model.model
    row = [tokenizer.end_of_text_id, *tokenizer.encode(text), tokenizer.end_of_text_id]
    total = 0.0
    for target in range(1, len(row)):
        chunk = (target - 1) // stride
        last = min(chunk * stride + stride, len(row) - 1)
        begin = max(0, last - context)
        read = row[begin:target]
        lo, hi = masks.causal(1, len(read))
        with torch.no_grad():
            hidden = model(torch.tensor([read]), torch.arange(len(read))[None], lo, hi)
            total -= float(model.logits(hidden)[0, -1].double().log_softmax(-1)[row[target]])
    return total


@pytest.mark.parametrize("stride", [16, 5])
def test_the_causal_loss_is_that_of_its_definition(model, texts, stride):
    model = dataclasses.replace(model, config=model.config.replace(context_length=16))
    result = evaluate_text(model, texts, ReadSettings(text_field="body"), stride=0 if stride == 16 else stride)
    wanted = sum(nats_by_definition(model, text, 16, stride) for text in SENTENCES)
    tokens = sum(len(model.tokenizer.encode(text)) + 1 for text in SENTENCES)
    size = sum(map(len, SENTENCES))
    found = result["validation"]["next_token"]
    assert found["predicted"] == result["validation_tokens"] == tokens
    assert found["nats_per_token"] == pytest.approx(wanted / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(wanted / math.log(2) / size, rel=1e-5)
    assert result["validation"]["masked_next_token"]["predicted"] == tokens - 3
    assert ("of which 5 count" in result["protocol"]) == (stride == 5)


@pytest.mark.parametrize(("readout", "shift"), [("masked_token", 0), ("masked_next_token", 1)])
def test_a_masked_readout_hides_every_token_once_behind_the_mask_token(model, readout, shift):
    model = dataclasses.replace(model, config=model.config.replace(context_length=20, validation_mask_rate=0.2))
    tokens, tokenizer = list(range(10, 80)), model.tokenizer
    row, found = [tokenizer.end_of_text_id, *tokens], []
    for query in document_queries(model, 0, tokens, readout, 7):
        assert len(query.tokens) <= 20
        hidden = [position for position, token in enumerate(query.tokens) if token == tokenizer.mask_id]
        assert {position + shift for position in query.positions} <= set(hidden)
        assert len(hidden) < 14  # the others are in sight
        shown = next(token for token in query.tokens if token in tokens)
        begin = row.index(shown) - query.tokens.index(shown)
        for position, target in zip(query.positions, query.targets, strict=True):
            assert row[begin + position + shift] == target
            found.append(target)
    assert sorted(found) == tokens


def test_texts_are_read_as_in_data_preparation_and_compared_with_baselines(model, tmp_path):
    (tmp_path / "a.txt").write_text(SENTENCES[0])
    (tmp_path / "b.md").write_text(SENTENCES[2])
    printed = []
    result = evaluate_text(model, str(tmp_path), ReadSettings(), progress=printed.append)
    size = len(SENTENCES[0]) + len(SENTENCES[2])
    assert (result["documents"], result["validation_bytes"]) == (2, size)
    text = (SENTENCES[0] + SENTENCES[2]).encode()
    assert result["floors"]["bz2 -9"]["bits_per_byte"] == 8 * len(bz2.compress(text, 9)) / size
    for loss in result["validation"].values():
        assert loss["bits_per_byte"] < result["floors"]["unigram"]["bits_per_byte"]
    assert any("next_token" in line for line in printed)


def test_what_cannot_be_read_is_reported(model, tmp_path):
    for source, stride, words in (
        ("-", 0, "standard input does not allow"),
        (str(tmp_path / "nowhere"), 0, "there is no file or folder"),
        (str(tmp_path / "white.txt"), 0, "there is no text in"),
        (str(tmp_path / "white.txt"), 33, "--stride must be between 1 and the context length, 32"),
    ):
        (tmp_path / "white.txt").write_text("\n\n")
        with pytest.raises(UserError, match=words):
            evaluate_text(model, source, ReadSettings(), stride=stride)


def test_the_command_measures_a_text(trained, texts):
    arguments = ["evaluate", str(trained.path), "--text", texts, "--text-field", "body"]
    told = CliRunner().invoke(main, [*arguments, "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["documents"] == 3
    told = CliRunner().invoke(main, [*arguments, "--stride", "8"])
    assert "unigram (baseline)" in told.stdout
    assert "3 documents, each in windows of 32 tokens, of which 8 count" in told.stdout
    told = CliRunner().invoke(main, [*arguments, "--pairs", texts])
    assert (told.exit_code, "--text and --pairs cannot be combined" in told.stderr) == (2, True)
