"""Every page, driven in a real browser: nothing hidden at the side, faint, tiny, broken or without a label."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lm
from data_prep.shards.inspect import inspect_dataset
from data_prep.shards.inspect_images import inspect_images
from data_prep.shards.inspect_page import render_images_page, render_page
from lm.evaluation.validation_loss import evaluate
from lm.reports.comparison import compare, open_entries, write_comparison
from lm.reports.finetune_report import write_finetune_report
from lm.reports.image_report import write_image_report
from lm.reports.run_report import write_report
from lm.reports.sweep_report import write_sweep
from lm.reports.task_report import write_task_report
from lm.runs.directory import Run, open_run, saved_evaluation
from lm.serve.image_service import ImageService
from tests.browser import Browser, started
from tests.lm.reports.test_comparison import imported
from tests.lm.reports.test_sweep_report import TABLE
from tests.lm.reports.test_task_report import cell, examples_of
from tests.lm.serve.conftest import FEW, serve_run, serve_service

pytestmark = pytest.mark.usefixtures("charts")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with started() as made:
        yield made


@pytest.fixture
def problems_of(browser, tmp_path):
    """The problems of a page, given as HTML."""

    def found(html: str) -> list[str]:
        page = tmp_path / "page.html"
        page.write_text(html, encoding="utf-8")
        browser.open(page)
        return browser.problems()

    return found


def report_of(run: Run, folder: Path) -> Run:
    """A copy of a run, in whose folder a report may be written."""
    return open_run(shutil.copytree(run.path, folder / run.path.name))


def test_the_report_of_a_run_on_text(browser, trained, tmp_path):
    run = report_of(trained, tmp_path)
    browser.open(write_report(run, evaluate(run)))
    assert not browser.problems()
    assert browser.run("return document.querySelectorAll('blockquote').length") == 6


def test_the_report_of_a_run_on_images(browser, seeing_run, tmp_path):
    run = report_of(seeing_run, tmp_path)
    browser.open(write_image_report(run, saved_evaluation(run, run.newest())))
    assert not browser.problems()


def test_the_page_of_tasks(browser, tmp_path):
    examples, outputs = examples_of("classification"), [[0.1, 0.9], [0.8, 0.2], [0.3, 0.7], [0.05, 0.95]]
    rows = ("majority", "tfidf", "probe_untrained", "full")
    cells = [cell(examples, row, seed, outputs) for row in rows for seed in (0, 1)]
    write_task_report(tmp_path / "report.html", "run", "A model.", [examples], cells)
    browser.open(tmp_path / "report.html")
    assert not browser.problems()


def test_the_page_of_a_sweep(browser, tmp_path):
    write_sweep(tmp_path, TABLE)
    browser.open(tmp_path / "sweep.html")
    assert not browser.problems()


def test_the_comparison_of_runs(browser, trained, classifier, tmp_path):
    again = imported(shutil.copytree(trained.path, tmp_path / "imported"))
    entries = open_entries([trained.path, classifier.path, again])
    write_comparison(entries, compare(entries), tmp_path / "compare.html")
    browser.open(tmp_path / "compare.html")
    assert not browser.problems()


def test_the_page_about_a_dataset_of_text(problems_of, dataset):
    assert not problems_of(render_page(inspect_dataset(dataset, documents=3, seed=0)))


def test_the_page_about_a_dataset_of_images(problems_of, pictures):
    assert not problems_of(render_images_page(inspect_images(pictures, pictures=12, seed=0, pixels=True)))


@pytest.fixture(scope="module")
def served(trained) -> Iterator[Any]:
    with serve_run(trained) as served:
        yield served


# The button of each tab, and what is true when its answer is there.
TABS = {
    "write": ("write-go", "/^\\d+ tokens, /.test(id('write-status').textContent)"),
    "chat": ("", "id('chat-hint').textContent"),
    "fill": ("fill-go", "id('candidates').children.length > 0"),
    "probabilities": ("look-go", "id('tokens').children.length > 1"),
    "run": ("", "document.querySelectorAll('#curves svg').length === 3"),
}


@pytest.mark.parametrize("tab", TABS)
def test_the_page_of_a_served_run_on_text(browser, served, tab):
    button, answered = TABS[tab]
    browser.open(f"{served.url}/#{tab}")
    browser.run("window.id = (name) => document.getElementById(name)")
    browser.wait(f"!id('{tab}').hidden")
    if button:
        browser.run(f"id('{button}').click()")
    browser.wait(answered)
    if tab == "probabilities":
        browser.run("id('tokens').children[1].style.setProperty('--surprise', 1)")  # the strongest color of a token
    assert not browser.problems()
    browser.driver.get("about:blank")


def test_the_page_of_a_served_run_on_images(browser, seeing_run):
    model = lm.load(seeing_run.path)
    with serve_service(ImageService.open(seeing_run, model.saved, model, FEW)) as served:
        browser.open(served.url)
        browser.wait("document.querySelectorAll('#neighbors li').length > 0")
        assert not browser.problems()
        browser.open(f"{served.url}/#run")
        browser.wait("document.querySelectorAll('#curves svg').length > 3")
        assert not browser.problems()
        browser.driver.get("about:blank")


def test_the_report_of_a_fine_tuned_run(browser, classifier, tmp_path):
    browser.open(write_finetune_report(report_of(classifier, tmp_path)))
    assert not browser.problems()
