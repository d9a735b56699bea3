"""The model card: its metadata is read by huggingface_hub, its snippet is run, its statements fit the run."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import ModelCard

from data_prep.errors import UserError
from lm.cli.main import main
from lm.export.huggingface import export_huggingface
from lm.export.import_huggingface import import_checkpoint
from lm.export.model_card import NO_FACTS, CardFacts
from lm.finetuning.finetune import finetune
from lm.finetuning.merge import merge
from lm.runs.directory import open_run
from lm.training.reporter import NullReporter
from tests.lm.export.conftest import export, run_of

READOUTS = [("hybrid", "next_token"), ("masked_token", "masked_token"), ("hybrid", "masked_next_token")]


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("chat") / "chat.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"say {n}", "response": f"{n}!"}) + "\n" for n in range(16)))
    return str(path)


@pytest.fixture(scope="module")
def instructed(task_settings, conversations, tmp_path_factory):
    config = task_settings("classification", epochs=1).replace(
        task="instruction", train=conversations, validation=conversations, judged_by="loss", reads="causal"
    )
    return finetune(config, tmp_path_factory.mktemp("instructed") / "run", NullReporter())


def card_of(run, out, readout="next_token", facts=NO_FACTS) -> str:
    export_huggingface(run, out, run.newest(), readout, facts)
    return (out / "README.md").read_text(encoding="utf-8")


def run_snippet(card: str, folder: Path, monkeypatch) -> str:
    """What the Python block of a card prints when it is run in the exported folder."""
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "README.md", "exec"), {})
    return printed.getvalue()


@pytest.mark.parametrize(("objective", "readout"), READOUTS)
def test_the_snippet_runs_in_the_folder(make_run, tmp_path, monkeypatch, objective, readout):
    pytest.importorskip("transformers")
    card = card_of(make_run(objective=objective), tmp_path / "out", readout)
    printed = run_snippet(card, tmp_path / "out", monkeypatch)
    assert printed.strip()
    assert readout == "next_token" or len(eval(printed)) == 5


def test_the_snippet_of_a_model_that_answers_uses_its_chat_template(instructed, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    card = card_of(instructed, tmp_path / "out")
    assert "apply_chat_template" in card
    run_snippet(card, tmp_path / "out", monkeypatch)


def test_the_hub_reads_what_was_stated_and_nothing_else(make_run, tmp_path):
    run = make_run(objective="next_token")
    facts = CardFacts("apache-2.0", ("de", "no"), "Qwen/Qwen3-0.6B", "me/mine")
    data = ModelCard(card_of(run, tmp_path / "a", facts=facts)).data
    assert (data.license, data.language, data.base_model) == ("apache-2.0", ["de", "no"], "Qwen/Qwen3-0.6B")
    assert (data.library_name, data.pipeline_tag, data.tags) == ("transformers", "text-generation", ["kindling"])
    plain = ModelCard(card_of(run, tmp_path / "b")).data.to_dict()
    assert plain.keys() == {"library_name", "pipeline_tag", "tags"}
    assert 'where = "me/mine"' in (tmp_path / "a" / "README.md").read_text()


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"license": "MIT License"}, '"MIT License" is no license identifier'),
        ({"languages": ("de", "German")}, '"German" is no language code'),
        ({"base_model": "/home/me/llama"}, "is no name of a model on the Hugging Face hub"),
    ],
)
def test_a_fact_that_the_hub_would_not_accept_is_refused(facts, words):
    with pytest.raises(UserError, match=words):
        CardFacts(**facts)


def test_the_shifted_readout_is_explained_and_is_no_fill_mask_model(make_run, tmp_path):
    card = card_of(make_run(objective="hybrid"), tmp_path / "out", "masked_next_token")
    assert ModelCard(card).data.pipeline_tag == "feature-extraction"
    assert "take the logits at i-1" in card
    assert "logits[0, mask - 1]" in card


def test_a_pretrained_model_has_its_steps_and_losses(trained, tmp_path):
    card = card_of(trained, tmp_path / "out")
    assert "Pretrained with the objective `hybrid`: 100 steps of 256 tokens" in card
    assert "does not follow instructions" in card


def test_a_fine_tuned_model_has_its_own_steps_and_data(instructed, trained, conversations, tmp_path):
    card = card_of(instructed, tmp_path / "out")
    steps = instructed.newest().step
    assert f"Fine-tuned for the task instruction from the run {trained.path.name} (pretrained with the" in card
    assert f"on chat.jsonl: {steps} steps of 16 examples" in card
    assert re.search(r"Validation at this step: nats per token \d", card)
    assert "100 steps" not in card
    assert "does not follow instructions" not in card
    assert str(Path(conversations).parent) not in card


def test_a_trunk_that_lost_its_task_says_what_it_was(classifier, tmp_path):
    merge(classifier, tmp_path / "plain", classifier.newest(), trunk_only=True)
    card = card_of(open_run(tmp_path / "plain"), tmp_path / "out")
    assert "Fine-tuned for the task classification" in card
    assert "texts are read in both directions" in card
    said = "the task's head was dropped: as a language model it may be worse"
    assert said in card
    done = CliRunner().invoke(main, ["export", str(tmp_path / "plain"), "--to", "hf", "--out", str(tmp_path / "again")])
    assert said in done.stderr


def test_a_task_without_a_head_has_dropped_none(small, dataset, tmp_path):
    config = small.replace(task="contrastive", weights="random", reads="causal", method="full", train="pairs.jsonl")
    card = card_of(run_of(config, dataset.tokenizer, tmp_path / "run"), tmp_path / "out")
    assert "which reads texts from left to right: as a language model it may be worse" in card
    assert "random weights" in card
    assert "head was dropped" not in card


def test_an_imported_model_names_what_it_came_from_and_claims_no_training(make_run, tmp_path):
    out = export(make_run(objective="next_token"), tmp_path / "source", "next_token")
    (out / "chat_template.jinja").unlink()
    import_checkpoint(str(out), tmp_path / "back")
    card = card_of(open_run(tmp_path / "back"), tmp_path / "again")
    assert "Imported from source; Kindling has not trained it further." in card
    assert "steps" not in card
    assert "apply_chat_template" not in card
    (tmp_path / "back" / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert "apply_chat_template" in card_of(open_run(tmp_path / "back"), tmp_path / "with a template")


def test_what_was_made_from_a_model_of_the_hub_names_it_as_its_base(make_run, small, dataset, tmp_path, monkeypatch):
    source = export(make_run(objective="next_token"), tmp_path / "source", "next_token")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(source))
    import_checkpoint("someone/model", tmp_path / "back")
    further = run_of(small.replace(init_from=str(tmp_path / "back")), dataset.tokenizer, tmp_path / "further")
    for run, name in ((open_run(tmp_path / "back"), "a"), (further, "b")):
        assert ModelCard(card_of(run, tmp_path / name)).data.base_model == "someone/model"
    shutil.rmtree(tmp_path / "back")
    assert ModelCard(card_of(further, tmp_path / "c")).data.base_model is None


def test_no_exported_text_names_a_folder_of_this_machine(instructed, trained, tmp_path):
    for run, name in ((instructed, "a"), (trained, "b")):
        export(run, tmp_path / name, "next_token")
        for path in (tmp_path / name).iterdir():
            if path.suffix != ".safetensors":
                assert not re.search(r"/(tmp|home|root)/", path.read_text(encoding="utf-8")), path.name


def test_the_command_names_what_it_leaves_out(trained, tmp_path):
    arguments = ["export", str(trained.path), "--out", str(tmp_path / "x"), "--license", "mit", "--language", "en"]
    done = CliRunner().invoke(main, [*arguments, "--to", "hf", "--readout", "masked_next_token"])
    assert done.exit_code == 0, done.output
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("left out: ")]
    named = line.removeprefix("left out: ").split(", ")
    assert "checkpoints (all but the weights of step 100)" in named
    kept = {"config.toml", "tokenizer.json"}  # as kindling.toml and tokenizer.json
    there = {path.name for path in trained.path.iterdir()}
    assert {name.partition(" ")[0] for name in named} == there - kept - {"evaluation.json"}
    assert "take the logits at i-1" in done.stderr
    assert ModelCard.load(tmp_path / "x" / "README.md").data.language == ["en"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--to", "hf", "--outtype", "f16"], "--outtype is for --to gguf"),
        (["--to", "hf", "--private"], "--private is for --push"),
        (["--to", "hf", "--license", "MIT"], "is no license identifier"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_written(trained, tmp_path, arguments, words):
    done = CliRunner().invoke(main, ["export", str(trained.path), "--out", str(tmp_path / "x"), *arguments])
    assert done.exit_code == 2
    assert words in done.output
    assert not (tmp_path / "x").exists()
