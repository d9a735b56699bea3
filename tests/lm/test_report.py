from __future__ import annotations

import shutil
from html.parser import HTMLParser

import pytest
import torch

from data_prep.errors import UserError
from lm.config import all_settings
from lm.evaluate import evaluate
from lm.generate import fill_masks
from lm.report import draw, write_report
from lm.run_directory import open_run

HOSTILE = '<script>alert("x")</script> & <img src=http://example.com/x>'
VOID = {"meta", "br", "img", "hr", "input", "link"}


class Page(HTMLParser):
    """Checks that tags are balanced, and keeps tags, attributes and text."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag):
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    return open_run(shutil.copytree(trained.path, tmp_path_factory.mktemp("report") / "run <&> one"))


@pytest.fixture(scope="module")
def html(run):
    """With everything, and with hostile text wherever a user's text goes."""
    fills = ["The old [MASK] found a silver [MASK].", "[MASK] <script>"]
    evaluation = evaluate(run)
    return write_report(run, evaluation, ["The captain", HOSTILE], fills).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_needs_no_network(html):
    page = Page(html)
    assert html.startswith("<!doctype html>")
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    for _, name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href", "xlink:href", "action", "data", "srcset"):
            assert value.startswith("#"), value
        if name == "style":
            assert "url(" not in value.replace("url(#", "")
    assert "@import" not in html
    assert "url(http" not in html


def test_hostile_text_is_shown_and_never_obeyed(html):
    page = Page(html)
    assert '<script>alert("x")</script>' in page.words()
    assert "<script" not in html
    assert "<img" not in html
    assert "run <&> one" in page.words()


def test_curves_losses_samples_settings_and_environment_are_there(html, run):
    page = Page(html)
    words = page.words()
    assert page.tags.count("svg") == 2
    for heading in ("Loss on the validation split", "Training", "What it writes", "Settings", "Environment"):
        assert heading in words
    for row in ("next_token", "masked_next_token", "unigram (floor)", "bz2 -9 (floor)"):
        assert row in words
    for setting in all_settings():
        assert setting.name in words
        assert str(run.config.flat()[setting.name]) in words
    assert "torch" in words
    assert "trained with hybrid to step 100 of 100" in words
    assert "The captain" in words


def test_losses_of_the_page_are_those_of_the_evaluation(html, run):
    evaluation = evaluate(run)
    words = Page(html).words()
    for loss in [*evaluation["validation"].values(), *evaluation["floors"].values()]:
        assert f"{loss['bits_per_byte']:.3f}" in words
    assert f"{evaluation['validation_bytes']:,} bytes" in words


def test_a_page_without_evaluation_or_samples_leaves_them_out(run):
    path = write_report(run, None)
    assert path == run.path / "report.html"
    words = Page(path.read_text(encoding="utf-8")).words()
    assert "Loss on the validation split" not in words
    assert "What it writes" not in words
    assert "Settings" in words


def test_the_same_run_gives_the_same_page(run):
    first = write_report(run, None, ["The captain"]).read_bytes()
    assert write_report(run, None, ["The captain"]).read_bytes() == first


def test_a_run_without_any_logged_step_says_so(run, tmp_path):
    bare = open_run(shutil.copytree(run.path, tmp_path / "bare"))
    (bare.path / "metrics.jsonl").unlink()
    assert "No steps have been logged yet" in write_report(bare, None).read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("objective", "shown", "left_out"), [("next_token", "captain", "[MASK]"), ("masked_token", "owl", "captain")]
)
def test_only_what_the_objective_teaches_is_shown(small, quietly, tmp_path, objective, shown, left_out):
    made = quietly(small.replace(objective=objective, steps=2), tmp_path / "run")
    words = Page(write_report(made, None, ["The captain"], ["owl [MASK]"]).read_text(encoding="utf-8")).words()
    writes = words[words.index("What it writes") : words.index("Settings")]
    assert shown in writes
    assert left_out not in writes


def test_a_report_needs_a_checkpoint(run, tmp_path):
    bare = open_run(shutil.copytree(run.path, tmp_path / "bare"))
    shutil.rmtree(bare.path / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        write_report(bare, None)


def test_a_drawing_has_its_titles_labels_and_no_date():
    svg = draw({"a loss": ({"one": [(1, 2.0), (2, 1.0)]}, {"two": [(2, 1.5)]})}, height=2)
    assert svg.startswith("<svg")
    assert svg == draw({"a loss": ({"one": [(1, 2.0), (2, 1.0)]}, {"two": [(2, 1.5)]})}, height=2)
    Page(svg)


def test_a_report_can_be_written_after_the_objective_was_changed(small, quietly, tmp_path):
    quietly(small.replace(objective="next_token", steps=2), tmp_path / "run")
    run = quietly(small.replace(objective="hybrid", steps=4), tmp_path / "run", accept_changes=True)
    write_report(run, None)


def test_a_filled_text_is_shown_as_it_is(trained):
    model = trained.load_model(torch.device("cpu"))
    text = "The [MASK] found the [MASK]."
    filled = fill_masks(model, trained.tokenizer, text, "masked_next_token", 32)
    assert "".join(piece for piece, _ in filled.pieces) == filled.text
