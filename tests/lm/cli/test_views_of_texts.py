"""The commands on runs that learned from views of texts, alone or while they learned to predict tokens."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from lm import api
from lm.cli.main import main
from lm.runs.directory import open_run
from lm.training.reporter import NullReporter
from tests.conftest import charts_drawn

VIEWS = {"view_tokens": 16, "projection_size": 8, "projection_hidden_size": 16, "steps": 4, "validate_every": 2}


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("views")
    for name, objective in {"mixed": "hybrid:0.75,simclr:0.25", "alone": "byol"}.items():
        with charts_drawn():
            api.train(small.replace(objective=objective, **VIEWS), run=folder / name, reporter=NullReporter())
    (folder / "rated.jsonl").write_text(
        "".join(json.dumps({"text": f"a fox {n}", "text_pair": "an owl", "label": n}) + "\n" for n in range(5)),
        encoding="utf-8",
    )
    return folder


def call(*arguments: object):
    return CliRunner().invoke(main, [*map(str, arguments)])


@pytest.mark.parametrize(
    "command",
    [
        ["sample", "RUN", "--prompt", "a"],
        ["sample", "RUN", "--fill", "a [MASK]"],
        ["evaluate", "RUN"],
        ["export", "RUN", "--to", "hf", "--out", "OUT"],
        ["export", "RUN", "--to", "gguf", "--out", "OUT"],
        ["serve", "RUN"],
    ],
)
def test_a_run_that_predicts_no_tokens_says_so(runs, tmp_path, command):
    places = {"RUN": runs / "alone", "OUT": tmp_path / "out"}
    done = call(*(places.get(word, word) for word in command))
    assert done.exit_code == 2
    assert "was trained with byol only, which predicts no tokens: kindling embed uses it" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["mixed", "alone"])
def test_both_kinds_of_runs_embed_and_are_judged_by_similarity(runs, tmp_path, name):
    out = tmp_path / "vectors.npy"
    assert call("embed", runs / name, "--input", runs / "rated.jsonl", "--output", out).exit_code == 0
    assert np.load(out).shape == (5, 32)
    done = call("evaluate", runs / name, "--similarity", runs / "rated.jsonl", "--json")
    assert done.exit_code == 0
    found = json.loads(done.stdout)
    assert set(found) == {"pairs", "spearman", "pearson", "baselines"}
    assert set(found["baselines"]["tfidf"]) == {"spearman", "pearson"}
    assert call("export", runs / name, "--to", "sentence-transformers", "--out", tmp_path / "st").exit_code == 0
    assert call("compare", runs / "mixed", runs / "alone", "--out", tmp_path / "both.html").exit_code == 0


def test_a_mixture_is_a_language_model_without_its_head_for_views(runs, tmp_path):
    run = open_run(runs / "mixed")
    assert any(name.startswith("projector.") for name in run.newest().model())
    evaluated = json.loads(call("evaluate", run.path, "--json").stdout)
    assert set(evaluated["validation"]) == {"next_token", "masked_next_token"}
    assert call("export", run.path, "--to", "hf", "--out", tmp_path / "hf").exit_code == 0
    assert not [name for name in load_file(tmp_path / "hf" / "model.safetensors") if "projector" in name]
    page = (run.path / "report.html").read_text(encoding="utf-8")
    assert "loss of views" in page
    model = api.load(run)
    assert isinstance(model.generate("The", max_new_tokens=3), str)
    with pytest.raises(Exception, match="was trained with byol only"):
        api.load(runs / "alone").generate("The")
    with pytest.raises(Exception, match="was trained with byol only"):
        api.load(runs / "alone").score("The")


def test_runs_go_on_from_each_other_whatever_head_they_have(runs, small, tmp_path):
    start = {"data": list(small.data.data), "steps": 1, "device": "cpu", "threads": 1, "view_tokens": 16}
    before = open_run(runs / "mixed").newest().model()
    for objective in ("hybrid", "moco", "hybrid:0.75,simclr:0.25"):
        path = tmp_path / objective.replace(":", "-")
        run = api.train(run=path, init_from=str(runs / "mixed"), objective=objective, learning_rate=0.0,
                        muon_learning_rate=0.0, reporter=NullReporter(), **start)  # fmt: skip
        after = run.newest().model()
        assert torch.equal(after["blocks.0.attention.query.weight"], before["blocks.0.attention.query.weight"])
        head = after.get("projector.first.weight", torch.zeros(0))
        assert torch.equal(head, before["projector.first.weight"]) == (objective == "hybrid:0.75,simclr:0.25")
        assert ("projector.prediction.first.weight" in after) == (objective == "moco")
