from __future__ import annotations

import json
import shutil

import pytest
import torch

from data_prep.errors import UserError
from lm.model.device import choose_device
from lm.runs import checkpoint
from lm.runs.directory import open_run


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


@pytest.mark.parametrize("setting", [{"rope_theta": 99.0}, {"logit_softcap": 5.0}])
def test_a_model_setting_that_the_weights_do_not_show_is_checked_too(path, setting):
    open_run(path).config.replace(**setting).save(path / "config.toml")
    name, value = next(iter(setting.items()))
    with pytest.raises(UserError, match=rf"was trained with {name} .* \(config\.toml: {value}\)"):
        open_run(path).load_model(torch.device("cpu"))


def test_a_model_is_not_read_with_another_tokenizer(path, byte_dataset):
    byte_dataset.tokenizer.save(path / "tokenizer.json")
    with pytest.raises(UserError, match=r"was trained with another tokenizer than .*tokenizer\.json"):
        open_run(path).load_model(torch.device("cpu"))


def test_a_checkpoint_is_asked_for_by_name_or_step(path, trained):
    run = open_run(path)
    assert [run.checkpoint(which).step for which in ("newest", "100", "50", "0050")] == [100, 100, 50, 50]
    best = run.newest().best_step
    assert run.checkpoint("best").step == best
    for which, words in (
        ("75", r"has no checkpoint of step 75: available are 100, 50"),
        ("latest", r'there is no checkpoint "latest": choose newest, best, average, or the number of a step'),
        ("-1", r'there is no checkpoint "-1"'),
    ):
        with pytest.raises(UserError, match=words):
            run.checkpoint(which)
    (path / "checkpoints" / "step_00000050" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"damaged checkpoint .*step_00000050"):
        run.checkpoint("50")


def test_the_best_checkpoint_of_a_run_that_was_not_validated_is_its_newest_with_a_word(small, quietly, tmp_path):
    run = quietly(small.replace(steps=4, checkpoint_every=2), tmp_path / "run")
    assert run.checkpoint("best", pytest.fail).step == 4  # the last step is validated
    shutil.rmtree(run.path / "checkpoints" / "step_00000004")
    told: list[str] = []
    assert run.checkpoint("best", told.append).step == 2
    assert told == [f"{run.path} was not validated yet: using its newest checkpoint, step 2"]


def test_a_best_checkpoint_that_was_removed_is_told(small, quietly, tmp_path):
    run = quietly(small.replace(steps=6, checkpoint_every=2, validate_every=3), tmp_path / "run")
    state = run.path / "checkpoints" / "step_00000006" / "state.json"
    content = json.loads(state.read_text()) | {"best_step": 3}
    del content["state_sha256"]
    state.write_text(json.dumps(content | {"state_sha256": checkpoint._seal(content)}))
    shutil.rmtree(run.path / "checkpoints" / "step_00000003", ignore_errors=True)
    with pytest.raises(UserError, match="has no checkpoint of step 3, the best one: available are 6, 4"):
        run.checkpoint("best")


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
            with pytest.raises(UserError, match=f"the device {name} was requested"):
                choose_device(name)
