"""The commands on a run that learned several objectives at once, and on one without a readout."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from lm import api
from lm.cli.main import main
from lm.training.reporter import NullReporter

OBJECTIVE = "masked_next_token:0.25,next_token:0.25,masked_token:0.125,prefix_lm:0.25,span_corruption:0.125"
READOUTS = ["next_token", "masked_next_token", "masked_token"]


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    config = small.replace(objective=OBJECTIVE, steps=4, validate_every=2)
    return api.train(config, run=tmp_path_factory.mktemp("mixture") / "run", reporter=NullReporter())


def call(*arguments: object):
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == 0, done.output
    return done


def test_it_generates_fills_and_is_evaluated_by_every_readout(run):
    assert call("sample", run.path, "--prompt", "The", "--max-new-tokens", 3).stdout
    assert call("sample", run.path, "--fill", "The [MASK]").stdout
    assert set(json.loads(call("evaluate", run.path, "--json").stdout)["validation"]) == set(READOUTS)
    for readout in READOUTS:
        assert api.load(run).score("The fox", readout=readout) < 0


def test_its_report_and_comparisons_show_every_part(run, trained, tmp_path):
    call("report", run.path)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    parts = [*READOUTS, "prefix_lm", "span_corruption"]
    assert all(name in page for name in parts)
    assert "loss of views" not in page
    table = call("compare", run.path, trained.path, "--out", tmp_path / "both.html").stdout
    assert all(f"training, {name}" in table and f"validation, {name}" in table for name in parts)


def test_it_is_planned_exported_and_fine_tuned(run, small, tmp_path):
    plan = call("train", run.path / "config.toml", "--run", tmp_path / "new", "--plan", "--json").stdout
    assert json.loads(plan)["steps"] == 4
    for readout in READOUTS:
        call("export", run.path, "--to", "hf", "--readout", readout, "--out", tmp_path / readout)
    examples = tmp_path / "examples.jsonl"
    lines = (json.dumps({"text": f"{word} {n}", "label": word}) for n in range(4) for word in ("owl", "fox"))
    examples.write_text("\n".join(lines), encoding="utf-8")
    call("finetune", run.path, "--run", tmp_path / "task", "--task", "classification", "--train", examples,
         "--epochs", 1, "--device", "cpu")  # fmt: skip


def test_a_run_that_predicts_spans_only_embeds_and_says_what_it_cannot_do(small, trained, tmp_path):
    config = small.replace(objective="span_corruption", steps=4, validate_every=2)
    run = api.train(config, run=tmp_path / "spans", reporter=NullReporter())
    for asked in (["sample", run.path, "--prompt", "a"], ["evaluate", run.path]):
        done = CliRunner().invoke(main, [*map(str, asked)])
        assert done.exit_code == 2
        assert "trained with span_corruption only, which predicts hidden spans: kindling embed uses it" in done.stderr
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "a fox"}\n', encoding="utf-8")
    call("embed", run.path, "--input", texts, "--output", tmp_path / "vectors.npy")
    table = call("compare", run.path, trained.path, "--out", tmp_path / "both.html").stdout
    assert "validation, span_corruption" in table
    assert "nats/token" in table
