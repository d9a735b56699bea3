"""What a fine-tuned run answers: the same in every process, in every batch, with LoRA merged or not."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.finetuning.finetune import Finetuning, finetune
from lm.finetuning.head_task import batches_of, encoder_of, outputs_of, task_model
from lm.finetuning.predict import open_predictor, predict, read_inputs
from lm.model.lora import merge_lora
from lm.runs.base_weights import starting_trunk
from lm.runs.checkpoint_writer import load_trained

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


def kindling(*arguments, **more):
    return CliRunner().invoke(main, [str(argument) for argument in arguments], **more)


def _as_written(answer):
    chances = {label: float(f"{chance:.6g}") for label, chance in answer["probabilities"].items()}
    return {"label": answer["label"], "probabilities": chances}


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_saved_model_answers_in_another_process_bit_for_bit(method, task_settings, task_files, recorder, tmp_path):
    done = finetune(task_settings("classification", method=method, epochs=1), tmp_path / "run", recorder)
    validation = task_files["classification"][1]
    predictor = open_predictor(done.path, CPU)
    ours = [answer for answer, _ in predict(predictor, read_inputs(predictor, validation))]
    program = "import sys; from lm.cli.main import main; import torch; torch.set_num_threads(1); main()"
    command = [sys.executable, "-c", program, "predict", str(done.path), "--input", validation, "--device", "cpu"]
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert [json.loads(line) for line in told.splitlines()] == [_as_written(answer) for answer in ours]


def test_a_merged_adapter_answers_as_the_adapter_does_bit_for_bit(task_settings, task_files, recorder, tmp_path):
    done = finetune(task_settings("classification", method="lora", epochs=1), tmp_path / "run", recorder)
    merged = open_predictor(done.path, CPU)
    config, saved = done.config, done.checkpoint("best")
    apart = task_model(config, starting_trunk(config, done.path), merged.answers)
    plain = apart.trunk.blocks[0].attention.query.weight.clone()
    load_trained(apart, saved.model())
    assert not torch.equal(apart.trunk.blocks[0].attention.query.weight, plain)  # the adapter does something
    encoded = encoder_of(config, merged.tokenizer).encode(list(read_inputs(merged, task_files["classification"][1])))
    batches = list(batches_of(encoded, config, merged.tokenizer))
    ours = list(outputs_of(merged.model, batches, config))
    for a, b in zip(outputs_of(apart, batches, config), ours, strict=True):
        assert torch.equal(a, b)
    merge_lora(apart.trunk)
    assert apart.trunk.state_dict().keys() == merged.model.trunk.state_dict().keys()
    assert not any("parametrizations" in name for name in apart.state_dict())


@pytest.mark.parametrize("reads", ["bidirectional", "causal"])
def test_a_batch_of_mixed_lengths_answers_what_each_text_does_alone(reads, task_settings, recorder, tmp_path):
    done = finetune(task_settings("classification", reads=reads, epochs=1), tmp_path / "run", recorder)
    predictor = open_predictor(done.path, CPU)
    path = tmp_path / "mixed.txt"
    path.write_text("".join(" ".join(["the old captain found"] * n) + " owl\n" for n in (1, 4, 0, 2, 7, 1, 3)))
    examples = list(read_inputs(predictor, path))
    together = [answer["probabilities"] for answer, _ in predict(predictor, examples)]
    alone = [answer["probabilities"] for example in examples for answer, _ in predict(predictor, [example])]
    for a, b in zip(together, alone, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    assert len({tuple(chances.values()) for chances in together}) > 3


def test_the_best_checkpoint_answers_and_not_the_newest(task_settings, recorder, tmp_path, monkeypatch):
    validate, worse = Finetuning.validate, itertools.count()
    monkeypatch.setattr(Finetuning, "validate", lambda self, model: (validate(self, model)[0], float(next(worse))))
    done = finetune(task_settings("classification", epochs=2), tmp_path / "run", recorder)
    assert done.step < done.newest().step
    answering = open_predictor(done.path, CPU).model.head.weight
    assert torch.equal(answering, done.checkpoint("best").model()["head.weight"])
    assert not torch.equal(answering, done.newest().model()["head.weight"])


def test_what_is_answered_agrees_with_what_was_validated(classifier, task_files):
    validation = task_files["classification"][1]
    predictor = open_predictor(classifier.path, CPU)
    rows = [json.loads(line) for line in Path(validation).read_text().splitlines()]
    found = [answer for answer, _ in predict(predictor, read_inputs(predictor, validation))]
    right = [answer["label"] == row["label"] for answer, row in zip(found, rows, strict=True)]
    assert sum(right) / len(right) == classifier.scores["accuracy"]
    for answer in found:
        assert sum(answer["probabilities"].values()) == pytest.approx(1)
        assert answer["label"] == max(answer["probabilities"], key=answer["probabilities"].get)


@pytest.mark.parametrize(
    ("kind", "key"), [("regression", "value"), ("tokens", "labels"), ("choice", "choice"), ("pair", "label")]
)
def test_every_kind_of_task_has_its_answers(kind, key, task_settings, task_files, recorder, tmp_path):
    done = finetune(task_settings(kind), tmp_path / "run", recorder)
    rows = [json.loads(line) for line in Path(task_files[kind][1]).read_text().splitlines()]
    result = kindling("predict", done.path, "--input", task_files[kind][1], "--device", "cpu")
    assert result.exit_code == 0, result.output
    found = [json.loads(line)[key] for line in result.stdout.splitlines()]
    if kind == "regression":
        assert sum(abs(value - row["label"]) < 0.8 for value, row in zip(found, rows, strict=True)) > 55
    elif kind == "tokens":
        assert [len(labels) for labels in found] == [len(row["words"]) for row in rows]
        assert sum(labels == row["tags"] for labels, row in zip(found, rows, strict=True)) > 50
    elif kind == "choice":
        assert sum(choice == row["label"] for choice, row in zip(found, rows, strict=True)) > 60
    else:
        assert set(found) <= {"0", "1"}


def test_a_table_has_a_column_for_each_probability(classifier, task_files, tmp_path):
    arguments = ["--input", task_files["classification"][1], "--output"]
    result = kindling("predict", classifier.path, *arguments, tmp_path / "out.csv")
    assert (result.exit_code, result.stderr) == (0, "64 answers\n")
    with (tmp_path / "out.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["label", "probability animal", "probability place"]
    assert len(rows) == 64
    refused = kindling("predict", classifier.path, *arguments, tmp_path / "out.xlsx")
    assert "name a file that ends in .jsonl or .csv or .tsv" in refused.stderr
    assert not (tmp_path / "out.xlsx").exists()


def test_an_answer_repeats_its_text_if_asked_and_has_six_digits(classifier, tmp_path):
    texts = ["the old fox", *(f"fox number {n}" for n in range(300))]
    (tmp_path / "in.txt").write_text("".join(f"{text}\n" for text in texts))
    result = kindling("predict", classifier.path, "--input", tmp_path / "in.txt", "--with-text")
    answers = [json.loads(line) for line in result.stdout.splitlines()]
    assert [answer.pop("text") for answer in answers] == texts
    for answer in answers:
        assert list(answer["probabilities"]) == sorted(answer["probabilities"])
        assert sum(answer["probabilities"].values()) == pytest.approx(1, abs=2e-6)
        assert all(float(f"{chance:.6g}") == chance for chance in answer["probabilities"].values())


def test_answers_come_while_texts_come(classifier):
    """Endless input: not more is read than is needed."""
    predictor = open_predictor(classifier.path, CPU)
    example = next(iter(read_inputs(predictor, classifier.config.finetune.validation)))
    read = []
    endless = (read.append(n) or example for n in itertools.count())
    found = list(itertools.islice(predict(predictor, endless), 300))
    assert len(found) == 300
    assert len(read) == 512


def test_texts_come_from_standard_input_too(classifier):
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("the old fox", "", "behind the barn"))
    result = kindling("predict", classifier.path, "--input", "-", input=lines)
    assert result.exit_code == 0, result.output
    found = [json.loads(line)["label"] for line in result.stdout.splitlines()]
    assert (found[0], found[2]) == ("animal", "place")


def test_a_text_longer_than_the_context_is_cut_or_read_in_windows_and_counted(
    task_settings, write_rows, recorder, tmp_path
):
    rows = [{"text": " ".join(["the old captain"] * 40) + " owl"}, {"text": "the owl"}]
    path = write_rows(tmp_path / "long.jsonl", rows)
    answers = {}
    for way in ("truncate", "window"):
        done = finetune(task_settings("classification", long_texts=way, epochs=1), tmp_path / way, recorder)
        result = kindling("predict", done.path, "--input", path)
        words = {
            "truncate": "2 answers; 1 were truncated to 32 tokens",
            "window": "2 answers; 1 were split into windows of 32",
        }
        assert words[way] in result.stderr
        answers[way] = [json.loads(line)["probabilities"] for line in result.stdout.splitlines()]
    assert answers["truncate"][0] != answers["window"][0]
    assert answers["truncate"][1] == answers["window"][1]  # the training is the same: no training text is long


def test_pairs_and_single_texts_are_not_taken_for_each_other(classifier, task_files, write_rows, tmp_path):
    path = write_rows(tmp_path / "pairs.jsonl", [{"text": "a", "text_pair": "b"}])
    predictor = open_predictor(classifier.path, CPU)
    with pytest.raises(
        UserError, match=r"pairs\.jsonl, line 1: .* was fine-tuned on single texts, but these are pairs"
    ):
        list(read_inputs(predictor, path))


def test_weights_of_another_model_are_refused(classifier, tmp_path):
    path = shutil.copytree(classifier.path, tmp_path / "run")
    (path / "answers.json").write_text('{"labels": ["a", "b", "c"], "texts": 1, "mean": 0, "deviation": 1}')
    with pytest.raises(
        UserError, match=r"step_.* does not match the run directory: head\.weight is \(2, 32\), not \(3, 32\)"
    ):
        open_predictor(path, CPU)
    (path / "answers.json").unlink()
    with pytest.raises(UserError, match=r"answers\.json cannot be read"):
        open_predictor(path, CPU)


def test_columns_of_another_name_are_named_with_their_option(classifier, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"sentence": "the old owl"}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "the old owl"}\n')
    refused = kindling("predict", classifier.path, "--input", tmp_path / "a.jsonl")
    assert refused.exit_code == 2
    assert "name it with --text-column" in refused.stderr
    found = kindling("predict", classifier.path, "--input", tmp_path / "a.jsonl", "--text-column", "sentence")
    assert found.exit_code == 0, found.output
    assert found.stdout == kindling("predict", classifier.path, "--input", tmp_path / "b.jsonl").stdout
