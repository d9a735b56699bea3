from __future__ import annotations

import dataclasses
import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.data.examples import Example
from lm.evaluation import tuned_rows
from lm.evaluation.task_file import make_task, read_tasks
from lm.evaluation.task_table import TUNED, read_task
from lm.evaluation.tuned_rows import Tuner, learning_seconds

CLASSES = {"good": ("found", "painted"), "bad": ("lost", "sold"), "odd": ("watched", "forgot")}
QUICK = {"epochs": 1, "batch_examples": 16, "learning_rate": 0.01, "dropout": 0.0}


def write(path, count, seed, classes=("good", "bad")):
    draw = random.Random(seed)
    with path.open("w") as file:
        for number in range(count):
            label = classes[number % len(classes)]
            text = f"The captain {draw.choice(CLASSES[label])} a silver key."
            file.write(json.dumps({"sentence": text, "label": label}) + "\n")
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "train.jsonl", 60, 0)
    write(tmp_path / "test.jsonl", 20, 1)
    return tmp_path


def of_task(folder, **more):
    names = {"train": "train.jsonl", "test": "test.jsonl"}
    files = {key: str(folder / name) for key, name in names.items()}
    return {"task": "classification", "text_column": "sentence", **files, **more}


def test_a_file_of_tasks_has_settings_for_all_for_a_row_and_for_a_task(trained, folder):
    (folder / "tasks.toml").write_text(
        """
        [settings]
        epochs = 2
        learning_rate = 0.01
        [rows.lora]
        learning_rate = 0.02
        [tasks.verbs]
        task = "classification"
        train = "train.jsonl"
        test = "test.jsonl"
        text_column = "sentence"
        judged_by = "matthews"
        epochs = 5
        """
    )
    (task,) = read_tasks(trained, folder / "tasks.toml", {"batch_examples": "8"})
    assert (task.name, task.kind, task.judged_by, task.columns.text) == (
        "verbs",
        "classification",
        "matthews",
        "sentence",
    )
    assert (task.train, task.test) == (str(folder / "train.jsonl"), str(folder / "test.jsonl"))
    settings = {"epochs": 5, "learning_rate": 0.01, "batch_examples": "8"}
    assert task.settings == {"untrained": settings, "lora": settings | {"learning_rate": 0.02}, "full": settings}
    assert len(read_task(task).train) == 60


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[tasks.a]\ntask = 'classification'\ntest = 'x'\n", r"\[tasks\.a\] name the examples: --train FILE"),
        ("[tasks.a]\ntask = 'classification'\ntrain = 'x'\n", r"\[tasks\.a\] name the examples: --test FILE"),
        ("[tasks.a]\nepoch = 3\ntrain = 'x'\ntest = 'y'\n", r"\[tasks\.a\] unknown option --epoch: did you mean"),
        ("[rows.knn]\nk = 3\n", r'unknown row "\[rows.knn\]"'),
        ("[tasks.'../a']\ntrain = 'x'\n", "is not a valid folder name"),
        ("[task.a]\n", r'unknown section "\[task\]"'),
        ("[settings]\n", "there are no tasks in"),
        ("[tasks", "cannot read the tasks"),
    ],
)
def test_what_is_wrong_in_a_file_of_tasks_is_said(trained, tmp_path, content, words):
    (tmp_path / "tasks.toml").write_text(content)
    with pytest.raises(UserError, match=words):
        read_tasks(trained, tmp_path / "tasks.toml", {})


def test_fine_tuned_rows_answer_the_test_examples_in_the_order_of_the_classes(trained, folder, tmp_path):
    task = make_task(trained, "verbs", {}, {}, of_task(folder), QUICK | {"epochs": 4})
    examples = read_task(task)
    tuner = Tuner(trained, torch.device("cpu"))
    learned = {}
    for row in TUNED:
        answers = tuner(row, examples, 0, task.settings[row], tmp_path / row)
        assert answers.outputs.shape == (20, 2)
        assert answers.outputs.sum(1) == pytest.approx(1)
        assert answers.chosen.startswith("best at step ")
        assert 0.01 < answers.seconds < 60
        learned[row] = answers.parameters
        if row == "full":
            truth = examples.values(examples.test)
            assert (answers.outputs.argmax(1) == truth).mean() >= 0.9
    assert learned["full"] == learned["untrained"] > learned["lora"] > 66
    kept = [json.loads(line) for line in (tmp_path / "full" / "validation.jsonl").read_text().splitlines()]
    assert len(kept) == 6
    assert set(kept[0]) == {"text", "label"}


def test_the_seconds_of_learning_are_those_of_all_sessions(tmp_path):
    lines = [
        {"step": 10, "tokens": 100, "tokens_per_second": 50.0},
        {"step": 10, "metrics": {}},
        {"step": 20, "tokens": 300, "tokens_per_second": 100.0},
    ]
    assert learning_seconds(SimpleNamespace(metrics=lambda: iter(lines), path=tmp_path)) == 4.0


def test_a_class_that_the_fine_tuning_was_not_shown_has_probability_zero(trained, folder, monkeypatch):
    task = make_task(trained, "verbs", {}, {}, of_task(folder), {})
    examples = dataclasses.replace(read_task(task), test=[Example(("x",), "good", "f")])
    answers = [({"probabilities": {"good": 0.75}, "label": "good"}, False)]
    monkeypatch.setattr(tuned_rows, "predict", lambda predictor, asked: iter(answers))
    assert tuned_rows.predictions_of(None, examples)[0].tolist() == [[0.0, 0.75]]


def test_the_command_makes_a_table_resumes_and_does_nothing_twice(trained, folder):
    out = folder / "out"
    arguments = ["tasks", str(trained.path), "--out", str(out), "--device", "cpu", "--seeds", "0,1"]
    for name, value in (of_task(folder) | QUICK).items():
        arguments += [f"--{name.replace('_', '-')}", str(value)]
    first = CliRunner().invoke(main, [*arguments, "--rows", "majority,full,tfidf"])
    assert first.exit_code == 0, first.output
    assert "Full fine-tuning is" in first.stdout
    assert [line.split("  ")[1] for line in first.stderr.splitlines() if "seed 0" in line] == [
        "majority",
        "tfidf",
        "full",
    ]
    assert (out / "report.html").is_file()
    assert not list((out / "runs").rglob("*.safetensors"))
    cells = {path: path.read_bytes() for path in (out / "cells").rglob("*.json")}
    assert len(cells) == 6
    second = CliRunner().invoke(main, [*arguments, "--rows", "majority,full,tfidf,probe", "--json"])
    assert second.exit_code == 0, second.output
    assert all(path.read_bytes() == content for path, content in cells.items())
    found = {each["row"]: each for each in json.loads(second.stdout)}
    assert list(found) == ["majority", "tfidf", "probe", "full"]
    assert found["full"]["seeds"] == [0, 1]
    assert np.isfinite(found["full"]["metrics"]["accuracy"][1])


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--rows", "bert"], 'there is no row "bert"'),
        (["--seeds", "0,0"], "must be different whole numbers"),
        (["--tasks", "x.toml"], "--tasks names the tasks: leave out --task, --train, --test"),
        (["--task", "choice"], "tables support classification, regression, image_classification"),
        (["--epochs", "many"], "--epochs"),
    ],
)
def test_an_invalid_command_is_refused_in_a_sentence(trained, folder, more, words):
    arguments = ["tasks", str(trained.path), "--out", str(folder / "out")]
    for name in ("task", "train", "test"):
        arguments += [f"--{name}", of_task(folder)[name]]
    result = CliRunner().invoke(main, [*arguments, *more])
    assert (result.exit_code, words in result.stderr) == (2, True), result.output
    assert not (folder / "out").exists()
