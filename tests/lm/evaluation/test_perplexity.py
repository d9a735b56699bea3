from __future__ import annotations

import bz2
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
from lm.evaluation.perplexity import evaluate_text, questions_of, windows
from lm.kernels import masks

CPU = torch.device("cpu")
SENTENCES = ["The old miller found a silver key. " * 6, "An owl.", "Nobody sold the winter coat again. " * 3]


@pytest.fixture(scope="module")
def model(trained):
    return trained.load_model(CPU)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in SENTENCES))
    return str(path)


@given(st.integers(1, 90), st.integers(2, 30), st.integers(1, 30), st.booleans())
def test_every_token_but_the_first_is_predicted_once_within_the_context(length, context, stride, both_ways):
    stride = min(stride, context - 1 if both_ways else context)
    predicted = []
    for window in windows(length, context, stride, both_ways=both_ways):
        assert 0 <= window.begin < window.first
        assert window.end - window.begin <= context
        assert window.last <= window.end + (0 if both_ways else 1)
        assert window.end <= length
        if not both_ways:  # context - stride tokens before each, as far as there are so many
            assert window.first - window.begin >= min(window.first, context - stride + 1)
        predicted += range(window.first, window.last)
    assert predicted == list(range(1, length))


def test_windows_lie_side_by_side_but_for_the_last_which_reaches_back():
    assert [(w.begin, w.end) for w in windows(10, 4, 4, both_ways=False)] == [(0, 4), (4, 8), (5, 9)]


def nats_by_definition(model, tokenizer, text, context, stride):
    """One token after the other, each read by itself with what is before it in its window."""
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
def test_the_causal_loss_is_that_of_its_definition(trained, model, texts, stride):
    config = trained.config.replace(context_length=16)
    run = type(trained)(trained.path, config)
    result = evaluate_text(run, model, texts, ReadSettings(text_field="body"), stride=0 if stride == 16 else stride)
    wanted = sum(nats_by_definition(model, run.tokenizer, text, 16, stride) for text in SENTENCES)
    tokens = sum(len(run.tokenizer.encode(text)) + 1 for text in SENTENCES)
    size = sum(map(len, SENTENCES))
    found = result["validation"]["next_token"]
    assert found["predicted"] == result["validation_tokens"] == tokens
    assert found["nats_per_token"] == pytest.approx(wanted / tokens, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(wanted / math.log(2) / size, rel=1e-5)
    assert result["validation"]["masked_next_token"]["predicted"] == tokens - 3
    assert ("of which 5 count" in result["protocol"]) == (stride == 5)


@pytest.mark.parametrize(("readout", "shift"), [("masked_token", 0), ("masked_next_token", 1)])
def test_a_masked_readout_hides_every_token_once_behind_the_mask_token(trained, readout, shift):
    tokens, tokenizer = list(range(10, 80)), trained.tokenizer
    row, found = [tokenizer.end_of_text_id, *tokens], []
    for question in questions_of(0, tokens, tokenizer, readout, 20, 7, 5):
        assert len(question.tokens) <= 20
        hidden = [place for place, token in enumerate(question.tokens) if token == tokenizer.mask_id]
        assert {place + shift for place in question.places} <= set(hidden)
        assert len(hidden) < 14  # the others are in sight
        shown = next(token for token in question.tokens if token in tokens)
        begin = row.index(shown) - question.tokens.index(shown)
        for place, target in zip(question.places, question.targets, strict=True):
            assert row[begin + place + shift] == target
            found.append(target)
    assert sorted(found) == tokens


def test_floors_stand_beside_and_texts_are_read_as_data_preparation_reads_them(trained, model, tmp_path):
    (tmp_path / "a.txt").write_text(SENTENCES[0])
    (tmp_path / "b.md").write_text(SENTENCES[2])
    told = []
    result = evaluate_text(trained, model, str(tmp_path), ReadSettings(), progress=told.append)
    size = len(SENTENCES[0]) + len(SENTENCES[2])
    assert (result["documents"], result["validation_bytes"]) == (2, size)
    text = (SENTENCES[0] + SENTENCES[2]).encode()
    assert result["floors"]["bz2 -9"]["bits_per_byte"] == 8 * len(bz2.compress(text, 9)) / size
    for loss in result["validation"].values():
        assert loss["bits_per_byte"] < result["floors"]["unigram"]["bits_per_byte"]
    assert any("next_token" in line for line in told)


def test_what_cannot_be_read_is_said(trained, model, tmp_path):
    for source, stride, words in (
        ("-", 0, "standard input only once"),
        (str(tmp_path / "nowhere"), 0, "there is no file or folder"),
        (str(tmp_path / "white.txt"), 0, "there is no text in"),
        (str(tmp_path / "white.txt"), 33, "--stride must be between 1 and the context length, 32"),
    ):
        (tmp_path / "white.txt").write_text("\n\n")
        with pytest.raises(UserError, match=words):
            evaluate_text(trained, model, source, ReadSettings(), stride=stride)


def test_the_command_measures_a_text(trained, texts):
    arguments = ["evaluate", str(trained.path), "--text", texts, "--text-field", "body"]
    told = CliRunner().invoke(main, [*arguments, "--json"])
    assert told.exit_code == 0, told.output
    assert json.loads(told.stdout)["documents"] == 3
    told = CliRunner().invoke(main, [*arguments, "--stride", "8"])
    assert "unigram (floor)" in told.stdout
    assert "3 documents, each in windows of 32 tokens, of which 8 count" in told.stdout
    told = CliRunner().invoke(main, [*arguments, "--pairs", texts])
    assert (told.exit_code, "--text and --pairs are measured one at a time" in told.stderr) == (2, True)
