"""What is made from an imported run keeps what the checkpoint says about its texts."""

from __future__ import annotations

import json

import numpy as np
import pytest
import sentencepiece
import torch

from data_prep.errors import UserError
from lm import api
from lm.data.corpora import open_corpora
from lm.data.rows import TrainingRows
from lm.export.import_huggingface import import_checkpoint
from lm.finetuning.merge import merge
from lm.inference.embedding import Reading, all_vectors
from lm.runs.companions import CHAT_TEMPLATE, GENERATION
from lm.runs.directory import open_run
from lm.training.reporter import NullReporter
from tests.conftest import build_dataset, loaded
from tests.lm.export.test_import_tokenizer import HABITS, write_checkpoint

QUIET = {"reporter": NullReporter(), "device": "cpu"}


@pytest.fixture(params=["template", "no-bos", "several-ends"])
def checkpoint_run(request, tmp_path):
    """An imported run, what begins its texts, and what ends its documents."""
    theirs = write_checkpoint(tmp_path / "theirs", request.param, "Llama")
    (theirs / CHAT_TEMPLATE).write_text("{{ bos_token }}{{ messages[0].content }}")
    import_checkpoint(str(theirs), tmp_path / "run")
    return open_run(tmp_path / "run"), HABITS[request.param][5], HABITS[request.param][7]


def kept(run, other) -> None:
    assert other.tokenizer.special == run.tokenizer.special
    assert other.tokenizer.sha256 == run.tokenizer.sha256
    for name in (CHAT_TEMPLATE, GENERATION):
        assert (other.path / name).read_bytes() == (run.path / name).read_bytes()


@pytest.mark.parametrize("packing", ["windows", "documents"])
def test_continued_pretraining_reads_documents_as_generation_does(checkpoint_run, text_folder, tmp_path, packing):
    run, begin, end = checkpoint_run
    data = build_dataset(text_folder, tmp_path / "data", tokenizer=str(run.path))
    assert data.tokenizer.special == run.tokenizer.special
    split = data.split("train")
    stored = split.read(0, split.tokens)
    assert (stored == end).sum() == split.documents
    assert begin is None or not (stored == begin).any()
    settings = {"steps": 1, "objective": "next_token", "context_length": 32, "batch_tokens": 128}
    more = api.train(
        run=tmp_path / "more", init_from=str(run.path), data=str(data.directory), packing=packing, **settings, **QUIET
    )
    kept(run, more)
    text = TrainingRows(open_corpora(more.config.data.data), more.config)
    start, found = end if begin is None else begin, 0
    for rows in map(text.of_step, range(20)):
        used = np.arange(32) < rows.lengths[:, None]
        assert start == end or not (rows.inputs == end)[used].any()
        begun = (rows.inputs == start) & used
        found += int(begun.sum())
        assert rows.starts[begun].all()
        after_an_end = begun[:, 1:] & (rows.targets[:, :-1] == end)
        assert packing == "documents" or np.array_equal(after_an_end, rows.targets[:, :-1] == end)
    assert found
    with pytest.raises(UserError, match="no mask token"):
        api.train(
            run=tmp_path / "masked",
            init_from=str(run.path),
            data=str(data.directory),
            **(settings | {"objective": "hybrid"}),
            **QUIET,
        )


@pytest.mark.parametrize("task", ["instruction", "classification"])
def test_fine_tuning_and_merging_keep_what_a_checkpoint_brought(checkpoint_run, tmp_path, task):
    run = checkpoint_run[0]
    line = {"prompt": "hello", "response": "world"} if task == "instruction" else {"text": "hello", "label": "x"}
    other = line | ({} if task == "instruction" else {"label": "y"})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(each) + "\n" for each in [line, other] * 8))
    api.finetune(
        run, run=tmp_path / "tuned", task=task, train=str(tmp_path / "train.jsonl"), method="lora", epochs=1, **QUIET
    )
    tuned = open_run(tmp_path / "tuned")
    assert tuned.tokenizer.special == run.tokenizer.special
    assert (tuned.path / GENERATION).read_bytes() == (run.path / GENERATION).read_bytes()
    merge(tuned, tmp_path / "merged", tuned.newest(), trunk_only=task == "classification")
    merged = open_run(tmp_path / "merged")
    assert merged.tokenizer.special == run.tokenizer.special
    assert (merged.path / GENERATION).read_bytes() == (run.path / GENERATION).read_bytes()
    assert (merged.path / CHAT_TEMPLATE).read_bytes() == (tuned.path / CHAT_TEMPLATE).read_bytes()


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_vectors_are_the_hidden_states_of_transformers(checkpoint_run, tmp_path, pooling):
    transformers = pytest.importorskip("transformers")
    run, begin, end = checkpoint_run
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "theirs")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "theirs")
    texts = ["hello world", "a", "hé"]
    vectors, cut = all_vectors(loaded(run), [(text,) for text in [*texts, ""]], Reading("causal", pooling))
    assert cut == 0
    for text, vector in zip(texts, vectors, strict=False):
        with torch.no_grad():
            hidden = theirs(torch.tensor([tokenizer(text).input_ids])).last_hidden_state[0]
        wanted = hidden[-1] if pooling == "last" else hidden.mean(0)
        torch.testing.assert_close(torch.from_numpy(vector), wanted, rtol=1e-4, atol=1e-4)
    start = torch.tensor([[end if begin is None else begin]])
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(vectors[3]), theirs(start).last_hidden_state[0, 0], rtol=1e-4, atol=1e-4
        )


def test_a_folder_with_only_a_sentencepiece_model_is_imported(tmp_path):
    """As Llama 2's first releases: a text begins with <s> unless add_bos_token says false."""
    from tests.data_prep.tokenizers.test_sentencepiece import model

    theirs = write_checkpoint(tmp_path / "theirs", "template", "Llama")
    (theirs / "tokenizer.json").unlink()
    (theirs / "tokenizer.model").write_bytes(model("bpe"))
    library = sentencepiece.SentencePieceProcessor(model_proto=model("bpe"))
    config = json.loads((theirs / "config.json").read_text())
    for settings, begin in (({}, library.bos_id()), ({"add_bos_token": False}, None)):
        (theirs / "tokenizer_config.json").write_text(json.dumps(settings))
        out = tmp_path / f"run{begin}"
        import_checkpoint(str(theirs), out)
        tokenizer = open_run(out).tokenizer
        assert tokenizer.begin_id == begin
        assert tokenizer.end_of_text_id == library.eos_id() == config["eos_token_id"]
        assert tokenizer.encode("The cat sat") == library.encode("The cat sat")
