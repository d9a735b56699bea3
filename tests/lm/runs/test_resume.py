"""A checkpoint records what it was trained with, and a mismatch is reported. (Settings: test_trainer.py.)"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_prep.errors import UserError
from lm.config.recipes import load_config
from lm.config.settings import Config
from lm.runs import resume
from lm.runs.directory import open_run
from lm.training.pretraining import train
from lm.training.train_module import TrainModule
from lm.training.trainer import fit


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
        "products": "float32",
        "threads": 1,
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def test_another_tokenizer_in_the_run_directory_is_reported_and_a_missing_one_restored(
    path, trained, byte_dataset, recorder
):
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
        (
            {"learning_rate": 0.5, "mask_rate": 0.4},
            "learning_rate 0.01 (now 0.5), mask_rate 0.3 (now 0.4): restore",
            False,
        ),
        ({"rope_theta": 99.0}, "rope_theta 10000.0 (now 99.0): restore it, or choose another --run", True),
    ],
)
def test_a_config_edited_by_hand_is_reported_setting_by_setting(path, trained, quietly, edit, words, fixed):
    edited = trained.config.replace(**edit)
    edited.save(path / "config.toml")
    before = (path / "config.toml").read_bytes()
    with pytest.raises(UserError) as refused:
        quietly(trained.config.replace(steps=101), path)
    assert "config.toml does not match its newest checkpoint, which was trained with" in str(refused.value)
    assert words in str(refused.value)
    assert ("--resume" in str(refused.value)) != fixed
    assert (path / "config.toml").read_bytes() == before
    run = quietly(trained.config.replace(steps=101), path, accept_changes=True)
    assert load_config(run.path / "config.toml") == trained.config.replace(steps=101)


def test_settings_that_may_change_may_be_edited(path, trained, quietly):
    trained.config.replace(steps=7, log_every=3).save(path / "config.toml")
    assert quietly(trained.config.replace(steps=101), path).newest().step == 101


def test_another_pytorch_or_number_of_threads_is_noted_and_the_run_resumes(path, trained, recorder, monkeypatch):
    version = torch.__version__
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    train(trained.config.replace(steps=101), path, recorder)
    told = [note for note in recorder.notes if note.startswith("trained so far")]
    assert told == [
        f"trained so far with PyTorch {version!r} (now '9.9.9'), threads 1 (now 7): results will match to rounding, "
        "not bit for bit"
    ]


def test_a_run_goes_on_with_as_many_threads_as_before_unless_the_settings_say_otherwise(
    path, trained, recorder, monkeypatch
):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)  # as if a container allowed more cores now
        train(trained.config.replace(steps=101), path, recorder)
        assert (torch.get_num_threads(), notes_of(recorder, "trained so far")) == (1, [])
        train(trained.config.replace(steps=102, threads=2), path, recorder)
        assert torch.get_num_threads() == 2
        assert len(notes_of(recorder, "trained so far with threads 1 (now 2)")) == 1
        torch.set_num_threads(1)
        monkeypatch.setattr(resume, "os", SimpleNamespace(cpu_count=lambda: 1))
        train(trained.config.replace(steps=103), path, recorder)
        assert torch.get_num_threads() == 1
        assert len(notes_of(recorder, "trained so far with threads 2 (now 1)")) == 1
    finally:
        torch.set_num_threads(before)


def notes_of(recorder, beginning: str) -> list[str]:
    return [note for note in recorder.notes if note.startswith(beginning)]


def test_where_nothing_has_changed_nothing_is_noted(path, trained, recorder):
    train(trained.config.replace(steps=101), path, recorder)
    assert not any("trained so far" in note for note in recorder.notes)


class Pixels:
    """A processor that is no tokenizer."""

    file_name = "processor.json"

    def __init__(self, size: int) -> None:
        self.text = json.dumps({"size": size})
        self.sha256 = hashlib.sha256(self.text.encode()).hexdigest()

    def save(self, path: Path) -> None:
        path.write_text(self.text)


class PixelRegression(TrainModule):
    """A ``TrainModule`` that learns to map pixels to zero."""

    name, fingerprint = "pixels", "of the pixels"

    def __init__(self, config: Config, size: int = 4) -> None:
        self.config, self.processor = config, Pixels(size)

    def prepare(self, done):
        return []

    def model(self):
        torch.manual_seed(0)
        return torch.nn.Linear(4, 1)

    def batch(self, step):
        return torch.full((2, 4), float(step))

    def gradients(self, model, batch, step):
        model.zero_grad()
        loss = model(batch).square().mean()
        loss.backward()
        return {"pixels": loss.detach()}, {"pixels": 1.0}

    def validate(self, model):
        return {"metrics": {"mse": 1.0}}, None

    def progress(self, steps):
        return {"tokens": steps, "epoch": 0.0}

    def throughput(self, seconds_per_step):
        return {"tokens_per_second": 1.0}


def test_a_run_may_have_a_processor_that_is_no_tokenizer(small, recorder, tmp_path):
    config, path = small.replace(steps=3), tmp_path / "run"

    def train_pixels(config: Config, size: int = 4) -> None:
        fit(lambda _: PixelRegression(config, size), config.training, path, recorder)

    train_pixels(config)
    run = open_run(path)
    saved = run.newest()
    assert (path / "processor.json").read_text() == '{"size": 4}'
    assert not (path / "tokenizer.json").exists()
    assert saved.state["processor_sha256"] == run.processor.sha256 == Pixels(4).sha256
    assert "tokenizer_sha256" not in saved.state
    run.refuse_another(saved)
    with pytest.raises(UserError, match=r"run has no tokenizer\.json: it cannot read or write text"):
        _ = run.tokenizer

    train_pixels(config.replace(steps=5))
    assert open_run(path).newest().step == 5

    Pixels(8).save(path / "processor.json")
    with pytest.raises(UserError, match=r"was trained with another processor than .*processor\.json"):
        open_run(path).refuse_another(saved)
    with pytest.raises(UserError, match=r"processor\.json is not the processor that .* was trained with: remove it"):
        train_pixels(config.replace(steps=6))
    (path / "processor.json").unlink()
    train_pixels(config.replace(steps=6))
    assert open_run(path).newest().step == 6
