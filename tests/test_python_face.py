"""docs/python.md: its examples run, and its names are the public ones."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import data_prep
import lm
from lm import api
from tests.conftest import sentences

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> dict[str, Any]:
    """The variables after all examples of the page have run, in a folder with a text and a task."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "texts").mkdir()
    for number in range(20):
        (folder / "texts" / f"{number}.txt").write_text(sentences(60, number), encoding="utf-8")
    for name, count in (("train", 40), ("validation", 10)):
        rows = [{"text": f"{word} {n}", "label": word} for n in range(count // 2) for word in ("key", "barn")]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL))
    names: dict[str, Any] = {"folder": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        exec(compile(code, "docs/python.md", "exec"), names)
        names["scores_again"] = names["again"].score(["He runs."])
        names["empty"] = names["model"].embed([])
    return names


def test_the_examples_run_and_give_what_the_page_says(played):
    assert played["dataset"].vocab_size == 400
    assert isinstance(played["run"], lm.Run)
    assert isinstance(played["text"], str)
    assert len(played["both"]) == 2
    assert played["vectors"].shape == (2, 64)
    assert np.allclose(np.linalg.norm(played["vectors"], axis=1), 1, atol=1e-6)
    assert played["empty"].shape == (0, 64)
    assert played["good"] < 0
    assert played["perplexity"] == pytest.approx(
        math.exp(played["on_text"]["validation"]["next_token"]["nats_per_token"])
    )
    assert {answer["label"] for answer in played["answers"]} <= {"key", "barn"}
    assert sum(played["answers"][0]["probabilities"].values()) == pytest.approx(1)
    assert played["task"].scores["accuracy"] >= 0.5
    assert played["features"].shape == (5, 32)
    assert [set(answer["probabilities"]) for answer in played["read"]] == [set("0123456789")] * 5
    assert 'unknown setting "stpes": did you mean "steps"?' in str(played["error_text"])


def test_one_text_gives_one_result_and_a_list_gives_a_list(played):
    model = played["model"]
    assert model.embed("a boat").shape == (64,)
    assert model.score("He runs.") == pytest.approx(model.score(["He runs."])[0])
    assert model.fill("a [MASK]").text == model.fill(["a [MASK]"])[0].text
    pieces = model.generate("The captain", stream=True, max_new_tokens=8, temperature=0)
    assert "".join(pieces) == model.generate("The captain", max_new_tokens=8, temperature=0)


def test_an_exported_folder_gives_the_same_scores(played):
    assert played["scores_again"][0] == pytest.approx(played["model"].score("He runs."), abs=1e-4)
    assert played["again"].readouts == played["model"].readouts


def test_a_command_and_its_function_give_the_same(played):
    folder = played["folder"]
    command = [sys.executable, str(ROOT / "sample.py"), "runs/mine", "--prompt", "The captain", "--temperature", "0"]
    written = subprocess.run(
        [*command, "--max-new-tokens", "8", "--device", "cpu"], cwd=folder, capture_output=True, text=True, check=True
    ).stdout
    assert written.rstrip("\n") == "The captain" + played["model"].generate(
        "The captain", max_new_tokens=8, temperature=0
    )


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda model, _: model.generate("a", temprature=1),
            'unknown setting "temprature": did you mean "temperature"',
        ),
        (lambda model, _: model.generate("a", top_p=7), "top_p must be above 0"),
        (lambda model, _: model.generate(["a"], stream=True), "stream=True takes one prompt"),
        (lambda model, _: model.score("a", readout="masked_token"), "not for masked_token"),
        (lambda model, _: model.fill("nothing to fill"), r"write \[MASK\]"),
        (
            lambda model, _: model.infill("a [GAP]"),
            "not to fill gaps: train it with --objective next_token:0.5,fill_in",
        ),
        (lambda _, task: task.predict("one text"), "predict takes a list"),
        (lambda *_: lm.load("runs/digits").generate("a"), "reads images, so there is no generate: use embed"),
        (lambda *_: lm.load("runs/digits").perplexity("texts"), "there is no perplexity"),
        (lambda *_: lm.load("runs/reader").predict("nowhere"), 'there is no file or folder "nowhere"'),
        (lambda *_: lm.load("nowhere"), "there is no run directory nowhere"),
        (lambda model, _: lm.evaluate(model.run, text="a", pairs="b"), "text and pairs cannot be combined"),
        (lambda *_: lm.train(), "name a recipe to train"),
        (lambda model, _: lm.finetune(model.run, run="runs/x", tsak="choice"), 'did you mean "task"'),
    ],
)
def test_mistakes_raise_one_clear_sentence(played, monkeypatch, call, words):
    monkeypatch.chdir(played["folder"])
    with pytest.raises(lm.UserError, match=words):
        call(played["model"], played["classifier"])


def test_the_page_lists_the_public_names():
    listed = set(re.findall(r"`(?:lm)?\.(\w+)`", PAGE.partition("## Build a dataset")[0]))
    methods = {name for name in listed if hasattr(api.Model, name) or hasattr(api.TaskModel, name)}
    assert methods == {"generate", "fill", "infill", "embed", "score", "perplexity", "save_pretrained", "predict"}
    assert listed - methods - {"load"} == set(lm.__all__) - {"load"}
    assert len(listed) == 16
    assert set(data_prep.__all__) == set(re.findall(r"`data_prep\.(\w+)`", PAGE))
    assert all(getattr(lm, name) for name in lm.__all__)


def test_importing_lm_is_light():
    code = "import lm, sys; print([name for name in ('torch', 'numpy', 'click') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
