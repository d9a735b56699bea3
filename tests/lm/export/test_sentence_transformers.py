"""Vectors of sentence-transformers against those of ``kindling embed``."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from data_prep.errors import UserError
from lm import api
from lm.cli.main import main
from lm.export.import_huggingface import import_checkpoint
from lm.finetuning.finetune import finetune
from tests.lm.export.conftest import SHAPES

TEXTS = [
    "",
    "a",
    "The old miller found seven apples.",
    "<|endoftext|> sky",
    "日本語 🙂 café \n\n\tx",
    "a long way " * 300,
]


def saved(run, out, **reading):
    """The folder, and our vectors."""
    model = api.load(run)
    model.save_sentence_transformer(out, **reading)
    return model.embed(TEXTS, **reading)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("pooling", ["mean", "last", None])
@pytest.mark.parametrize(
    ("settings", "reads"),
    [
        ({"objective": "hybrid"}, "bidirectional"),
        ({"objective": "hybrid", "logit_softcap": 30.0}, "causal"),
        ({"objective": "next_token", "qk_norm": True}, None),
    ],
)
def test_the_vectors_are_those_of_embed(make_run, tmp_path, settings, reads, pooling, normalize):
    theirs = pytest.importorskip("sentence_transformers")
    run = make_run(**SHAPES[1] | settings)
    ours = saved(run, tmp_path / "out", reads=reads, pooling=pooling, normalize=normalize)
    model = theirs.SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert model.max_seq_length == run.config.data.context_length
    for size in (1, 2, len(TEXTS)):  # shorter texts are padded
        np.testing.assert_allclose(model.encode(TEXTS, batch_size=size), ours, rtol=0, atol=1e-5)
    assert np.linalg.norm(ours - ours.mean(0), axis=1).min() > 0.05


def test_the_layout_names_the_pooling(make_run, tmp_path):
    """What sentence-transformers reads, checked without the package."""
    run = make_run(objective="masked_token")
    result = CliRunner().invoke(
        main,
        ["export", str(run.path), "--to", "sentence-transformers", "--out", str(tmp_path / "out"), "--normalize"],
        catch_exceptions=False,
    )
    assert result.exit_code == 0
    assert f'SentenceTransformer("{tmp_path / "out"}")' in result.stderr
    modules = json.loads((tmp_path / "out" / "modules.json").read_text())
    assert [each["type"].rpartition(".")[2] for each in modules] == ["Transformer", "Pooling", "Normalize"]
    assert all((tmp_path / "out" / each["path"]).is_dir() for each in modules)
    pooling = json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text())
    assert [name for name, chosen in pooling.items() if chosen is True] == [
        "pooling_mode_mean_tokens",
        "include_prompt",
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: sentence-transformers" in card
    assert "scaled to length 1" in card
    assert "not trained to embed sentences" in card


def test_a_contrastive_run_is_exported_as_it_reads(task_settings, task_files, recorder, tmp_path):
    train, _ = task_files["classification"]
    settings = task_settings("classification", epochs=0.2).replace(
        task="contrastive", train=train, validation="", pooling="mean", reads="bidirectional", dropout=0.1,
        judged_by="auto", method="lora",
    )  # fmt: skip
    run = finetune(settings, tmp_path / "run", recorder)
    ours = saved(run.path, tmp_path / "out")
    assert "Fine-tuned for the task contrastive" in (tmp_path / "out" / "README.md").read_text()
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"objective": "masked_token", "qk_norm": True}, "to be read bidirectional: .* qk_norm"),
        ({"objective": "next_token", "activation": "relu2"}, "only swiglu can be exported"),
    ],
)
def test_what_no_class_reads_is_refused(make_run, tmp_path, settings, words):
    with pytest.raises(UserError, match=words):
        saved(make_run(**settings), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_run_with_a_head_embeds_nothing(classifier, tmp_path):
    arguments = ["export", str(classifier.path), "--to", "sentence-transformers", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "no longer a language model" in result.stderr


def test_an_exported_fine_tuning_is_imported_as_a_plain_run(task_settings, task_files, recorder, tmp_path):
    settings = task_settings("classification", epochs=0.2, dropout=0.1, method="lora").replace(
        task="contrastive", train=task_files["classification"][0], validation="", judged_by="auto"
    )
    run = finetune(settings, tmp_path / "run", recorder)
    (run.path / "chat_template.jinja").write_text("{{ messages }}")
    ours = saved(run.path, tmp_path / "out")
    arguments = ["export", str(run.path), "--to", "sentence-transformers", "--out", str(tmp_path / "again")]
    left_out = CliRunner().invoke(main, arguments).stderr.splitlines()[0]
    assert "chat_template.jinja" in left_out
    import_checkpoint(str(tmp_path / "out"), tmp_path / "back")
    back = api.load(tmp_path / "back")
    assert not back.config.is_finetuning
    np.testing.assert_array_equal(back.embed(TEXTS), ours)
