from __future__ import annotations

import threading

import pytest
import torch

from lm.runs import checkpoint
from lm.runs.checkpoint import Retention
from lm.runs.checkpoint_writer import CheckpointWriter, snapshot


def weights(value: float) -> dict[str, torch.Tensor]:
    return {"a": torch.full((4, 3), value)}


def save(writer: CheckpointWriter, step: int, model: dict[str, torch.Tensor] | None = None) -> None:
    writer.save(step, model or weights(step), weights(-step), {"note": step}, scheduled=True, best_step=0)


def make(folder, first=lambda: None, step: int = 0) -> CheckpointWriter:
    return CheckpointWriter(folder, Retention(2), step, first)


def test_a_snapshot_is_contiguous_and_does_not_follow_what_it_was_taken_from():
    whole = torch.arange(12.0).view(3, 4)
    parameter = torch.nn.Parameter(whole.T)
    taken = snapshot({"view": whole[1], "turned": parameter, "number": torch.tensor(3)})
    before = {name: tensor.clone() for name, tensor in taken.items()}
    whole.zero_()
    for name, tensor in taken.items():
        assert torch.equal(tensor, before[name])
        assert tensor.is_contiguous()
        assert not tensor.requires_grad
    assert taken["turned"].tolist() == torch.arange(12.0).view(3, 4).T.tolist()
    assert len({tensor.untyped_storage().data_ptr() for tensor in taken.values()}) == 3


def test_a_save_returns_before_it_is_written_and_holds_the_weights_of_its_moment(tmp_path):
    go_on = threading.Event()
    model = weights(1.0)
    with make(tmp_path, first=lambda: go_on.wait(120)) as writer:
        save(writer, 1, model)
        model["a"].fill_(99)  # training goes on
        assert checkpoint.steps(tmp_path) == []
        writer.check()
        go_on.set()
        writer.wait()
        assert checkpoint.steps(tmp_path) == [1]
    saved = checkpoint.of_step(tmp_path, 1)
    assert torch.equal(saved.model()["a"], weights(1.0)["a"])
    assert torch.equal(saved.optimizer()["a"], weights(-1.0)["a"])
    assert saved.state["note"] == 1


def test_the_state_of_an_objective_is_copied_and_written_with_the_rest(tmp_path):
    teacher = weights(5.0)
    with make(tmp_path) as writer:
        others = {checkpoint.OBJECTIVE: teacher}
        writer.save(1, weights(1), weights(-1), {}, scheduled=True, best_step=0, others=others)
        teacher["a"].fill_(99)
        writer.save(2, weights(2), weights(-2), {}, scheduled=True, best_step=0)
    first, second = (checkpoint.of_step(tmp_path, step) for step in (1, 2))
    assert torch.equal(first.objective()["a"], weights(5.0)["a"])
    assert second.objective() == {}
    assert not (second.path / "objective.safetensors").exists()


def test_a_second_save_waits_for_the_first_and_leaving_for_the_last(tmp_path):
    order = []
    with make(tmp_path, first=lambda: order.append(checkpoint.steps(tmp_path))) as writer:
        for step in (1, 2, 3):
            save(writer, step)
    assert order == [[], [1], [2, 1]]
    assert checkpoint.steps(tmp_path) == [3, 2]


def test_what_must_be_on_the_disk_first_is_there_before_the_checkpoint_or_it_is_not_written(tmp_path):
    def full() -> None:
        raise OSError("the log could not be written")

    with pytest.raises(OSError, match="the log"), make(tmp_path, first=full) as writer:
        save(writer, 1)
    assert checkpoint.steps(tmp_path) == []


@pytest.mark.parametrize("then", ["check", "wait", "save", "leave"])
def test_an_error_of_the_thread_is_raised_once_by_whatever_is_called_next(tmp_path, then):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OSError, match="the checkpoint of step 1 could not be written"), make(file) as writer:
        save(writer, 1)
        if then == "check":
            while not writer._pending.done():
                pass
            writer.check()
        elif then == "wait":
            writer.wait()
        elif then == "save":
            save(writer, 2)


def test_leaving_with_an_error_waits_for_what_is_being_written_and_keeps_that_error(tmp_path):
    with pytest.raises(KeyError, match="mine"), make(tmp_path) as writer:
        save(writer, 1)
        raise KeyError("mine")
    assert checkpoint.steps(tmp_path) == [1]


def test_what_a_kill_kept_from_being_removed_is_removed_when_the_run_goes_on(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, weights(step), weights(step), {})
    with make(tmp_path, step=3):
        assert checkpoint.steps(tmp_path) == [3, 2]
