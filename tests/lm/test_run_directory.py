from __future__ import annotations

import json
import shutil

import pytest
import torch

from data_prep.errors import UserError
from lm.run_directory import choose_device, open_run


@pytest.fixture
def path(trained, tmp_path):
    return shutil.copytree(trained.path, tmp_path / "run")


def test_a_run_directory_is_all_that_a_model_needs(path, trained):
    run = open_run(str(path))
    assert run.config == trained.config
    assert run.tokenizer.sha256 == trained.tokenizer.sha256
    model = run.load_model(torch.device("cpu"))
    assert run.newest().step == 100
    assert not model.training
    newest = run.latest()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, newest.model()[name])


def test_what_is_no_run_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no run directory"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"is not a run directory: it has no config\.toml"):
        open_run(tmp_path)


def test_a_run_without_a_checkpoint_has_no_model(path):
    shutil.rmtree(path / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet: train it first"):
        open_run(path).load_model(torch.device("cpu"))


def test_a_damaged_newest_checkpoint_is_named_on_stderr_and_the_one_before_loaded(path, capsys):
    (path / "checkpoints" / "step_00000100" / "model.safetensors").write_bytes(b"")
    assert open_run(path).newest().step == 50
    warning = capsys.readouterr().err
    assert warning.startswith("warning: damaged checkpoint ")
    assert "step_00000100" in warning


def test_a_checkpoint_of_another_shape_is_refused_in_one_sentence(path):
    run = open_run(path)
    run.config.replace(num_layers=3).save(path / "config.toml")
    with pytest.raises(UserError, match=r"step_00000100 does not fit config\.toml") as caught:
        open_run(path).load_model(torch.device("cpu"))
    assert "\n" not in str(caught.value)


def test_a_last_line_of_metrics_that_was_cut_off_is_left_out(path):
    run = open_run(path)
    lines = list(run.metrics())
    assert [line["step"] for line in lines if "loss" in line] == list(range(10, 101, 10))
    with (path / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(lines[0])[:20])
    assert list(run.metrics()) == lines
    (path / "metrics.jsonl").unlink()
    assert list(run.metrics()) == []


def test_a_device_that_is_not_there_is_refused():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda", "mps")
    for name, there in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available())):
        if not there:
            with pytest.raises(UserError, match=f"device {name} was asked for"):
                choose_device(name)
