from __future__ import annotations

import bz2
import json
import math
import shutil
from collections import Counter

import pytest
import torch

from data_prep.errors import UserError
from data_prep.shards import counts as counting
from data_prep.shards.counts import token_counts
from data_prep.shards.tokens import open_dataset
from lm.evaluation import baselines
from lm.evaluation.baselines import compressed_bytes, compressor_bits, dataset_baselines
from lm.evaluation.validation_loss import evaluate, verdict
from lm.runs.directory import open_run
from lm.training.validation import validate_readouts


@pytest.fixture
def run(trained, tmp_path):
    """A copy, because an evaluation is kept in the run directory, perhaps by an earlier test."""
    kept = shutil.ignore_patterns("evaluation.json")
    return open_run(shutil.copytree(trained.path, tmp_path / "run", ignore=kept))


def test_an_evaluation_is_over_the_whole_split_and_every_token(run, dataset):
    result = evaluate(run)
    model = run.load_model(torch.device("cpu"))
    losses = validate_readouts(model, dataset, run.config, rows=0, every_token=True)
    split = dataset.split("validation")
    assert result["validation"] == losses
    assert result["step"] == run.newest().step == 100
    assert (result["validation_tokens"], result["validation_bytes"]) == (split.tokens, split.text_bytes)
    assert result["validation"]["next_token"]["predicted"] == split.tokens
    assert result["validation"]["masked_next_token"]["predicted"] == split.tokens - split.documents
    assert result["data_fingerprint"] == dataset.fingerprint
    assert "windows of 32 tokens" in result["protocol"]
    assert "one token in 7" in result["protocol"]
    assert json.loads((run.path / "evaluation.json").read_text()) == result


def test_a_trained_model_beats_the_baseline_that_knows_no_context(run):
    result = evaluate(run)
    for losses in result["validation"].values():
        assert losses["bits_per_byte"] < result["floors"]["unigram"]["bits_per_byte"]


def test_the_unigram_baseline_is_its_closed_form(dataset):
    train, validation = dataset.split("train"), dataset.split("validation")
    counts = Counter(train.read(0, train.tokens).tolist())
    total = train.tokens + 400
    nats = -sum(math.log((counts[t] + 1) / total) for t in validation.read(0, validation.tokens).tolist())
    found = dataset_baselines(dataset)["unigram"]
    assert found["nats_per_token"] == pytest.approx(nats / validation.tokens)
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / validation.text_bytes)


@pytest.mark.parametrize("at_once", [1 << 22, 37])
def test_the_bz2_baseline_is_the_compressed_text(dataset, at_once, monkeypatch):
    monkeypatch.setattr(baselines, "READ_AT_ONCE", at_once)
    split = dataset.split("validation")
    text = dataset.tokenizer.decode_bytes(split.read(0, split.tokens).tolist())
    assert len(text) == split.text_bytes
    size = len(bz2.compress(text, 9))
    assert compressed_bytes(text[i : i + 100] for i in range(0, len(text), 100)) == size
    assert dataset_baselines(dataset)["bz2 -9"] == {
        "nats_per_token": None,
        "bits_per_byte": 8 * size / split.text_bytes,
    }
    assert compressor_bits(dataset) == 8 * size / split.text_bytes
    begin = dataset.tokenizer.decode_bytes(split.read(0, 99).tolist())
    assert compressor_bits(dataset, 99) == 8 * len(bz2.compress(begin, 9)) / len(begin)


@pytest.mark.parametrize("at_once", [1 << 22, 37])
def test_token_counts_count_every_token(dataset, at_once, monkeypatch):
    monkeypatch.setattr(counting, "COUNTED_TOKENS", at_once)
    split = dataset.split("train")
    counts = token_counts(split, 400)
    assert dict(enumerate(counts.tolist())) == dict.fromkeys(range(400), 0) | Counter(
        split.read(0, split.tokens).tolist()
    )
    assert counts[0] == split.documents


def test_an_evaluation_is_kept_until_the_checkpoint_or_the_data_changes(run, text_folder, make_dataset, tmp_path):
    saved = run.path / "evaluation.json"
    first = evaluate(run)
    saved.write_text(json.dumps(first | {"protocol": "kept"}))
    assert evaluate(run)["protocol"] == "kept"
    saved.write_text(json.dumps(first | {"protocol": "kept", "checkpoint": "another"}))
    assert evaluate(run) == first
    tokenizer = run.path / "tokenizer.json"
    other = make_dataset(text_folder, tmp_path / "other", tokenizer=tokenizer, validation_fraction=0.2)
    second = evaluate(run, str(other.directory))
    assert second["data_fingerprint"] != first["data_fingerprint"]
    assert second["validation_tokens"] > first["validation_tokens"]
    assert json.loads(saved.read_text()) == first  # other data does not take its place
    assert evaluate(run) == first


def test_data_of_another_tokenizer_is_refused(run, byte_dataset):
    with pytest.raises(UserError, match=r"another tokenizer than .*tokenizer\.json"):
        evaluate(run, str(byte_dataset.directory))
    assert not (run.path / "evaluation.json").exists()


def test_data_without_validation_text_is_refused(run, text_folder, make_dataset, tmp_path):
    tokenizer = run.path / "tokenizer.json"
    bare = make_dataset(text_folder, tmp_path / "bare", tokenizer=tokenizer, validation_fraction=0.0)
    with pytest.raises(UserError, match="no validation text"):
        evaluate(run, str(bare.directory))


def test_a_run_without_a_checkpoint_cannot_be_evaluated(run):
    shutil.rmtree(run.path / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        evaluate(run)


def test_bits_per_byte_make_tokenizers_comparable(dataset, byte_dataset):
    """Both hold the same text, so its bytes and the size bz2 finds are the same, whatever the tokens."""
    a, b = (open_dataset(each.directory) for each in (dataset, byte_dataset))
    assert a.split("validation").text_bytes == b.split("validation").text_bytes
    baselines_of = [dataset_baselines(each) for each in (a, b)]
    assert baselines_of[0]["bz2 -9"] == baselines_of[1]["bz2 -9"]
    assert (
        baselines_of[0]["unigram"]["bits_per_byte"] < baselines_of[1]["unigram"]["bits_per_byte"]
    )  # longer tokens know more


def test_a_damaged_evaluation_is_made_again(trained, tmp_path):
    import shutil

    from lm.runs.directory import open_run

    run = open_run(shutil.copytree(trained.path, tmp_path / "run"))
    (run.path / "evaluation.json").write_text("garbage")
    assert evaluate(run)["step"] == 100


def test_data_too_short_to_train_on_can_be_evaluated(run, make_dataset, tmp_path):
    (tmp_path / "few").mkdir()
    for name in ("a", "b"):
        (tmp_path / "few" / f"{name}.txt").write_text(f"The {name} owl.")
    few = make_dataset(tmp_path / "few", tmp_path / "few_data", tokenizer=run.path / "tokenizer.json")
    assert few.split("train").tokens <= run.config.data.context_length
    assert evaluate(run, str(few.directory))["validation"]["next_token"]["predicted"] == few.split("validation").tokens


def test_bytes_that_the_tokenizer_loses_are_not_counted(run, dataset, tmp_path):
    """The same tokens as in the other dataset, of a text that had 100 bytes more."""
    data = shutil.copytree(dataset.directory, tmp_path / "lossy")
    manifest = json.loads((data / "manifest.json").read_text())
    validation = manifest["splits"]["validation"]
    validation["text_bytes"] += 100
    validation["lost_bytes"] = 100
    (data / "manifest.json").write_text(json.dumps(manifest))
    lossy, whole = evaluate(run, str(data)), evaluate(run)
    for key in ("validation", "floors", "validation_bytes"):
        assert lossy[key] == whole[key]
    assert lossy["protocol"] == whole["protocol"] + "; 100 more bytes, which the tokenizer loses, are not counted"


@pytest.mark.parametrize(
    ("bits", "sentence"),
    [
        (1.5, "next_token beats unigram and bz2 -9."),
        (2.3, "next_token does not beat bz2 -9: train longer, or on more text."),
        (2.26, "next_token does not beat bz2 -9: train longer, or on more text."),
        (3.0, "next_token does not beat unigram and bz2 -9: train longer, or on more text."),
    ],
)
def test_the_verdict_says_which_baselines_are_beaten(bits, sentence):
    floors = {"unigram": {"bits_per_byte": 2.9}, "bz2 -9": {"bits_per_byte": 2.26}}
    result = {"validation": {"next_token": {"bits_per_byte": bits}}, "floors": floors, "validation_bytes": 500_000}
    assert verdict(result) == sentence
    assert verdict(result | {"floors": {}, "validation_bytes": 1}) == ""
    short = "\nbz2 -9 learns from these 99,000 bytes alone; a longer text helps it."
    assert verdict(result | {"validation_bytes": 99_000}) == sentence + short
