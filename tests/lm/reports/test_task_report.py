"""The page about a table of tasks, from cells that were written by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lm.data.examples import Example, Labels
from lm.evaluation.task_table import Cell, Examples, Task, summarize
from lm.finetuning.metrics import metrics_of
from lm.reports.task_report import table, write_task_report


def examples_of(kind: str) -> Examples:
    """Four test examples; texts that would break an HTML page."""
    labels = ["good", "bad", "good", "bad"] if kind == "classification" else [1.0, 2.0, 3.0, 4.0]
    made = [Example((f"text {n} <b>",), label, f"some/test.jsonl, line {n}") for n, label in enumerate(labels, 1)]
    names = Labels(("bad", "good")) if kind == "classification" else None
    return Examples(Task(f"a {kind}", kind, "train", "test"), made * 2, made, [], names)


def cell(examples: Examples, row: str, seed: int, outputs: list) -> Cell:
    metrics = metrics_of(examples.values(examples.test), np.array(outputs), examples.classes)
    return Cell(examples.task.name, row, seed, metrics, 1234, 1.5 + seed, "", outputs, "source")


@pytest.fixture
def classes():
    examples = examples_of("classification")
    right, half = [[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.05, 0.95]], [[0.5, 0.5]] * 4
    return examples, [
        cell(examples, row, seed, out) for row, out in (("majority", half), ("full", right)) for seed in (0, 1)
    ]


def test_a_table_has_the_metric_that_judges_first_with_its_deviation(classes):
    _, cells = classes
    header, rows = table(summarize(cells), "macro_f1")
    assert (header[:2], header[-2:]) == (["", "macro_f1"], ["trained parameters", "seconds"])
    assert [row[0] for row in rows] == ["majority", "full"]
    assert rows[1][header.index("accuracy")] == "0.750 ± 0.000"
    assert rows[1][-2:] == ["1,234", "2.0"]
    _, alone = table(summarize(cells[:1]), "accuracy")
    assert alone[0][1] == "0.500"


@pytest.mark.usefixtures("charts")
def test_the_page_shows_charts_confusions_and_the_worst_errors_with_everything_escaped(classes, tmp_path, read_page):
    numbers = examples_of("regression")
    cells = [*classes[1], cell(numbers, "tfidf", 0, [1.0, 2.5, 3.0, 1.0])]
    write_task_report(tmp_path / "report.html", "<i>run</i>", "A model.", [classes[0], numbers], cells)
    page = read_page((tmp_path / "report.html").read_text())
    words = page.words()
    assert not {"b", "i"} & set(page.tags)
    assert page.tags.count("svg") == 8
    assert "<i>run</i>: what did pretraining buy?" in words
    assert "Example by example: fine-tuned in full, seed 0" in words
    assert "bad 1 1 good 0 2" in words  # one bad text was taken for a good one
    assert "text 4 <b> test.jsonl, line 4 good 95% bad" in words
    assert "text 4 <b> test.jsonl, line 4 1.00 3.00 off 4" in words
    assert words.index("text 4 <b> test.jsonl, line 4 1.00") < words.index("text 2 <b> test.jsonl, line 2 2.50")


def test_one_seed_has_no_deviation(classes, tmp_path):
    examples, cells = classes
    for kept, told in ((cells, True), ([cell for cell in cells if cell.seed == 0], False)):
        write_task_report(tmp_path / "report.html", "run", "A model.", [examples], kept)
        page = (tmp_path / "report.html").read_text()
        assert ("standard deviation over seeds" in page) is told
        assert ("±" in page) is told
