"""A checkpoint says what it was trained with, and what does not fit is told. (Settings: tests/lm/test_trainer.py.)"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from data_prep.errors import UserError
from lm.config.recipes import load_config
from lm.runs.directory import open_run
from lm.training.pretraining import train


@pytest.fixture
def path(trained, tmp_path) -> Path:
    return shutil.copytree(trained.path, tmp_path / "run")


def test_a_checkpoint_carries_what_its_weights_come_from(trained, dataset):
    state = trained.newest().state
    assert state["data_fingerprint"] == dataset.fingerprint
    assert state["tokenizer_sha256"] == dataset.tokenizer.sha256
    assert state["config"] == json.loads(json.dumps(trained.config.flat()))
    assert state["place"] == {
        "PyTorch": torch.__version__,
        "device": "cpu",
        "threads": 1,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def test_another_tokenizer_in_the_run_directory_is_told_and_none_is_mended(path, trained, byte_dataset, recorder):
    byte_dataset.tokenizer.save(path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is not the tokenizer that .* was trained with: remove it"):
        train(trained.config.replace(steps=101), path, recorder)
    assert recorder.lines == []
    (path / "tokenizer.json").unlink()
    train(trained.config.replace(steps=101), path, recorder)
    assert open_run(path).tokenizer.sha256 == trained.tokenizer.sha256


@pytest.mark.parametrize(
    ("edit", "words", "fixed"),
    [
        ({"learning_rate": 0.5, "mask_rate": 0.4}, "learning_rate 0.01 (now 0.5), mask_rate 0.3 (now 0.4): put", False),
        ({"rope_theta": 99.0}, "rope_theta 10000.0 (now 99.0): put it back, or choose another --run", True),
    ],
)
def test_a_config_edited_by_hand_is_told_setting_by_setting(path, trained, quietly, edit, words, fixed):
    edited = trained.config.replace(**edit)
    edited.save(path / "config.toml")
    before = (path / "config.toml").read_bytes()
    with pytest.raises(UserError) as refused:
        quietly(trained.config.replace(steps=101), path)
    assert "config.toml does not say what its newest checkpoint was trained with" in str(refused.value)
    assert words in str(refused.value)
    assert ("--resume" in str(refused.value)) != fixed
    assert (path / "config.toml").read_bytes() == before
    run = quietly(trained.config.replace(steps=101), path, accept_changes=True)
    assert load_config(run.path / "config.toml") == trained.config.replace(steps=101)


def test_settings_that_may_change_may_be_edited(path, trained, quietly):
    trained.config.replace(steps=7, log_every=3).save(path / "config.toml")
    assert quietly(trained.config.replace(steps=101), path).newest().step == 101


def test_another_pytorch_or_number_of_threads_is_noted_and_the_run_goes_on(path, trained, recorder, monkeypatch):
    version = torch.__version__
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    train(trained.config.replace(steps=101), path, recorder)
    told = [note for note in recorder.notes if note.startswith("trained so far")]
    assert told == [
        f"trained so far with PyTorch {version!r} (now '9.9.9'), threads 1 (now 7): it goes on, to rounding, not bit "
        "for bit, as it would have there"
    ]


def test_where_nothing_has_changed_nothing_is_noted(path, trained, recorder):
    train(trained.config.replace(steps=101), path, recorder)
    assert not any("trained so far" in note for note in recorder.notes)
