from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.inference.embedding import Reading, all_vectors, reading_of, vectors_of, write_vectors
from lm.inference.language_model import LanguageModel
from tests.conftest import loaded
from tests.lm.inference.test_generator import restless_model

CPU = torch.device("cpu")
TEXTS = [
    ("The old miller found a silver key.",),
    ("An owl.",),
    ("",),
    ("Nobody sold the winter coat before the rain came.", "The captain lost an owl."),
    ("word " * 60,),
]


@pytest.fixture(scope="module")
def model(dataset) -> LanguageModel:
    return restless_model(dataset.tokenizer)


@pytest.mark.parametrize("reads", ["causal", "bidirectional"])
@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_text_has_the_same_vector_alone_and_among_others(model, reads, pooling):
    reading = Reading(reads, pooling)
    many, cut = all_vectors(model, TEXTS * 9, reading)
    assert cut == 9  # the last of each five
    for number, text in enumerate(TEXTS):
        alone, _ = all_vectors(model, [text], reading)
        assert np.abs(many[number::5] - alone).max() < 1e-5


def test_vectors_are_the_hidden_states_that_the_model_has_of_the_text(model):
    tokens = torch.tensor([[model.tokenizer.end_of_text_id, *model.tokenizer.encode(TEXTS[0][0])]])
    length = tokens.shape[1]
    hi = torch.arange(1, length + 1, dtype=torch.int32)[None]
    with torch.no_grad():
        hidden = model.model(tokens, hi - 1, torch.zeros_like(hi), hi)[0]
        embedding = model.model.embedding(tokens)[0]
    found = {layer: all_vectors(model, TEXTS[:1], Reading("causal", "mean", layer))[0][0] for layer in (-1, 0, 1, 2)}
    assert np.abs(found[-1] - hidden.mean(0).numpy()).max() < 1e-5
    assert (found[2] == found[-1]).all()
    assert np.abs(found[0] - embedding.mean(0).numpy()).max() < 1e-6
    assert np.abs(found[1] - found[2]).max() > 1e-3
    with pytest.raises(UserError, match=r"no layer 3: the model has 0 \(the embeddings\) to 2"):
        reading_of(model.config, layer=3)


def test_normalized_vectors_have_length_one(model):
    vectors, _ = all_vectors(model, TEXTS, Reading("causal", "last", normalize=True))
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() < 1e-6


def test_texts_are_taken_a_block_at_a_time(model, monkeypatch):
    monkeypatch.setattr("lm.inference.embedding.TEXTS_AT_ONCE", 4)
    taken = []

    def texts():
        for number in range(10):
            taken.append(number)
            yield (f"owl {number}",)

    parts = vectors_of(model, texts(), Reading("causal", "last"))
    assert next(parts)[0].shape == (4, 32)
    assert len(taken) == 4
    assert [len(vectors) for vectors, _ in parts] == [4, 2]


@pytest.mark.parametrize("count", [0, 3, 12_345])
def test_an_npy_file_is_written_without_knowing_how_many_come(tmp_path, count):
    vectors = np.arange(count * 4, dtype=np.float32).reshape(count, 4)
    assert write_vectors(tmp_path / "a.npy", iter(np.array_split(vectors, 3)), 4) == count
    found = np.lib.format.open_memmap(tmp_path / "a.npy", mode="r")
    assert found.dtype == np.float32
    assert (found == vectors).all()
    assert found.shape == vectors.shape


def test_json_lines_hold_the_same_float32(tmp_path):
    vectors = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    write_vectors(tmp_path / "a.jsonl", iter([vectors]), 3)
    lines = [json.loads(line)["embedding"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert (np.array(lines, dtype=np.float32) == vectors).all()
    assert max(map(len, (tmp_path / "a.jsonl").read_text().splitlines())) < 60
    with pytest.raises(UserError, match=r"\.jsonl or \.npy"):
        write_vectors(tmp_path / "a.csv", iter([vectors]), 3)


def test_the_command_embeds_a_file_and_says_how(trained, tmp_path):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for (text,) in TEXTS[:3]) * 2)
    arguments = ["embed", str(trained.path), "--input", str(tmp_path / "texts.jsonl"), "--device", "cpu"]
    told = CliRunner().invoke(main, [*arguments, "--output", str(tmp_path / "a.npy"), "--layer", "1", "--normalize"])
    assert told.exit_code == 0, told.output
    assert "6 texts, 32 numbers each: read bidirectional, mean of layer 1\n" in told.stderr
    wanted, _ = all_vectors(loaded(trained), TEXTS[:3] * 2, Reading("bidirectional", "mean", 1, normalize=True))
    assert (np.lib.format.open_memmap(tmp_path / "a.npy", mode="r") == wanted).all()
    told = CliRunner().invoke(main, [*arguments, "--output", "-", "--reads", "causal"])
    assert [len(json.loads(line)["embedding"]) for line in told.stdout.splitlines()] == [32] * 6
    assert "read causal, last of layer 2" in told.stderr
