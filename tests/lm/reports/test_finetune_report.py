from __future__ import annotations

import math
import shutil

import pytest

from lm.finetuning.finetune import finetune
from lm.reports.finetune_report import MOST, write_finetune_report
from lm.runs.directory import open_run
from lm.training.reporter import NullReporter


@pytest.fixture
def written(tmp_path, read_page):
    """The report of a copy of a run, with other settings: (run, **settings) -> (its words, its HTML)."""

    def words(run, **settings):
        copied = open_run(shutil.copytree(run.path, tmp_path / "<i>run"))
        if settings:
            copied.config.replace(**settings).save(copied.path / "config.toml")
        html = write_finetune_report(open_run(copied.path)).read_text(encoding="utf-8")
        page = read_page(html)
        assert "i" not in page.tags
        return page.words(), html

    return words


@pytest.mark.usefixtures("charts")
def test_a_classifier_shows_its_metrics_and_its_answers_to_the_validation_examples(classifier, written):
    words, html = written(classifier)
    base = classifier.config.finetune.base.rpartition("/")[2]
    assert f"fine-tuned from {base} for classification (full) to step {classifier.config.training.steps}" in words
    for name, value in classifier.scores.items():
        assert f"{name} {value:.4f}" in words
    assert f"The model is right on {classifier.scores['accuracy']:.1%} of 64 validation examples; always" in words
    assert f"guessing evenly among 2 has {math.log(2):.2f}" in words
    assert f"The answers at step {classifier.step} to 64 validation examples." in words
    for heading in ("Confusion matrix", "Calibration", "Worst errors"):
        assert heading in words
    counts = [int(cell) for cell in words.partition("predicted (columns)")[2].split()[2:8] if cell.isdecimal()]
    assert sum(counts) == 64
    assert sum(counts[::3]) == round(64 * classifier.scores["accuracy"])
    assert ">accuracy, validation</text>" in html
    assert "finetune" in words.partition("Settings")[2]


@pytest.mark.parametrize("kind", ["regression", "tokens", "choice"])
def test_every_task_with_a_head_has_a_report(task_settings, tmp_path, written, kind):
    run = finetune(task_settings(kind, epochs=1), tmp_path / "run", NullReporter())
    words, _ = written(run)
    assert "On the validation examples" in words
    assert ("Worst errors" in words) is (kind == "regression")
    assert ("always answering their mean has about 1" in words) is (kind == "regression")
    assert "The model is right on" not in words


def test_a_classifier_of_images_has_a_report(image_classifier, written):
    words, _ = written(image_classifier)
    assert "for image classification" in words
    assert f"accuracy {image_classifier.scores['accuracy']:.4f}" in words
    assert "Confusion matrix" in words
    assert "views" in words.partition("Settings")[2]


def test_without_the_examples_the_page_says_less(classifier, tmp_path, written):
    words, _ = written(classifier, validation=str(tmp_path / "gone.jsonl"))
    assert f"accuracy {classifier.scores['accuracy']:.4f}" in words
    assert "Worst errors" not in words
    assert "always answering" not in words


def test_of_many_examples_some_are_drawn(classifier, write_rows, tmp_path, written):
    rows = [
        {"text": f"fox {number}", "label": "animal" if number < 2 * MOST else "place"} for number in range(3 * MOST)
    ]
    words, _ = written(classifier, validation=write_rows(tmp_path / "many.jsonl", rows))
    assert f"to {MOST:,} of the {3 * MOST:,} validation examples, drawn at random." in words
    confusion = words.partition("predicted (columns)")[2].split()[2:8]
    assert (confusion[0], confusion[3]) == ("animal", "place")
    assert 0.28 * MOST < sum(map(int, confusion[4:])) < 0.39 * MOST  # a third, of both kinds
