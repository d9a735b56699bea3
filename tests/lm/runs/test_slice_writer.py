"""Checkpoints in slices, written by ranks that are threads here."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from data_prep.errors import UserError
from lm.runs import checkpoint
from lm.runs.checkpoint import Retention
from lm.runs.checkpoint_writer import CheckpointWriter
from lm.runs.slice_writer import SliceWriter

WORLD = 3


class Thread:
    """A rank among ``WORLD`` threads."""

    world = WORLD

    def __init__(self, rank: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank, self._barrier, self._board = rank, barrier, board

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def exchanged(self, value: Any) -> list[Any]:
        self._board[self.rank] = value
        self._barrier.wait(60)
        found = list(self._board)
        self._barrier.wait(60)
        return found

    def on_main(self, work: Callable[[], Any]) -> Any:
        outcome = None
        if self.is_main:
            try:
                outcome = work()
            except (UserError, OSError) as error:
                outcome = error
        outcome = self.exchanged(outcome)[0]
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def whole(step: int) -> dict[str, torch.Tensor]:
    """Five rows in three slices (2, 2, 1), two rows in three (1, 1, 0), and two tensors that are not split."""
    draw = torch.Generator().manual_seed(step)
    shapes = {"five": (5, 3), "two": (2,), "scalar": (), "table": (4, 2)}
    return {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}


def slices(step: int, rank: int) -> dict[str, torch.Tensor]:
    tensors, first, rows = whole(step), {"five": 2, "two": 1}, {}
    for name, size in first.items():
        rows[name] = tensors[name][rank * size : (rank + 1) * size]
    return rows | ({name: tensors[name] for name in ("scalar", "table")} if rank == 0 else {})


def on_all(work: Callable[[SliceWriter, int], Any], folder: Path, step: int = 0, keep: int = 2) -> list[Any]:
    """What ``work`` returns or raises on each rank."""
    barrier, board = threading.Barrier(WORLD), [None] * WORLD

    def of(rank: int) -> Any:
        try:
            peers = Thread(rank, barrier, board)
            with SliceWriter(folder, Retention(keep), step, lambda: None, peers) as writer:
                return work(writer, rank)
        except Exception as error:
            return error

    with ThreadPoolExecutor(WORLD) as pool:
        return list(pool.map(of, range(WORLD)))


def save(writer: SliceWriter, rank: int, step: int, **more: Any) -> None:
    own = slices(step, rank)
    writer.save(step, own, {"five.momentum": own["five"] * 2}, {}, scheduled=True, best_step=0, **more)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of steps 1 to 4, of which the newest two are kept."""

    def work(writer: SliceWriter, rank: int) -> None:
        for step in range(1, 5):
            save(writer, rank, step, others={checkpoint.OBJECTIVE: {"center": slices(step, rank)["five"] + 1}})
            writer.check()

    assert on_all(work, tmp_path / "checkpoints") == [None] * WORLD
    return tmp_path / "checkpoints"


def test_slices_are_the_whole_tensors_and_older_ones_are_removed(folder):
    assert checkpoint.steps(folder) == [4, 3]
    assert not list(folder.glob("*.tmp"))
    saved, expected = checkpoint.latest(folder, pytest.fail), whole(4)
    found = saved.model()
    assert found.keys() == expected.keys()
    assert len(found) == len(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)
    assert "seven" not in found
    with pytest.raises(KeyError):
        found["seven"]
    assert torch.equal(saved.optimizer()["five.momentum"], expected["five"] * 2)
    assert torch.equal(saved.objective()["center"], expected["five"] + 1)
    names = {path.name for path in saved.path.iterdir()}
    assert len(names) == 3 * WORLD + 1
    assert "model-00002-of-00003.safetensors" in names
    assert saved.weights_sha256 != checkpoint.of_step(folder, 3).weights_sha256


def test_one_file_of_all_weights_is_that_of_a_checkpoint_of_one_process(folder, tmp_path):
    with CheckpointWriter(tmp_path / "one", Retention(1), 0, lambda: None) as writer:
        writer.save(4, whole(4), {}, {}, scheduled=True, best_step=0)
    one = checkpoint.latest(tmp_path / "one", pytest.fail)
    assert "slices" not in one.state
    assert one.state["format"] == 2
    joined = checkpoint.latest(folder, pytest.fail).weights_file()
    assert joined.read_bytes() == one.weights_file().read_bytes()
    assert checkpoint.latest(folder, pytest.fail).step == 4


@pytest.mark.parametrize("kind", ["model", "optimizer", "objective"])
@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "of another step"])
def test_a_damaged_slice_is_named_and_the_checkpoint_before_is_used(folder, kind, damage):
    name = f"{kind}-00003-of-00003.safetensors"
    file = folder / "step_00000004" / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[:-1])
    elif damage == "changed":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        shutil.copyfile(folder / "step_00000003" / name, file)
    messages: list[str] = []
    assert checkpoint.latest(folder, messages.append).step == 3
    assert name in messages[0]


def test_a_state_with_another_number_of_slices_is_damaged(folder):
    file = folder / "step_00000004" / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps({**state, "slices": 2}))
    with pytest.raises(UserError, match=r"state\.json does not match its checksum"):
        checkpoint.of_step(folder, 4)


def test_a_rank_that_cannot_write_ends_all_and_leaves_the_checkpoints_before(folder, monkeypatch):
    written = checkpoint.write

    def write(temporary: Path, files: dict[str, Any]) -> dict[str, str]:
        if any("00002-of" in name for name in files):
            raise OSError(28, "No space left on device")
        return written(temporary, files)

    monkeypatch.setattr(checkpoint, "write", write)
    ends = on_all(lambda writer, rank: save(writer, rank, 5), folder, step=4)
    assert all(isinstance(end, OSError) for end in ends)
    assert "the checkpoint of step 5 could not be written (No space left on device)" in str(ends[2])
    assert checkpoint.steps(folder) == [4, 3]
    assert not list(folder.glob("*.tmp"))


def test_what_killed_ranks_left_is_no_checkpoint_and_goes_with_the_next_save(folder):
    shutil.copytree(folder / "step_00000004", folder / "step_00000005.tmp")
    (folder / "step_00000005.tmp" / "state.json").unlink()
    assert checkpoint.latest(folder, pytest.fail).step == 4
    assert on_all(lambda writer, rank: save(writer, rank, 6), folder, step=4) == [None] * WORLD
    assert checkpoint.steps(folder) == [6, 4]
    assert not list(folder.glob("*.tmp"))


def test_a_slice_is_a_copy_that_no_later_step_changes(tmp_path):
    def work(writer: SliceWriter, rank: int) -> None:
        own = slices(1, rank)
        writer.save(1, own, {}, {}, scheduled=True, best_step=0)
        for tensor in own.values():
            tensor.zero_()

    assert on_all(work, tmp_path / "checkpoints") == [None] * WORLD
    found = checkpoint.latest(tmp_path / "checkpoints", pytest.fail).model()
    assert torch.equal(found["five"], whole(1)["five"])
