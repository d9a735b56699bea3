from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.export.huggingface import export_huggingface
from lm.finetuning.finetune import finetune
from lm.finetuning.merge import merge
from lm.finetuning.predict import open_predictor, predict, read_inputs
from lm.runs.directory import open_run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def adapted(task_settings, tmp_path_factory):
    from lm.training.reporter import NullReporter

    path = tmp_path_factory.mktemp("adapted") / "run"
    return finetune(task_settings("classification", method="lora", epochs=1), path, NullReporter())


def answers_of(path, task_files) -> list:
    predictor = open_predictor(path, CPU)
    return [answer for answer, _ in predict(predictor, read_inputs(predictor, task_files["classification"][1]))]


def test_a_merged_run_answers_as_the_adapted_one_bit_for_bit(adapted, task_files, tmp_path):
    result = CliRunner().invoke(main, ["merge", str(adapted.path), "--out", str(tmp_path / "merged")])
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'merged'}\n")
    assert answers_of(tmp_path / "merged", task_files) == answers_of(adapted.path, task_files)
    merged = open_run(tmp_path / "merged")
    assert merged.config.finetune.method == "full"
    assert not any(name.endswith((".a", ".b")) for name in merged.newest().model())


def test_a_merged_trunk_is_a_plain_run_that_can_be_exported_and_fine_tuned_again(
    adapted, trained, task_settings, recorder, tmp_path
):
    merge(adapted, tmp_path / "plain", adapted.checkpoint("best"), trunk_only=True)
    plain = open_run(tmp_path / "plain")
    assert not plain.config.is_finetuning
    moved = plain.load_model(CPU).state_dict()
    assert moved.keys() == trained.newest().model().keys()
    trunk = open_predictor(adapted.path, CPU).model.trunk.state_dict()
    assert all(torch.equal(tensor, moved[name]) for name, tensor in trunk.items())
    export_huggingface(plain, tmp_path / "exported", plain.newest(), "next_token")
    again = task_settings("classification", epochs=1, base=str(plain.path))
    assert finetune(again, tmp_path / "again", recorder).scores["accuracy"] > 0.5


def test_what_is_not_fine_tuned_has_nothing_to_merge_and_what_is_must_be_merged_first(
    adapted, trained, task_settings, recorder, tmp_path
):
    with pytest.raises(UserError, match="is not fine-tuned: its weights are plain already"):
        merge(trained, tmp_path / "out", trained.newest())
    with pytest.raises(UserError, match="is itself fine-tuned: make it a plain run with kindling merge"):
        finetune(task_settings("classification", base=str(adapted.path)), tmp_path / "run", recorder)
