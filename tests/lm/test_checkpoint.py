from __future__ import annotations

import errno
import json
import os

import pytest
import safetensors.torch
import torch

from data_prep.errors import UserError
from lm import checkpoint

MODEL = {"a.weight": torch.arange(6, dtype=torch.float32).view(2, 3).T, "b": torch.tensor([1.5, float("nan")])}
OPTIMIZER = {"a.weight.momentum": torch.randn(3, 2), "b.step": torch.tensor(3.0)}


def save(folder, step: int, keep: int = 5, **state):
    return checkpoint.save(folder, step, MODEL, OPTIMIZER, {"data_fingerprint": "abc", **state}, keep)


def warnings_of(folder):
    told: list[str] = []
    return checkpoint.latest(folder, told.append), told


def test_what_is_saved_is_read_back_bit_for_bit(tmp_path):
    path = save(tmp_path, 42, interval={"steps": 2, "losses": {"next_token": 1 / 3}})
    assert path == tmp_path / "step_00000042"
    read = checkpoint.read(path)
    assert read.step == 42
    assert read.state["interval"] == {"steps": 2, "losses": {"next_token": 1 / 3}}
    for given, got in ((MODEL, read.model()), (OPTIMIZER, read.optimizer())):
        assert given.keys() == got.keys()
        for name in given:
            assert given[name].contiguous().numpy().tobytes() == got[name].numpy().tobytes()
            assert given[name].dtype == got[name].dtype


def test_a_checkpoint_holds_safetensors_and_json_only(tmp_path):
    path = save(tmp_path, 1)
    assert sorted(file.name for file in path.iterdir()) == ["model.safetensors", "optimizer.safetensors", "state.json"]
    json.loads((path / "state.json").read_text())
    with safetensors.safe_open(path / "model.safetensors", "pt") as file:
        assert set(file.keys()) == set(MODEL)


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", [cut_off, flip_a_bit, lambda path: path.unlink(), lambda path: path.write_bytes(b"")])
@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_taken(tmp_path, harm, name):
    save(tmp_path, 1)
    harm(save(tmp_path, 2) / name)
    with pytest.raises(UserError, match=rf"step_00000002.*{name}"):
        checkpoint.read(tmp_path / "step_00000002")
    newest, told = warnings_of(tmp_path)
    assert newest.step == 1
    assert len(told) == 1
    assert name in told[0]


@pytest.mark.parametrize("garbage", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"{}", b'{"format": 1}', b'{"format": 99}'])
def test_a_state_that_makes_no_sense_is_a_damaged_checkpoint(tmp_path, garbage):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.json").write_bytes(garbage)
    with pytest.raises(UserError, match="step_00000002"):
        checkpoint.read(tmp_path / "step_00000002")
    assert warnings_of(tmp_path)[0].step == 1


def test_a_missing_state_is_named(tmp_path):
    (save(tmp_path, 2) / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json"):
        checkpoint.read(tmp_path / "step_00000002")


def test_when_all_are_damaged_there_is_nothing_to_go_on_from(tmp_path):
    for step in (1, 2):
        cut_off(save(tmp_path, step) / "model.safetensors")
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        checkpoint.latest(tmp_path, lambda message: None)


def test_where_there_is_none_there_is_none(tmp_path):
    assert warnings_of(tmp_path) == (None, [])
    assert warnings_of(tmp_path / "nowhere") == (None, [])


def test_the_newest_is_the_one_of_the_largest_step_and_only_so_many_are_kept(tmp_path):
    for step in (5, 30, 100, 99_999_999):
        save(tmp_path, step, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000100", "step_99999999"]
    assert warnings_of(tmp_path)[0].step == 99_999_999


def test_leftovers_of_a_killed_save_are_ignored_and_cleaned(tmp_path):
    save(tmp_path, 1)
    leftover = tmp_path / "step_00000002.tmp"
    leftover.mkdir()
    (leftover / "model.safetensors").write_bytes(b"half")
    newest, told = warnings_of(tmp_path)
    assert (newest.step, told) == (1, [])
    save(tmp_path, 2, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]
    newest, told = warnings_of(tmp_path)
    assert (newest.step, told) == (2, [])


def test_a_damaged_checkpoint_of_the_same_step_is_replaced(tmp_path):
    cut_off(save(tmp_path, 7) / "model.safetensors")
    save(tmp_path, 7)
    assert checkpoint.read(tmp_path / "step_00000007").step == 7


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), safetensors.SafetensorError("I/O error: disk full")]
)
def test_a_save_that_fails_leaves_the_old_checkpoints_as_they_are(tmp_path, monkeypatch, after, error):
    save(tmp_path, 1)
    writes = []

    def full(tensors, path):
        writes.append(path)
        if len(writes) > after:
            raise error
        safetensors.torch.save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"No space left|disk full"):
        save(tmp_path, 2, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001"]
    assert warnings_of(tmp_path)[0].step == 1


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_can_be_read_by_whom_the_umask_says(tmp_path, umask):
    before = os.umask(umask)
    try:
        path = save(tmp_path, 1)
    finally:
        os.umask(before)
    for file in path.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~umask


def _saved(tmp_path):
    return checkpoint.save(tmp_path, 2, {"a": torch.ones(2)}, {"b": torch.ones(2)}, {}, 5)


@pytest.mark.parametrize("change", [{"step": 3}, {"sha256": {}}, {"sha256": "x"}])
def test_a_state_that_contradicts_its_folder_is_damaged(tmp_path, change):
    path = _saved(tmp_path)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(state | change))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(path)


def test_leftovers_of_other_steps_are_cleaned_too(tmp_path):
    (tmp_path / "step_00000001.tmp").mkdir()
    _saved(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000002"]
