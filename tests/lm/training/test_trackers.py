from __future__ import annotations

import importlib.machinery
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from data_prep.errors import UserError
from lm.runs.metrics_log import MetricsLog
from lm.training import trackers
from lm.training.pretraining import train
from lm.training.trackers import open_trackers, require, values_of
from tests.conftest import StopAt

ROOT = Path(__file__).parents[3]
LOSS = {"step": 10, "tokens": 2560, "epoch": 0.5, "loss": 3.0, "gradient_norm": 1.5, "tokens_per_second": 100.0}
VALIDATION = {
    "step": 10,
    "validation": {"next_token": {"nats_per_token": 2.5, "bits_per_byte": 1.25, "predicted": 7}},
    "rows": {"taken": 8, "of": 20},
}
EVENT = {"step": 11, "event": "skip", "rate": 1.0, "reason": "loss 9.000, gradient norm 3"}


class Account:
    """A stand-in for the module of a hosted tracker: keeps what ``init`` and each run's ``log`` were given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.opened: list[dict[str, Any]] = []
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.finished = 0
        self.fails_at: int | None = None
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="here")
        module.init, module.finish = self._init, self._finish  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)

    def _init(self, **arguments: Any) -> SimpleNamespace:
        print("a word of the tracker's own")
        self.opened.append(arguments)
        return SimpleNamespace(log=self._log, finish=self._finish)

    def _log(self, values: dict[str, Any], step: int) -> None:
        if step == self.fails_at:
            raise ConnectionError("the network is gone\nand more")
        self.logged.append((step, values))

    def _finish(self) -> None:
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def hosted(request, monkeypatch) -> tuple[str, Account]:
    return request.param, Account(monkeypatch, request.param)


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The scalars of a run as TensorBoard itself reads them: tag → (step, value)."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator").EventAccumulator(
        str(run / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
    )
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)] for tag in accumulator.Tags()["scalars"]
    }


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from metrics.jsonl, by a reading of its own."""
    found = defaultdict(list)
    for text in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        line = json.loads(text)
        step = line.pop("step")
        if "loss" in line:
            for name, value in line.items():
                found[f"train/{name}"].append((step, value))
        for readout, loss in line.get("validation", {}).items():
            found[f"validation/{readout}/nats_per_token"].append((step, loss["nats_per_token"]))
            found[f"validation/{readout}/bits_per_byte"].append((step, loss["bits_per_byte"]))
        if "event" in line:
            found["event/rate"].append((step, line["rate"]))
    return found


def assert_same(run: Path) -> None:
    """TensorBoard shows what is in the file, no step missing and none twice (its numbers are float32)."""
    shown, wanted = scalars(run), expected(run)
    assert shown.keys() == wanted.keys()
    for tag, points in wanted.items():
        assert [step for step, _ in shown[tag]] == [step for step, _ in points], tag
        assert [value for _, value in shown[tag]] == pytest.approx([value for _, value in points], rel=1e-6), tag


@pytest.fixture
def tracked(small):
    pytest.importorskip("tensorboard")
    return small.replace(trackers=("tensorboard",), steps=12, log_every=2, validate_every=4, checkpoint_every=4)


def test_values_have_the_names_that_a_tracker_shows():
    assert values_of(LOSS) == {
        "train/tokens": 2560,
        "train/epoch": 0.5,
        "train/loss": 3.0,
        "train/gradient_norm": 1.5,
        "train/tokens_per_second": 100.0,
    }
    assert values_of(VALIDATION) == {
        "validation/next_token/nats_per_token": 2.5,
        "validation/next_token/bits_per_byte": 1.25,
    }
    assert values_of(EVENT) == {"event/what": "skip: loss 9.000, gradient norm 3", "event/rate": 1.0}
    assert values_of({"step": 3, "validation": {}}) == {}
    both = {"step": 3, "metrics": {"loss": 2.0}, "average": {"metrics": {"loss": 1.0}}}
    assert values_of(both) == {"validation/loss": 2.0, "average/validation/loss": 1.0}


def test_tensorboard_shows_what_is_in_the_file(tracked, quietly, tmp_path):
    quietly(tracked, tmp_path / "run")
    assert_same(tmp_path / "run")
    assert len(scalars(tmp_path / "run")["train/loss"]) == 6


def test_a_continued_run_goes_on_in_the_same_log_without_repeating_steps(tracked, quietly, tmp_path):
    """Killed after step 7, the file and the log are ahead of the newest checkpoint, which is of step 4."""

    with pytest.raises(InterruptedError):
        train(tracked, tmp_path / "run", StopAt(7))
    assert [step for step, _ in scalars(tmp_path / "run")["train/loss"]] == [2, 4, 6]
    quietly(tracked, tmp_path / "run")
    assert_same(tmp_path / "run")
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2


def test_steps_that_were_taken_back_are_gone_from_tensorboard(tracked, tmp_path):
    (tmp_path / "run").mkdir()
    followers = open_trackers(tracked, tmp_path / "run", 0, pytest.fail)
    with MetricsLog(tmp_path / "run" / "metrics.jsonl", 0, followers) as log:
        for step in (2, 4, 6):
            log.write(LOSS | {"step": step, "loss": float(step)})
        log.go_back(4)
        log.write(EVENT | {"step": 5, "event": "roll_back", "rate": 0.5})
        log.write(LOSS | {"step": 6, "loss": 60.0})
    assert_same(tmp_path / "run")
    assert scalars(tmp_path / "run")["train/loss"][-1] == (6, 60.0)


def test_a_tracker_asked_for_later_is_given_what_was_before(tracked, quietly, tmp_path):
    quietly(tracked.replace(trackers=(), steps=8), tmp_path / "run")
    quietly(tracked, tmp_path / "run")
    assert_same(tmp_path / "run")


def test_a_hosted_tracker_gets_each_line_once_with_the_same_name_in_every_session(
    small, hosted, tmp_path, capsys, monkeypatch
):
    name, account = hosted
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    monkeypatch.delenv("TRACKIO_PROJECT", raising=False)
    path, config = tmp_path / "run", small.replace(trackers=(name, name))
    path.mkdir()

    def session(start: int, steps: range) -> None:
        with MetricsLog(path / "metrics.jsonl", start, open_trackers(config, path, start, pytest.fail)) as log:
            for step in steps:
                log.write(LOSS | {"step": step})
                if step % 4 == 0:
                    log.write(VALIDATION | {"step": step})

    session(0, range(1, 7))
    session(4, range(5, 9))
    first, second = account.opened
    assert first == second
    assert first["resume"] == "allow"
    assert first["project"] == "kindling"
    assert first["config"]["hidden_size"] == 32
    assert json.dumps(first["config"])
    assert account.finished == 2
    losses = [step for step, values in account.logged if "train/loss" in values]
    assert losses == list(range(1, 9))
    assert [step for step, values in account.logged if "validation/next_token/bits_per_byte" in values] == [4, 8]
    captured = capsys.readouterr()
    assert captured.out == ""  # which belongs to the command's own answer
    assert "a word of the tracker's own" in captured.err


def test_a_hosted_trackers_steps_only_rise_when_a_run_goes_back(small, hosted, tmp_path):
    name, account = hosted
    followers = open_trackers(small.replace(trackers=(name,)), tmp_path, 0, pytest.fail)
    with MetricsLog(tmp_path / "metrics.jsonl", 0, followers) as log:
        for step in (2, 4, 6):
            log.write(LOSS | {"step": step})
        log.go_back(2)
        log.write(EVENT | {"step": 3, "event": "roll_back", "rate": 0.5})
        for step in (4, 6, 8):
            log.write(LOSS | {"step": step})
    assert [step for step, values in account.logged if "train/loss" in values] == [2, 4, 6, 8]
    assert [step for step, values in account.logged if "event/what" in values] == [6]


def test_a_tracker_that_fails_is_told_of_once_and_the_run_goes_on(small, hosted, recorder, tmp_path):
    name, account = hosted
    account.fails_at = 10
    run = train(small.replace(trackers=(name,), log_every=5), tmp_path / "run", recorder)
    assert run.latest().step == 20
    (told,) = [note for note in recorder.notes if name in note]
    assert "(the network is gone) and is no longer used" in told
    assert {step for step, _ in account.logged} == {5}
    assert [line["step"] for line in run.metrics() if "loss" in line] == [5, 10, 15, 20]


def test_a_tracker_that_cannot_be_opened_is_left_out_and_may_come_later(small, monkeypatch, recorder, tmp_path):
    account = Account(monkeypatch, "wandb")
    working = sys.modules["wandb"].init

    def refuse(**_: Any) -> None:
        raise RuntimeError("")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    config = small.replace(trackers=("wandb",), steps=4, log_every=2)
    train(config, tmp_path / "run", recorder)
    assert any("the tracker wandb failed (RuntimeError)" in note for note in recorder.notes)
    assert not (tmp_path / "run" / "trackers.json").exists()
    monkeypatch.setattr(sys.modules["wandb"], "init", working)
    train(config.replace(steps=6), tmp_path / "run", recorder)
    assert [step for step, values in account.logged if "train/loss" in values] == [2, 4, 6]


def test_what_is_not_installed_is_told_before_anything_is_written(small, quietly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb").mkdir()  # what earlier runs of wandb leave is no module
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    find_spec = find_nothing_but_folders(tmp_path)
    monkeypatch.setattr(trackers, "importlib", SimpleNamespace(util=SimpleNamespace(find_spec=find_spec)))
    with pytest.raises(UserError) as refused:
        quietly(small.replace(trackers=("wandb", "trackio")), tmp_path / "run")
    assert str(refused.value).splitlines() == [
        f'the tracker {name} is not installed: pip install "kindling-lm[{name}]", or train without it'
        for name in ("wandb", "trackio")
    ]
    assert not (tmp_path / "run").exists()


def find_nothing_but_folders(folder: Path):
    """``find_spec`` on a machine without any tracker, in a directory that has a folder of a tracker's name."""
    return lambda name: importlib.machinery.PathFinder.find_spec(name, [str(folder)])


def test_the_name_of_each_extra_is_that_of_its_tracker():
    require(())
    setup = (ROOT / "setup.cfg").read_text(encoding="utf-8")
    for name in trackers.TRACKERS:
        assert f"\n{name} =\n" in setup


def test_trackers_are_only_imported_when_they_are_asked_for():
    code = (
        "import lm.cli.main, lm.training.trainer, sys;"
        "print([m for m in ('tensorboard', 'wandb', 'trackio') if m in sys.modules])"
    )
    told = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert told.stdout.strip() == "[]"


def test_a_damaged_file_of_identities_begins_new_ones(small, hosted, tmp_path):
    name, account = hosted
    for content in ("", "[1]", "{"):
        (tmp_path / "trackers.json").write_text(content)
        (follower,) = open_trackers(small.replace(trackers=(name,)), tmp_path, 0, pytest.fail)
        follower.close()
    assert account.finished == 3
    assert json.loads((tmp_path / "trackers.json").read_text()).keys() == {name}
