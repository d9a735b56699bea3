from __future__ import annotations

import json
import math
import os
import shutil
from dataclasses import replace
from html import escape

import pytest

from data_prep.errors import UserError
from lm.config.shown import shown_values
from lm.evaluation.validation_loss import evaluate
from lm.inference.fill_mask import Filled, fill_masks
from lm.reports.run_report import write_report
from lm.runs.directory import open_run
from lm.runs.run_data import openings_of
from tests.conftest import charts_drawn, loaded

HOSTILE = '<script>alert("x")</script> & <img src=http://example.com/x>'


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory):
    return open_run(shutil.copytree(trained.path, tmp_path_factory.mktemp("report") / "run <&> one"))


@pytest.fixture(scope="module")
def html(run):
    """With everything, and with hostile text wherever a user's text goes."""
    fills = ["The old [MASK] found a silver [MASK].", "[MASK] <script>"]
    evaluation = evaluate(run)
    with charts_drawn():
        return write_report(run, evaluation, ["The captain", HOSTILE], fills).read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_needs_no_network(html, read_page):
    assert html.startswith("<!doctype html>")
    read_page(html)


def test_hostile_text_is_shown_and_never_obeyed(html, read_page):
    page = read_page(html)
    assert '<script>alert("x")</script>' in page.words()
    assert "<script" not in html
    assert "<img" not in html
    assert "run <&> one" in page.words()


def test_curves_losses_samples_settings_and_environment_are_there(html, run, read_page):
    page = read_page(html)
    words = page.words()
    assert page.tags.count("svg") == 6
    for heading in ("Loss on the validation split", "Training", "Samples", "Settings", "Environment"):
        assert heading in words
    for row in ("next_token", "masked_next_token", "unigram (baseline)", "bz2 -9 (baseline)"):
        assert row in words
    for settings in shown_values(run.config).values():
        for name, value in settings.items():
            assert f"{name} {' '.join(value.split())}".strip() in words
    assert f"feed_forward_size 0 → {run.config.model.feed_forward_width} width" in words
    assert "torch" in words
    assert "trained with hybrid to step 100 of 100" in words
    assert "The captain" in words


def test_losses_of_the_page_are_those_of_the_evaluation(html, run, read_page):
    evaluation = evaluate(run)
    words = read_page(html).words()
    for loss in [*evaluation["validation"].values(), *evaluation["floors"].values()]:
        assert f"{loss['bits_per_byte']:.3f}" in words
    assert f"{evaluation['validation_tokens']:,} tokens, {evaluation['validation_bytes'] / 1000:.0f} kB." in words


def test_a_page_without_evaluation_or_samples_leaves_them_out(run, tmp_path, read_page):
    run = replace(run, config=run.config.replace(data=(str(tmp_path / "gone"),)))
    path = write_report(run, None)
    assert path == run.path / "report.html"
    words = read_page(path.read_text(encoding="utf-8")).words()
    assert "Loss on the validation split" not in words
    assert "Samples" not in words
    assert "Settings" in words


def test_without_prompts_the_samples_begin_as_validation_texts_do(run, read_page):
    found = openings_of(run)
    assert found
    page = write_report(run, None).read_text(encoding="utf-8")
    assert "openings of validation documents" in read_page(page).words()
    for opening in found:
        assert f"<blockquote><b>{escape(opening.prompt)}</b>" in page
        assert f"<blockquote>{escape(opening.fill.partition('[MASK]')[0])}".rstrip() in page
    named = write_report(run, None, ["The captain"]).read_text(encoding="utf-8")
    assert "openings of validation documents" not in read_page(named).words()
    assert named.count("<blockquote>") == 1


def test_the_page_says_what_the_run_is_how_long_it_took_and_what_the_loss_means(run, read_page):
    """Of the evaluation, or without one of the best validation."""
    evaluation = evaluate(run)
    best = min(line["validation"]["next_token"]["nats_per_token"] for line in run.metrics() if line.get("validation"))
    nats = evaluation["validation"]["next_token"]["nats_per_token"]
    for measured, loss in ((evaluation, nats), (None, best)):
        words = read_page(write_report(run, measured).read_text(encoding="utf-8")).words()
        assert f"next_token {loss:.3f} is as if the model gave each token {math.exp(-loss):.2%}" in words
        assert "to step 100 of 100, which took" in words
    saved = run.newest().path / "state.json"
    os.utime(saved, (86400 * 365.25 * 30,) * 2)
    assert "The checkpoint was saved on 2000-01-0" in read_page(write_report(run, None).read_text()).words()


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
def test_only_what_the_objective_teaches_is_shown(small, quietly, tmp_path, objective, shown, left_out, read_page):
    made = quietly(small.replace(objective=objective, steps=2), tmp_path / "run")
    words = read_page(write_report(made, None, ["The captain"], ["owl [MASK]"]).read_text(encoding="utf-8")).words()
    writes = words[words.index("Samples") : words.index("Settings")]
    assert shown in writes
    assert left_out not in writes


def test_a_report_needs_a_checkpoint(run, tmp_path):
    bare = open_run(shutil.copytree(run.path, tmp_path / "bare"))
    shutil.rmtree(bare.path / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet"):
        write_report(bare, None)


def test_a_report_can_be_written_after_the_objective_was_changed(small, quietly, tmp_path):
    quietly(small.replace(objective="next_token", steps=2), tmp_path / "run")
    run = quietly(small.replace(objective="hybrid", steps=4), tmp_path / "run", accept_changes=True)
    write_report(run, None)


def test_a_filled_text_is_shown_as_it_is(trained):
    filled = fill_masks(loaded(trained), "The [MASK] found the [MASK].")
    assert "".join(piece for piece, _ in filled.pieces) == filled.text


def test_loss_spikes_the_best_validation_and_the_cost_are_shown(run, tmp_path, read_page):
    troubled = open_run(shutil.copytree(run.path, tmp_path / "troubled"))
    losses = [(20, 3.0), (40, 2.5), (60, 2.6), (80, 2.7), (100, 2.8)]
    interval = {"loss": 3.0, "gradient_norm": 1.0, "learning_rate": 0.01, "share_of_peak": 0.4}
    speeds = [(step, {"tokens_per_second": 1000.0 + step, "memory_bytes": step * 10**6}) for step in range(10, 101, 10)]
    intervals = [{"step": s, "tokens": 256 * s, "epoch": s / 50, **interval, **speed} for s, speed in speeds]
    readouts = [(s, {"next_token": {"nats_per_token": n, "bits_per_byte": n / 2, "predicted": 9}}) for s, n in losses]
    validations = [{"step": s, "validation": found, "rows": {"taken": 8, "of": 1024}} for s, found in readouts]
    lines = [
        *intervals,
        *validations,
        {"step": 33, "event": "skip", "rate": 1.0, "reason": "loss 99.000, gradient norm <inf>"},
        {"step": 21, "event": "roll_back", "rate": 0.5, "reason": "the steps up to 37 went wrong"},
        {"step": 50, "event": "something new", "rate": 0.5, "reason": "unknown"},
    ]
    (troubled.path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = read_page(write_report(troubled, None).read_text(encoding="utf-8"))
    words = page.words()
    assert "The validation loss was lowest at step 40 and has not improved in 3 validations since" in words
    assert "best validation step 40: next_token 2.500 nats per token validated on 8 of 1,024 rows" in words
    assert "epochs seen 2.00" in words
    assert "tokens per second, median 1,055" in words
    assert "fraction of the machine's peak, median 40.0%" in words
    assert "peak memory 100 MB" in words
    assert "skipped steps 1" in words
    assert "33 skipped loss 99.000, gradient norm <inf>" in words
    assert "21 rolled back to this step, with 0.5 of the scheduled learning rate the steps up to 37 went wrong" in words
    assert "50 something new unknown" in words


def test_a_run_without_spikes_does_not_mention_them(html, read_page):
    words = read_page(html).words()
    assert "Loss spikes" not in words
    assert "overfitting" not in words


def test_small_probabilities_keep_their_digits(run, monkeypatch, read_page):
    """And a filled blank is marked, so that a space can be seen."""
    filled = Filled("a  b", [("a", False), (" ", True), (" b", False)], [[(" ", 0.344), ("x", 0.00123)]])
    monkeypatch.setattr("lm.reports.run_report.fill_masks", lambda *_: filled)
    page = write_report(run, None, [], ["a [MASK] b"]).read_text(encoding="utf-8")
    assert "' ' 34% · 'x' 0.12%" in read_page(page).words()
    assert '<b class="filled"> </b>' in page
