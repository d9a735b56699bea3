"""Adapters loaded by PEFT on the exported base, against our own outputs."""

from __future__ import annotations

import json

import pytest
import torch

from data_prep.errors import UserError
from lm import api
from lm.export.huggingface import left_out
from lm.export.model_card import CardFacts
from lm.finetuning.finetune import finetune
from lm.training.reporter import NullReporter
from tests.lm.export.conftest import our_logits
from tests.lm.export.test_model_card import run_snippet

transformers = pytest.importorskip("transformers")

TEXTS = ["a", "The old miller found seven apples.", "the sky again in the morning", "naïve 12345 \n\n\tx"]


@pytest.fixture(scope="module")
def adapted(task_settings, task_files, tmp_path_factory):
    """A fine-tuning with LoRA: (kind, **settings) → its run."""
    folder = tmp_path_factory.mktemp("adapted")
    talk = folder / "talk.jsonl"
    talk.write_text("".join(json.dumps({"prompt": f"say {n}", "response": f"{n}!"}) + "\n" for n in range(16)))

    def made(kind: str, **changes):
        usual = {"method": "lora", "epochs": 1, "learning_rate": 0.03}
        if kind in ("instruction", "contrastive"):
            train = str(talk) if kind == "instruction" else task_files["classification"][0]
            settings = task_settings("classification", **usual).replace(task=kind, train=train, validation="")
            settings = settings.replace(judged_by="auto", **({"dropout": 0.1} if kind == "contrastive" else {}))
        else:
            settings = task_settings(kind, **usual)
        number = len(list(folder.iterdir()))
        return finetune(settings.replace(**changes), folder / f"run{number}", NullReporter())

    return made


def with_adapter(run, out, auto: str):
    """The base of transformers with the adapter loaded by PEFT, its tokenizer, and the base alone."""
    peft = pytest.importorskip("peft")
    api.load(run.path).save_adapter(out)
    base = getattr(transformers, auto).from_pretrained(out / "base")
    alone = getattr(transformers, auto).from_pretrained(out / "base")
    model = peft.PeftModel.from_pretrained(base, out).eval()
    return model, transformers.AutoTokenizer.from_pretrained(out / "base"), alone.eval()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_rank": 40, "lora_alpha": 5.0},  # more than the smaller side of some matrices
        {"lora_matrices": ("query", "down")},
    ],
)
def test_the_logits_of_a_language_model(adapted, tmp_path, monkeypatch, changes):
    run = adapted("instruction", **changes)
    model, _, alone = with_adapter(run, tmp_path / "out", "AutoModelForCausalLM")
    ids = torch.randint(0, run.config.model.vocab_size, (3, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs, before = model(ids).logits, alone(ids).logits
    ours = our_logits(run, ids, bidirectional=False)
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
    assert (before - ours).abs().max() > 1e-3
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (settings["task_type"], settings["base_model_name_or_path"]) == ("CAUSAL_LM", str(tmp_path / "out" / "base"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: peft" in card
    run_snippet(card, tmp_path / "out", monkeypatch)


@pytest.mark.parametrize("reads", ["bidirectional", "causal"])
def test_the_probabilities_of_a_classifier(adapted, tmp_path, reads):
    run = adapted("classification", reads=reads, pooling="auto")
    model, tokenizer, _ = with_adapter(run, tmp_path / "out", "AutoModelForSequenceClassification")
    with torch.no_grad():
        found = model(**tokenizer(TEXTS, padding=True, return_tensors="pt")).logits.softmax(-1)
    ours = api.load(run.path).predict(TEXTS)
    for answer, row in zip(ours, found.tolist(), strict=True):
        labels = model.base_model.model.config.id2label
        assert {labels[n]: value for n, value in enumerate(row)} == pytest.approx(answer["probabilities"], abs=1e-5)


def test_the_labels_of_words(adapted, tmp_path):
    run = adapted("tokens")
    model, tokenizer, _ = with_adapter(run, tmp_path / "out", "AutoModelForTokenClassification")
    (answer,) = api.load(run.path).predict([["sky"]])
    with torch.no_grad():
        found = model(**tokenizer("sky", return_tensors="pt")).logits[0, 1].softmax(-1)
    assert float(found.max()) == pytest.approx(answer["probabilities"][0], abs=1e-5)


def test_the_states_of_sentence_vectors(adapted, tmp_path):
    run = adapted("contrastive")
    (run.path / "chat_template.jinja").write_text("{{ messages }}")
    model, tokenizer, _ = with_adapter(run, tmp_path / "out", "AutoModel")
    with torch.no_grad():
        states = model(**tokenizer(TEXTS[1], return_tensors="pt")).last_hidden_state[0]
    ours = api.load(run.path).embed(TEXTS[1])
    torch.testing.assert_close(states.mean(0), torch.from_numpy(ours), rtol=0, atol=1e-5)
    missing = left_out(run, run.newest(), tmp_path / "out")
    assert "chat_template.jinja" in missing  # for vectors, it has no use
    assert not {"config.toml", "tokenizer.json", "base.safetensors"}.intersection(missing)


def test_a_run_without_lora_has_no_adapter(classifier, trained, tmp_path):
    for run in (classifier, trained):
        with pytest.raises(UserError, match="has no LoRA adapter: fine-tune with --method lora"):
            api.load(run.path).save_adapter(tmp_path / "out")


@pytest.mark.parametrize(
    ("facts", "base"), [({"name": "me/it"}, "base"), ({"name": "me/it", "base_model": "me/b"}, "me/b")]
)
def test_an_upload_names_no_local_path(adapted, tmp_path, facts, base):
    api.load(adapted("instruction").path).save_adapter(tmp_path / "out", facts=CardFacts(**facts))
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == base
    assert not any(
        str(tmp_path) in path.read_text() for path in (tmp_path / "out").rglob("*") if path.suffix in (".json", ".md")
    )
