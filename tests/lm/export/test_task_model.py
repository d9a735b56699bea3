"""Fine-tuned models in transformers' own classes and pipelines, against ``kindling predict``."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import ModelCard

from data_prep.errors import UserError
from lm import api
from lm.cli.main import main
from lm.export.import_huggingface import import_checkpoint
from lm.export.stock_architectures import STOCK_CLASSES
from lm.export.task_model import TaskHead, head_weights
from lm.finetuning.answers import Answers
from lm.finetuning.finetune import finetune, settle_reading
from lm.finetuning.head_task import HEADS, task_model
from lm.model.transformer import Transformer
from lm.runs import checkpoint
from lm.runs.base_weights import BASE
from lm.runs.checkpoint_writer import snapshot, trained_tensors
from lm.runs.directory import open_run, plain_settings
from tests.lm.export.conftest import SHAPES, disturbed
from tests.lm.export.test_model_card import run_snippet

transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    "a",
    "The old miller found seven apples.",
    "The café — naïve 12345 \n\n\tx",
    "<|endoftext|> sky",
    "日本語 🙂 " * 9,
]
# A pipeline takes an empty second text for none, so there is none here.
PAIRS = [(first, second) for first in TEXTS[:4] for second in (TEXTS[2], "sky " * 40, "x")]
LONG = "One word after another, until no more of them is read. " * 8


@pytest.fixture
def make_task(small, dataset, tmp_path):
    """A fine-tuned run with random weights, opened for prediction: (answers, **settings)."""

    def made(answers: Answers, **changes) -> api.TaskModel:
        tokenizer, path = dataset.tokenizer, tmp_path / "run"
        usual = {"vocab_size": tokenizer.vocab_size, "context_length": 48, "batch_tokens": 48, "head_bias": "auto"}
        config = settle_reading(small.replace(**usual | SHAPES[2] | changes))
        trunk = Transformer(config.model).initialize(1)
        model = disturbed(task_model(config, trunk, answers))
        path.mkdir()
        tokenizer.save(path / "tokenizer.json")
        config.save(path / "config.toml")
        (path / "metrics.jsonl").touch()
        answers.save(path)
        checkpoint.save_tensors(snapshot(trunk.state_dict()), path / BASE)
        state = {"tokenizer_sha256": tokenizer.sha256, "config": plain_settings(config)}
        checkpoint.save(path / "checkpoints", 7, snapshot(trained_tensors(model)), {}, state, best_step=7)
        return api.load(path)

    return made


def labels(count: int) -> tuple[str, ...]:
    return tuple(f"class {number}" for number in range(count))


READINGS = [
    pytest.param({"reads": "bidirectional", "objective": "hybrid"}, "EuroBert", id="bidirectional"),
    pytest.param({"reads": "causal"}, "Llama", id="causal"),
    pytest.param({"reads": "auto", "objective": "next_token", "qk_norm": True}, "Qwen3", id="qk_norm"),
]


@pytest.mark.parametrize("classes", [2, 5, 40])
@pytest.mark.parametrize(("reading", "family"), READINGS)
def test_a_pipeline_gives_the_probabilities_of_predict(make_task, tmp_path, reading, family, classes):
    ours = make_task(HEADS["classification"](labels(classes), 1), task="classification", **reading)
    ours.save_pretrained(tmp_path / "out")
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    assert type(classify.model).__name__ == f"{family}ForSequenceClassification"
    texts = [*TEXTS, LONG]
    for size in (1, len(texts)):  # in a batch, shorter texts are padded
        theirs = classify(texts, truncation=True, batch_size=size)
        for answer, scores in zip(ours.predict(texts), theirs, strict=True):
            assert scores[0]["label"] == answer["label"]
            assert {s["label"]: s["score"] for s in scores} == pytest.approx(answer["probabilities"], abs=1e-5)
            assert max(answer["probabilities"].values()) < 0.999  # else any logits would do


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_a_hidden_layer_becomes_the_dense_layer_of_the_class(make_task, tmp_path, kind, width):
    numbers = {"mean": 3.0, "deviation": 2.0} if kind == "regression" else {}
    answers = HEADS[kind](labels(0 if numbers else 3), 2, **numbers)
    ours = make_task(answers, task=kind, pairs="together", reads="bidirectional", head_hidden=width)
    ours.save_pretrained(tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    for first, second in PAIRS:
        logits = model(**tokenizer(first, second, return_tensors="pt", truncation=True)).logits[0]
        (answer,) = ours.predict([(first, second)])
        if kind == "regression":
            assert logits.item() == pytest.approx(answer["value"], rel=1e-5, abs=1e-4)
        else:
            assert logits.softmax(0).tolist() == pytest.approx([*answer["probabilities"].values()], abs=1e-5)


@pytest.mark.parametrize(("reading", "family"), READINGS)
def test_pairs_that_are_read_together_are_cut_and_classified_alike(make_task, tmp_path, reading, family):
    answers = HEADS["classification"](labels(3), 2)
    ours = make_task(answers, task="classification", pairs="together", **reading)
    ours.save_pretrained(tmp_path / "out")
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    pairs = [*PAIRS, (LONG, LONG), ("a b c", LONG), (LONG, "a b c"), (LONG, LONG + "x")]
    theirs = classify([{"text": a, "text_pair": b} for a, b in pairs], truncation=True)
    for answer, scores in zip(ours.predict(pairs), theirs, strict=True):
        assert {s["label"]: s["score"] for s in scores} == pytest.approx(answer["probabilities"], abs=1e-5)


@pytest.mark.parametrize(("reading", "family"), READINGS)
def test_a_regression_gives_its_values(make_task, tmp_path, reading, family):
    answers = HEADS["regression"]((), 1, mean=30.0, deviation=12.5)
    answers = answers if family == "EuroBert" else answers.uncentered()
    bias = {} if family == "EuroBert" else {"head_bias": "false"}
    ours = make_task(answers, task="regression", **bias, **reading)
    ours.save_pretrained(tmp_path / "out")
    estimate = transformers.pipeline("text-classification", str(tmp_path / "out"))
    values = [answer["value"] for answer in ours.predict(TEXTS)]
    assert [each["score"] for each in estimate(TEXTS, truncation=True)] == pytest.approx(values, rel=1e-5, abs=1e-4)
    assert max(values) - min(values) > 1


@pytest.mark.parametrize(("reading", "family"), READINGS)
def test_words_get_their_labels(make_task, tmp_path, reading, family):
    ours = make_task(HEADS["tokens"](labels(4)), task="tokens", **reading)
    ours.save_pretrained(tmp_path / "out")
    tag = transformers.pipeline(
        "token-classification", str(tmp_path / "out"), aggregation_strategy="first", ignore_labels=[]
    )
    assert type(tag.model).__name__ == f"{family}ForTokenClassification"
    for words in (["sky"], ["The", "old", "miller", "found", "her", "brother's", "café", "again"]):
        (answer,) = ours.predict([words])
        tokens = tag.tokenizer(" ".join(words), return_tensors="pt")
        found = tag.model(**tokens).logits[0].softmax(-1)
        firsts = [1 + len(ours.tokenizer.encode(" ".join(words[:n]))) for n in range(len(words))]
        assert found[firsts].max(-1).values.tolist() == pytest.approx(answer["probabilities"], abs=1e-5)
        theirs = [(w, each["entity_group"]) for each in tag(" ".join(words)) for w in each["word"].split()]
        assert theirs == list(zip(words, answer["labels"], strict=True))


@pytest.mark.parametrize(("reading", "family"), READINGS)
def test_choices_get_their_probabilities(make_task, tmp_path, reading, family):
    ours = make_task(HEADS["choice"](), task="choice", **reading)
    ours.save_pretrained(tmp_path / "out")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    choices = ["the sky", "", "an owl and a horse"]
    inputs = tokenizer(["which one?"] * 3, choices, padding=True, truncation=True, return_tensors="pt")
    found = model(**inputs).logits[:, 0].softmax(0).tolist()
    (answer,) = ours.predict([("which one?", *choices)])
    assert found == pytest.approx(answer["probabilities"], abs=1e-5)
    assert max(found) - min(found) > 1e-3


@pytest.mark.parametrize(
    ("kind", "texts", "changes", "words"),
    [
        ("classification", 2, {}, "--pairs together"),
        ("classification", 1, {"reads": "causal", "pooling": "mean"}, "--pooling last"),
        ("classification", 1, {"reads": "bidirectional", "pooling": "last"}, "--pooling mean"),
        ("classification", 1, {"reads": "causal", "head_bias": "true"}, "--head-bias false"),
        ("regression", 1, {"reads": "causal"}, "--head-bias false"),
        ("classification", 1, {"reads": "causal", "head_hidden": 8}, "--head-hidden 0"),
        ("classification", 1, {"reads": "bidirectional", "head_hidden": 80}, "--head-hidden 64, or less"),
        ("tokens", 0, {"head_hidden": 8}, "--head-hidden 0"),
        ("tokens", 0, {"qk_norm": True}, "--reads causal"),
        ("tokens", 0, {"activation": "relu2"}, "only swiglu can be exported"),
    ],
)
def test_what_no_class_computes_is_refused_with_the_setting_that_helps(
    make_task, tmp_path, kind, texts, changes, words
):
    names = () if kind == "regression" else labels(3)
    ours = make_task(HEADS[kind](names, texts), task=kind, **changes)
    with pytest.raises(UserError, match=f"cannot be exported: no model class of transformers.*{words}"):
        ours.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("outputs", [1, 16, 17, 32, 100])
def test_a_dense_layer_with_gelu_computes_a_linear_head(outputs):
    draw = torch.Generator().manual_seed(outputs)
    weight, bias, norm = (torch.randn(*size, generator=draw) for size in ((outputs, 32), (outputs,), (32,)))
    (stock,) = [each for each in STOCK_CLASSES if each.model_type == "eurobert"]
    found = head_weights(TaskHead(weight, bias, labels(outputs), 1, apart=False), norm, stock, tags=False)
    vectors = torch.nn.functional.rms_norm(torch.randn(200, 32, generator=draw) * 9, (32,), norm)
    inner = torch.nn.functional.gelu(vectors @ found["dense.weight"].T + found["dense.bias"])
    logits = inner @ found["classifier.weight"].T + found["classifier.bias"]
    exact = (vectors.double() @ weight.double().T + bias).float()
    torch.testing.assert_close(logits, exact, rtol=0, atol=1e-5 if 2 * outputs <= 32 else 1e-4)


def test_the_folder_names_labels_and_is_read_by_others(make_task, tmp_path):
    ours = make_task(HEADS["classification"](("good", "bad"), 1), task="classification", train="/home/me/films.jsonl")
    ours.save_pretrained(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["id2label"], config["label2id"]) == ({"0": "good", "1": "bad"}, {"good": 0, "bad": 1})
    assert "auto_map" not in config
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_mode & 0o777 == (tmp_path / "run" / "config.toml").stat().st_mode & 0o777
        assert "/home/me" not in path.read_bytes().decode("utf-8", "replace")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Fine-tuned for the task classification" in card
    assert "on films.jsonl: 7 steps" in card


@pytest.mark.parametrize(
    ("kind", "texts"), [("classification", 1), ("classification", 2), ("regression", 1), ("tokens", 0), ("choice", 0)]
)
def test_the_command_names_the_pipeline_and_the_card_runs(make_task, tmp_path, monkeypatch, kind, texts):
    names = labels(3) if kind in ("classification", "tokens") else ()
    make_task(HEADS[kind](names, texts), task=kind, pairs="together")
    arguments = ["export", str(tmp_path / "run"), "--to", "hf", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    pipeline = "token-classification" if kind == "tokens" else "text-classification"
    assert f'transformers.pipeline("{pipeline}", "{tmp_path / "out"}")' in result.stderr
    card = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(card).data.pipeline_tag == pipeline
    assert run_snippet(card, tmp_path / "out", monkeypatch).strip()
    notes: list[str] = []
    import_checkpoint(str(tmp_path / "out"), tmp_path / "back", note=notes.append)
    assert any("are left out" in note for note in notes)
    assert not open_run(tmp_path / "back").config.is_finetuning


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--to", "gguf"], "no longer a language model"),
        (["--to", "hf", "--readout", "next_token"], "--readout is for language models"),
        (["--to", "hf", "--normalize"], "--normalize are for --to sentence-transformers"),
    ],
)
def test_options_of_other_exports_are_refused(make_task, tmp_path, options, words):
    make_task(HEADS["classification"](labels(2), 1), task="classification")
    arguments = ["export", str(tmp_path / "run"), *options, "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert (result.exit_code, words in result.stderr) == (2, True)
    assert not (tmp_path / "out").exists()


def test_a_run_made_before_keeps_its_head(task_settings, recorder, tmp_path):
    settings = task_settings("classification", epochs=0.2, reads="causal")
    new = finetune(settings, tmp_path / "new", recorder)
    assert new.config.finetune.head_bias == "false"
    assert "head.bias" not in new.newest().model()
    old = finetune(settings.replace(head_bias="true"), tmp_path / "old", recorder)
    toml = tmp_path / "old" / "config.toml"
    toml.write_text("".join(line for line in toml.read_text().splitlines(True) if "head_bias" not in line))
    again = finetune(settings, tmp_path / "old", recorder)  # the same command as before
    assert open_run(old.path).config.finetune.head_bias == again.config.finetune.head_bias == "true"
    assert "head.bias" in again.newest().model()
