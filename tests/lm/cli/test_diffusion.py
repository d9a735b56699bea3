"""The commands on a run that learned by masked diffusion alone."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from lm import api
from lm.cli.main import main
from lm.objectives.diffusion import BOUND
from lm.training.reporter import NullReporter


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    config = small.replace(objective="diffusion", steps=4, validate_every=2)
    return api.train(config, run=tmp_path_factory.mktemp("diffusion") / "run", reporter=NullReporter())


def call(*arguments: object, status: int = 0):
    done = CliRunner().invoke(main, [*map(str, arguments)])
    assert done.exit_code == status, done.output
    return done


def test_it_continues_prompts_by_filling_masks_in_rounds(run, small):
    context = small.data.context_length
    options = ["--prompt", "The old miller", "--max-new-tokens", 6, "--rounds", 2]
    texts = [call("sample", run.path, *options, "--seed", seed).stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert all(text.startswith("The old miller") for text in texts)
    # It is what --unmask does.
    assert texts[0] == call("sample", run.path, *options, "--seed", 1, "--unmask", 6).stdout
    other = call("sample", run.path, *options, "--seed", 1, "--order", "random").stdout
    assert other != texts[0]
    assert other == call("sample", run.path, *options, "--seed", 1, "--order", "random").stdout
    # As many tokens as there is room for.
    answer = json.loads(call("sample", run.path, "--prompt", "", "--json", "--top", 1, "--rounds", 3).stdout)
    assert answer["fill"] == f"[MASK:{context - 1}]"
    assert len(answer["candidates"]) == context - 1
    call("sample", run.path, "--prompt", "the " * context, status=2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--prompt", "a", "--stop", "b"], "has no --stop: leave it out"),
        (["--prompt", "a", "--compile", "--repetition-penalty", "1.1"], "no --repetition-penalty and no --compile"),
        (["--chat"], "--input, --infill and --chat need next_token"),
    ],
)
def test_what_it_cannot_do_is_said_in_one_sentence(run, options, words):
    assert words in " ".join(call("sample", run.path, *options, status=2).output.split())


def test_it_is_measured_and_shown_with_the_bound(run, tmp_path):
    assert set(json.loads(call("evaluate", run.path, "--json").stdout)["validation"]) == {"masked_next_token", BOUND}
    call("report", run.path)
    assert BOUND in (run.path / "report.html").read_text(encoding="utf-8")
    table = call("compare", run.path, run.path, "--out", tmp_path / "both.html").stdout
    assert f"validation, {BOUND}" in table
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"sentence_good": "The old miller.", "sentence_bad": "Miller the old."}) + "\n")
    assert "masked_next_token" in json.loads(call("evaluate", run.path, "--pairs", pairs, "--json").stdout)["accuracy"]


def test_it_is_embedded_exported_fine_tuned_and_planned(run, tmp_path):
    assert api.load(run).embed(["The old miller"]).shape[0] == 1
    exported = call("export", run.path, "--to", "hf", "--out", tmp_path / "hf", status=2).output
    assert "masked_next_token predicts a masked token from the position before it" in " ".join(exported.split())
    call("export", run.path, "--to", "hf", "--readout", "masked_next_token", "--out", tmp_path / "hf")
    plan = call("train", run.path / "config.toml", "--run", tmp_path / "new", "--plan", "--json").stdout
    assert json.loads(plan)["steps"] == 4
    examples = tmp_path / "examples.jsonl"
    lines = (json.dumps({"text": f"{word} {n}", "label": word}) for n in range(4) for word in ("owl", "fox"))
    examples.write_text("\n".join(lines), encoding="utf-8")
    call("finetune", run.path, "--run", tmp_path / "task", "--task", "classification", "--train", examples,
         "--epochs", 1, "--device", "cpu")  # fmt: skip
