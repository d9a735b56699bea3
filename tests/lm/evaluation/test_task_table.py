from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from lm.evaluation.frozen_features import TextFeatures
from lm.evaluation.probes import Predictions
from lm.evaluation.task_table import (
    ROWS,
    TUNED,
    Cell,
    CellMaker,
    Summary,
    Task,
    findings,
    read_cell,
    read_task,
    summarize,
)
from lm.inference.embedding import Reading
from lm.runs.directory import Run

SUBJECTS = ("the old miller", "a young fox", "my grandmother", "the captain")
GOOD, BAD = ("found", "painted", "watched"), ("lost", "sold", "forgot")


def write_task(folder, name, count, seed, *, pair=False, number=False):
    """A classification, or with ``number`` a regression: which kind of verb a sentence has, or two have in common."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        kinds = [draw.choice((GOOD, BAD)) for _ in range(2 if pair else 1)]
        texts = [f"{draw.choice(SUBJECTS)} {draw.choice(kind)} a silver key <b>" for kind in kinds]
        same = int(kinds[0] is (kinds[1] if pair else GOOD))
        label = float(same) + draw.random() / 4 if number else ("good" if same else "bad")
        lines.append(dict(zip(("text", "text_pair"), texts, strict=False)) | {"label": label})
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    return Task("verbs", "classification", write_task(folder, "train", 120, 0), write_task(folder, "test", 40, 1))


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("numbers")
    files = [write_task(folder, name, 60, seed, pair=True, number=True) for seed, name in enumerate(("train", "test"))]
    return Task("same", "regression", *files, settings={"full": {"epochs": 2}, "lora": {"epochs": 9}})


class Tuning:
    """Stands for fine-tuning: answers right but for the first example, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked = []

    def __call__(self, row, examples, seed, settings, folder):
        self.asked.append((row, seed, settings, folder.name))
        truth = examples.values(examples.test)
        if not examples.classes:
            return Predictions(truth + seed * np.arange(len(truth)), 7)
        outputs = np.eye(examples.classes)[truth] * 0.9 + 0.05
        outputs[0] = outputs[0, ::-1]
        return Predictions(outputs, 7, "note")


@pytest.fixture
def make(trained: Run, tmp_path):
    """A maker of cells in a folder, with the tuning it asks."""

    def make(reading=Reading("bidirectional", "mean"), weights="w"):  # noqa: B008
        tuning = Tuning()
        return CellMaker(
            TextFeatures(trained, trained.load_model(torch.device("cpu")), reading), weights, tuning, tmp_path
        ), tuning

    return make


def test_every_row_of_a_classification_answers_the_test_examples(make, task):
    maker, tuning = make()
    examples = read_task(task)
    cells = {row: maker.cell(examples, row, 1) for row in ROWS}
    assert [row for row, _, _, _ in tuning.asked] == list(TUNED)
    for row, cell in cells.items():
        outputs = np.array(cell.outputs)
        assert outputs.shape == (40, 2)
        assert outputs.sum(1) == pytest.approx(1)
        truth = examples.values(examples.test)
        assert cell.metrics["accuracy"] == (outputs.argmax(1) == truth).mean(), row
        assert cell.seconds > 0
    assert cells["full"].metrics["accuracy"] == 39 / 40
    assert cells["tfidf"].metrics["accuracy"] == 1.0
    assert cells["majority"].metrics["accuracy"] < cells["probe"].metrics["accuracy"]
    assert cells["probe_untrained"].outputs != cells["probe"].outputs
    assert (cells["majority"].trained_parameters, cells["probe"].trained_parameters) == (0, 33)


def test_pairs_and_numbers_have_a_table_too(make, numbers):
    maker, tuning = make()
    examples = read_task(numbers)
    cells = {row: maker.cell(examples, row, 0) for row in ROWS}
    assert cells["full"].metrics == pytest.approx({"spearman": 1.0, "pearson": 1.0})
    assert cells["majority"].metrics == {"spearman": 0.0, "pearson": 0.0}
    assert cells["probe"].trained_parameters == 4 * 32 + 1
    assert [settings for _, _, settings, _ in tuning.asked] == [{}, {"epochs": 9}, {"epochs": 2}]


def test_a_cell_that_is_there_is_not_made_again_unless_what_it_follows_from_has_changed(make, task):
    examples = read_task(task)
    made = make()[0].cell(examples, "full", 1)
    maker, tuning = make()
    assert maker.cell(examples, "full", 1) == made
    assert maker.cell(examples, "full", 2).seed == 2
    assert [(row, seed) for row, seed, _, _ in tuning.asked] == [("full", 2)]
    for changed in (
        (make(weights="other"), examples),
        (make(), replace(examples, train=examples.train[1:])),
        (make(), read_task(replace(task, metric="matthews"))),
        (make(), read_task(replace(task, settings={"full": {"epochs": 9}}))),
    ):
        (maker, tuning), others = changed
        maker.cell(others, "full", 1)
        assert len(tuning.asked) == 1
    (maker, _), (other, _) = make(), make(Reading("causal", "last"))
    assert maker.cell(examples, "knn", 0) != other.cell(examples, "knn", 0)


def test_a_damaged_cell_is_made_again(make, task, tmp_path):
    maker, tuning = make()
    maker.cell(read_task(task), "lora", 0)
    path = tmp_path / "cells" / "verbs" / "lora-0.json"
    assert read_cell(path).metrics["accuracy"] == 39 / 40
    path.write_text(path.read_text()[:50])
    assert read_cell(path) is None
    maker.cell(read_task(task), "lora", 0)
    assert len(tuning.asked) == 2


def test_fine_tuning_chooses_by_a_tenth_of_the_training_examples_unless_it_is_given_others(task):
    examples = read_task(task)
    train, validation = examples.parts(3)
    assert (len(train), len(validation)) == (108, 12)
    assert sorted(e.place for e in train + validation) == sorted(e.place for e in examples.train)
    assert examples.parts(3) == (train, validation)
    assert examples.parts(4) != (train, validation)
    given = read_task(replace(task, validation=task.test))
    assert given.parts(3) == (given.train, given.test)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "choice"}, 'task "verbs": tables support classification, regression, image_classification, not'),
        ({"metric": "pearson"}, 'classification has no metric "pearson": choose one of accuracy, f1'),
        ({"test": "same"}, "pairs of texts and others single texts"),
        ({"kind": "regression"}, r'train\.jsonl, line 1: "label" is "\w+", not a number'),
    ],
)
def test_a_task_that_cannot_be_is_refused(task, numbers, change, words):
    if change.get("test"):
        change = {"test": write_task_with_names(numbers)}
    with pytest.raises(UserError, match=words):
        read_task(replace(task, **change))


def write_task_with_names(numbers):
    path = numbers.test.replace("test.jsonl", "named.jsonl")
    with open(numbers.test) as lines, open(path, "w") as out:  # noqa: PTH123
        out.writelines(json.dumps(json.loads(line) | {"label": "good"}) + "\n" for line in lines)
    return path


def cell(row, seed, accuracy, task="t"):
    return Cell(task, row, seed, {"accuracy": accuracy, "f1": 0.5}, seed, 1.0 + seed, "", [[0.5, 0.5]], "s")


def test_a_summary_is_the_mean_and_the_sample_deviation_over_seeds():
    cells = [cell("full", 0, 0.7), cell("tfidf", 0, 0.5), cell("full", 1, 0.9), cell("full", 0, 0.1, "u")]
    one, two, three = summarize(cells)
    assert (one.task, one.row, one.seeds, one.trained_parameters, one.seconds) == ("t", "full", (0, 1), 1, 1.5)
    assert one.metrics["accuracy"] == pytest.approx((0.8, 0.02**0.5))
    assert two.metrics["accuracy"] == (0.5, 0.0)
    assert (three.task, three.metrics["accuracy"]) == ("u", (0.1, 0.0))


def test_what_the_table_says_takes_the_deviations_into_account():
    def told(full, untrained, deviation):
        rows = {"full": (full, deviation), "untrained": (untrained, 0.0)}
        summaries = [Summary("t", row, (0, 1), {"accuracy": value}, 1, 1.0) for row, value in rows.items()]
        return findings(summaries, "accuracy")[0]

    assert "is better than the untrained architecture: accuracy 0.800 vs. 0.700" in told(0.8, 0.7, 0.01)
    assert "is worse than the untrained" in told(0.6, 0.7, 0.01)
    assert "is not clearly different from the untrained" in told(0.8, 0.7, 0.06)
    assert findings([], "accuracy") == []
    alone = [Summary("t", row, (0,), {"accuracy": (0.5, 0.0)}, 1, 1.0) for row in ("full", "tfidf")]
    assert "with a single seed this may be chance" in findings(alone, "accuracy")[0]


def test_a_share_of_the_labels_works_for_texts_too(make, task):
    maker, _ = make()
    whole = read_task(task)
    some = read_task(replace(task, labels=0.25))
    mine = some.of_seed(1)
    counts = [np.bincount(each.values(each.train)) for each in (whole, mine)]
    assert counts[1].tolist() == [max(1, round(count * 0.25)) for count in counts[0]]
    assert all(example in whole.train for example in mine.train)
    assert [example.texts for example in mine.train] != [example.texts for example in some.of_seed(2).train]
    for row in ("tfidf", "probe", "full"):
        assert maker.cell(some, row, 1).source != maker.cell(whole, row, 1).source
    assert len(maker.features.of(some, "probe", 1).train) == len(mine.train)
    assert len(maker.features.of(some, "probe", 2).train) == len(some.of_seed(2).train)
