from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from data_prep.errors import UserError
from data_prep.files import sha256_of_file
from lm.runs import checkpoint
from lm.runs.checkpoint import Retention
from lm.runs.checkpoint_writer import snapshot

MODEL = {"a.weight": torch.arange(6, dtype=torch.float32).view(2, 3).T, "b": torch.tensor([1.5, float("nan")])}
OPTIMIZER = {"a.weight.momentum": torch.randn(3, 2), "b.step": torch.tensor(3.0)}


def save(folder, step: int, *, scheduled: bool = True, best_step: int = 0, **state):
    tensors = (snapshot(MODEL), snapshot(OPTIMIZER))
    return checkpoint.save(folder, step, *tensors, state, scheduled=scheduled, best_step=best_step)


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


def test_an_objective_with_a_state_has_a_file_of_its_own_which_is_verified_too(tmp_path):
    assert checkpoint.read(save(tmp_path, 1)).objective() == {}
    teacher = {"teacher.weight": torch.randn(2, 3)}
    path = checkpoint.save(
        tmp_path, 2, snapshot(MODEL), snapshot(OPTIMIZER), {}, others={checkpoint.OBJECTIVE: teacher}
    )
    read = checkpoint.read(path)
    assert sorted(read.state["sha256"]) == ["model.safetensors", "objective.safetensors", "optimizer.safetensors"]
    assert read.objective().keys() == teacher.keys()
    assert torch.equal(read.objective()["teacher.weight"], teacher["teacher.weight"])
    flip_a_bit(path / "objective.safetensors")
    with pytest.raises(UserError, match=r"step_00000002.*objective\.safetensors"):
        checkpoint.read(path)
    assert warnings_of(tmp_path)[0].step == 1


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


def test_the_newest_is_the_one_of_the_largest_step(tmp_path):
    for step in (5, 30, 100, 99_999_999, 100_000_000):
        save(tmp_path, step)
        assert warnings_of(tmp_path)[0].step == step
    assert checkpoint.steps(tmp_path) == [100_000_000, 99_999_999, 100, 30, 5]


def saved_one_after_another(folder, keep, *saves):
    """Save and tidy as a run does: each save is a step, or a step with what ``save`` is to be told of it."""
    for step, marks in ((one, {}) if isinstance(one, int) else one for one in saves):
        save(folder, step, **marks)
        checkpoint.tidy(folder, step, keep)
    assert sorted(path.name for path in folder.iterdir()) == [f"step_{s:08d}" for s in checkpoint.steps(folder)[::-1]]
    return checkpoint.steps(folder)


STOPPED = {"scheduled": False}


@pytest.mark.parametrize(
    ("keep", "saves", "kept"),
    [
        (Retention(1), (5, 30, 100), [100]),
        (Retention(2), (5, 30, 100), [100, 30]),
        (Retention(1, every=20), (10, 20, 30, 40, 50), [50, 40, 20]),
        (Retention(1), (10, (20, {"best_step": 10}), (30, {"best_step": 10})), [30, 10]),
        (Retention(1), (10, (20, {"best_step": 10}), (30, {"best_step": 30})), [30]),
        # The best as an older one saw it, which may be gone back to, is kept as long as that one.
        (Retention(2), (10, (20, {"best_step": 10}), (30, {"best_step": 30})), [30, 20, 10]),
        # One that only a stop asked for is the newest, and then nothing.
        (Retention(2), (10, 20, (25, STOPPED)), [25, 20, 10]),
        (Retention(2), (10, 20, (25, STOPPED), (27, STOPPED)), [27, 20, 10]),
        (Retention(2), (10, 20, (25, STOPPED), 30), [30, 20]),
        (Retention(1, every=5), (10, (15, STOPPED), 20), [20, 10]),
        (Retention(1), ((15, STOPPED | {"best_step": 15}), (20, {"best_step": 15})), [20, 15]),
    ],
)
def test_what_is_kept(tmp_path, keep, saves, kept):
    assert saved_one_after_another(tmp_path, keep, *saves) == kept


def test_damaged_ones_do_not_push_out_good_ones(tmp_path):
    for step in (10, 20, 30, 40):
        save(tmp_path, step)
    (tmp_path / "step_00000020" / "state.json").unlink()
    cut_off(tmp_path / "step_00000040" / "state.json")  # later than the one that is gone on from
    checkpoint.tidy(tmp_path, 30, Retention(2))
    assert checkpoint.steps(tmp_path) == [40, 30, 10]


def test_a_run_goes_back_to_scheduled_checkpoints_only(tmp_path):
    def target(before=None):
        found = checkpoint.to_go_back_to(tmp_path, pytest.fail, before)
        return found and found.step

    assert target() is None
    save(tmp_path, 5, scheduled=False)
    assert target() is None
    for step, scheduled in ((10, True), (20, True), (25, False)):
        save(tmp_path, step, scheduled=scheduled)
    assert [target(), target(25), target(20), target(10), target(3)] == [20, 20, 10, 10, 10]
    checkpoint.remove_after(tmp_path, 10)
    assert checkpoint.steps(tmp_path) == [10, 5]


def test_a_checkpoint_is_asked_for_by_its_step(tmp_path):
    save(tmp_path, 7, best_step=3)
    assert checkpoint.of_step(tmp_path, 7).best_step == 3
    with pytest.raises(UserError, match="step_00000008"):
        checkpoint.of_step(tmp_path, 8)


def test_files_that_have_not_changed_are_verified_once(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(checkpoint, "sha256_of_file", lambda path: read.append(path.name) or sha256_of_file(path))
    path = save(tmp_path, 1)
    read.clear()
    for _ in range(3):
        checkpoint.read(path).state.clear()  # what one reader does with a state is not what the next one gets
    assert read == ["model.safetensors", "optimizer.safetensors"]
    flip_a_bit(path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        checkpoint.read(path)


def test_leftovers_of_a_killed_save_are_ignored_and_cleaned(tmp_path):
    save(tmp_path, 1)
    for name in ("step_00000002.tmp", "step_00000000.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    newest, told = warnings_of(tmp_path)
    assert (newest.step, told) == (1, [])
    save(tmp_path, 2)
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

    def full(tensors, path, metadata):
        writes.append(path)
        if len(writes) > after:
            raise error
        safetensors.torch.save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"the checkpoint of step 2 could not be written \(.*(No space left|disk full)"):
        save(tmp_path, 2)
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


KILLED_AT = """
import os, signal, sys
from pathlib import Path
import torch
from lm.runs import checkpoint

def tensors(step):
    return {"a": torch.full((50,), float(step))}, {"b": torch.full((70,), float(step))}

def save(folder, step):
    checkpoint.save(folder, step, *tensors(step), {})
    checkpoint.tidy(folder, step, checkpoint.Retention(1))

moments = 0
def count(event, arguments):
    global moments
    if event == "open" or event.startswith(("os.", "shutil.")):
        moments -= 1
        if moments == 0:
            os.kill(os.getpid(), signal.SIGKILL)

base, kill = Path(sys.argv[1]), 0
while True:
    kill += 1
    folder = base / str(kill)
    save(folder, 1)
    if os.fork() == 0:
        moments = kill
        sys.addaudithook(count)
        save(folder, 2)
        os._exit(0)
    status = os.wait()[1]
    whole = [checkpoint.read(path) for path in checkpoint._folders(folder)]
    for one in whole:
        model, optimizer = tensors(one.step)
        assert torch.equal(one.model()["a"], model["a"]) and torch.equal(one.optimizer()["b"], optimizer["b"])
    print(os.WIFSIGNALED(status), *[one.step for one in whole], flush=True)
    save(folder, 3)
    assert [path.name for path in folder.iterdir()] == ["step_00000003"], sorted(folder.iterdir())
    if not os.WIFSIGNALED(status):
        break
"""


def test_a_save_killed_before_any_of_its_file_operations_leaves_whole_checkpoints_only(tmp_path):
    """Each turn kills the save of step 2 one operation later, until it comes through."""
    done = subprocess.run([sys.executable, "-c", KILLED_AT, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    turns = [line.split(maxsplit=1) for line in done.stdout.splitlines()]
    assert [killed for killed, _ in turns] == ["True"] * (len(turns) - 1) + ["False"]
    left = [steps for _, steps in turns]
    assert len(turns) > 12
    assert list(dict.fromkeys(left)) == ["1", "2 1", "2"]  # the old one, then both, then the new one


def _saved(tmp_path):
    return checkpoint.save(tmp_path, 2, {"a": torch.ones(2)}, {"b": torch.ones(2)}, {})


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


def test_on_windows_no_tensor_is_a_map_of_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "WINDOWS", True)
    saved = checkpoint.read(save(tmp_path, 1))
    weights = saved.model()
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
    assert torch.equal(weights["a.weight"], MODEL["a.weight"])
    assert set(saved.optimizer()) == set(OPTIMIZER)
    monkeypatch.setattr(checkpoint, "WINDOWS", False)
    weights = saved.model()
    assert str(tmp_path) in Path("/proc/self/maps").read_text()  # which the test above would have seen


def test_on_windows_a_checkpoint_that_is_being_read_stays_until_the_next_save(tmp_path, monkeypatch):
    def rename_unless_read(path, target):
        if path.name == "step_00000001" and being_read:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        renamed(path, target)

    being_read, renamed = True, checkpoint.rename
    monkeypatch.setattr(checkpoint, "rename", rename_unless_read)
    for step in (1, 2):
        save(tmp_path, step)
    with pytest.raises(PermissionError):
        checkpoint.tidy(tmp_path, 2, Retention(1))
    monkeypatch.setattr(checkpoint, "WINDOWS", True)
    checkpoint.tidy(tmp_path, 2, Retention(1))
    assert checkpoint.steps(tmp_path) == [2, 1]
    being_read = False
    save(tmp_path, 3)
    checkpoint.tidy(tmp_path, 3, Retention(1))
    assert checkpoint.steps(tmp_path) == [3]
