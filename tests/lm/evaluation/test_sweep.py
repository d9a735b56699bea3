from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from lm.config.settings import Config
from lm.config.sweep_axes import Axis, parse_axes
from lm.config.sweep_plan import Plan
from lm.evaluation import sweep
from lm.evaluation.sweep import JOURNAL, Sweep, check, value_of
from lm.runs.directory import open_run
from lm.training.pretraining import train
from tests.conftest import Recorder, StopAt

GRID = ("learning_rate=0.01,0.03", "weight_decay=0.1,0.3")


@pytest.fixture
def plan(small, tmp_path) -> Callable[..., Plan]:
    """A plan of a sweep of a small recipe: (*axes, **changes of the plan)."""
    small.save(tmp_path / "small.toml")

    def made(*axes: str, **changes) -> Plan:
        parsed = parse_axes(axes or GRID, {}, searching="trials" in changes)
        usual = {"settings": {}, "measure": "bits_per_byte", "out": tmp_path / "sweep"}
        return Plan(str(tmp_path / "small.toml"), axes=parsed, **{**usual, **changes})

    return made


class Pretend:
    """Stands for training: writes a run directory whose loss follows from the settings, and counts its calls.

    ``stop_at`` is a call that a kill ends before the run is done.
    """

    def __init__(self, stop_at: int = 0, loss: Callable[[Config], float] | None = None) -> None:
        self.trained: list[tuple[str, float, int]] = []
        self.stop_at = stop_at
        self.loss = loss or (lambda c: (c.optimizer.learning_rate - 0.02) ** 2 + c.optimizer.weight_decay / 10)

    def __call__(self, config: Config, path: Path) -> None:
        self.trained.append((path.name, config.optimizer.learning_rate, config.training.seed))
        path.mkdir(parents=True, exist_ok=True)
        config.save(path / "config.toml")
        if len(self.trained) == self.stop_at:
            raise KeyboardInterrupt
        loss = self.loss(config) + config.training.seed / 100
        groups = {name: {"nats_per_token": 1.0, "bits_per_byte": loss} for name in config.readouts}
        (path / "metrics.jsonl").write_text(json.dumps({"step": config.training.steps, "validation": groups}) + "\n")


def swept(plan: Plan, train, notes: list[str] | None = None) -> dict:
    opened = Sweep(plan)
    plan.out.mkdir(exist_ok=True)
    opened.run(train, (notes if notes is not None else []).append, lambda: None)
    return opened.table()


def values(table: dict) -> list[tuple[int, float | None]]:
    return [(row["point"], row["value"]) for row in table["points"]]


def test_each_point_of_a_grid_is_a_run_and_the_table_begins_with_the_best(plan):
    pretend = Pretend()
    table = swept(plan(), pretend)
    assert pretend.trained == [("001", 0.01, 0), ("002", 0.01, 0), ("003", 0.03, 0), ("004", 0.03, 0)]
    assert table["settings"] == ["learning_rate", "weight_decay"]
    assert table["points"][0] == {
        "point": 1,
        "runs": ["001"],
        "settings": {"learning_rate": 0.01, "weight_decay": 0.1},
        "value": pytest.approx(0.0101),
        "deviation": None,
        "status": "finished",
        "note": "",
    }
    assert [number for number, _ in values(table)] == [1, 3, 2, 4]
    assert open_run(plan().out / "004").config.optimizer.weight_decay == 0.3
    assert [number for number, _ in values(swept(plan(measure="next_token"), Pretend()))] == [1, 3, 2, 4]


def test_a_stopped_sweep_continues_with_the_run_that_was_training(plan):
    whole = swept(plan(), Pretend())
    stopped = plan(out=plan().out.with_name("stopped"))
    for last in (2, 2):
        with pytest.raises(KeyboardInterrupt):
            swept(stopped, Pretend(stop_at=last))
    pretend = Pretend()
    assert swept(stopped, pretend) == whole
    assert [name for name, *_ in pretend.trained] == ["003", "004"]
    assert swept(stopped, nothing := Pretend()) == whole
    assert nothing.trained == []


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_real_run_resumes_to_the_losses_of_one_that_was_left_alone(plan):
    few = {"settings": {"steps": 8, "checkpoint_every": 2, "validate_every": 4}}
    axes = "learning_rate=0.01,0.03"
    whole = swept(plan(axes, **few), lambda config, path: train(config, path, Recorder()))
    stopped = plan(axes, out=plan().out.with_name("stopped"), **few)
    for step in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            swept(stopped, lambda config, path, at=step: train(config, path, StopAt(at, interrupt)))
        assert not json.loads((stopped.out / JOURNAL).read_text())["points"][0]["outcomes"]
    assert swept(stopped, lambda config, path: train(config, path, Recorder())) == whole
    assert whole["points"][0]["value"] < whole["points"][1]["value"]


def test_a_point_that_fails_or_collapses_does_not_end_the_sweep(plan):
    def fails(config: Config, path: Path) -> None:
        Pretend()(config, path)
        if config.optimizer.learning_rate == 0.01:
            raise (UserError("too high\nby far") if config.optimizer.weight_decay == 0.1 else RuntimeError("no shape"))

    notes: list[str] = []
    table = swept(plan(), fails, notes)
    assert [(row["point"], row["status"], row["note"]) for row in table["points"]] == [
        (3, "finished", ""), (4, "finished", ""), (1, "failed", "too high; by far"),
        (2, "failed", "RuntimeError: no shape"),
    ]  # fmt: skip
    assert "point 1 failed, and the sweep continues: too high; by far" in notes
    assert swept(plan(), nothing := Pretend()) == table
    assert nothing.trained == []
    shutil.rmtree(plan().out / "001")
    assert swept(plan(), again := Pretend())["points"][0]["point"] == 1
    assert [name for name, *_ in again.trained] == ["001"]


def test_a_loss_that_is_not_finite_is_a_failure(plan):
    table = swept(plan(), Pretend(loss=lambda c: float("inf") if c.optimizer.learning_rate > 0.02 else 1.0))
    assert [row["status"] for row in table["points"]] == ["finished", "finished", "failed", "failed"]


def test_a_full_disk_ends_the_sweep(plan):
    def full(config: Config, path: Path) -> None:
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        swept(plan(), full)


def test_seeds_train_each_point_several_times_and_the_table_has_their_mean(plan):
    pretend = Pretend()
    table = swept(plan("learning_rate=0.01,0.03", seeds=[0, 2]), pretend)
    assert pretend.trained == [
        ("001", 0.01, 0), ("001-seed2", 0.01, 2), ("002", 0.03, 0), ("002-seed2", 0.03, 2)
    ]  # fmt: skip
    best = table["points"][0]
    assert best["runs"] == ["001", "001-seed2"]
    assert best["value"] == pytest.approx(0.0001 + 0.01 + 0.01)
    assert best["deviation"] == pytest.approx(0.02 / 2**0.5)
    assert swept(plan("learning_rate=0.01,0.03", seeds=[0]), nothing := Pretend())
    assert nothing.trained == []


def test_the_seed_can_be_an_axis(plan):
    pretend = Pretend()
    swept(plan("seed=3,4"), pretend)
    assert [(name, seed) for name, _, seed in pretend.trained] == [("001", 3), ("002", 4)]


def test_a_grid_grows(plan):
    swept(plan(), Pretend())
    pretend = Pretend()
    table = swept(plan("learning_rate=0.01,0.02", "weight_decay=0.1,0.3"), pretend)
    assert [name for name, *_ in pretend.trained] == ["005", "006"]
    assert [number for number, _ in values(table)] == [5, 1, 3, 6, 2, 4]


def test_another_sweep_in_the_same_folder_is_refused(plan, other_dataset):
    swept(plan(), Pretend())
    for other, reason in (
        (plan("learning_rate=0.01,0.03"), "--set learning_rate and weight_decay (now learning_rate)"),
        (plan(settings={"steps": 30}), "steps 20 (now 30)"),
        (plan(settings={"hidden_size": 64, "beta1": 0.5}), "hidden_size 32 (now 64), beta1 0.9 (now 0.5)"),
        (plan(trials=4), "a grid (now a search)"),
    ):
        with pytest.raises(UserError, match="choose another --out") as error:
            Sweep(other)
        assert f"was begun with {reason}" in str(error.value)
    assert Sweep(plan(settings={"threads": 2, "log_every": 5})).points
    journal = plan().out / JOURNAL
    saved = json.loads(journal.read_text())
    saved["data"] = dict.fromkeys(saved["data"], "other")
    journal.write_text(json.dumps(saved))
    with pytest.raises(UserError, match="has changed since"):
        Sweep(plan())


def test_a_lost_journal_is_found_again_from_the_runs_and_a_damaged_one_is_reported(plan, tmp_path):
    whole = swept(plan(), Pretend())
    journal = plan().out / JOURNAL
    journal.unlink()
    assert swept(plan(), Pretend()) == whole
    journal.write_text(journal.read_text()[:-20])
    with pytest.raises(UserError, match="is damaged: remove it"):
        Sweep(plan())
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match="is not empty and holds no sweep"):
        Sweep(plan(out=tmp_path / "other"))


def problems_of(asked: Plan) -> list[str]:
    with pytest.raises(UserError) as error:
        check(asked)
    return str(error.value).splitlines()


def test_every_point_is_checked_before_the_first_one_starts(plan, dataset, byte_dataset):
    data, other = dataset.directory.as_posix(), byte_dataset.directory.as_posix()
    assert check(plan(f"data={data},{other}", measure="")) == "bits_per_byte"
    first, second, *_ = problems_of(plan("hidden_size=32,33,35", "num_heads=2,4", "context_length=32,48"))
    assert first == "batch_tokens 256 is not a multiple of context_length 48: the nearest is 240 (at " + (
        "hidden_size 32, num_heads 2, context_length 48 and 5 other points)"
    )
    assert second == "hidden_size 33 is not divisible by num_heads 2: change one of them, or set head_size (at " + (
        "hidden_size 33, num_heads 2, context_length 32 and 1 other point)"
    )
    assert problems_of(plan("seed=" + ",".join(map(str, range(1001))))) == [
        "these values make 1,001 combinations, and at most 1,000 are tried: name fewer values, or search with "
        "--trials N"
    ]


def test_every_point_is_checked_against_its_data(plan, dataset):
    missing, long = problems_of(
        plan("context_length=32,65536", f"data={dataset.directory},nowhere", settings={"batch_tokens": 65536})
    )
    assert long.startswith("context_length 65536 is longer than the training text")
    assert long.endswith(f"(at context_length 65536, data {dataset.directory.as_posix()})")
    assert "nowhere" in missing
    assert missing.endswith("(at context_length 32, data nowhere and 1 other point)")


def test_every_device_and_tracker_is_checked(plan, monkeypatch):
    def absent(what: Any) -> None:
        if what in ("mps", ("wandb",)):
            raise UserError(f"there is no {what}")

    monkeypatch.setattr(sweep, "choose_device", absent)
    assert problems_of(plan("device=cpu,mps")) == ["there is no mps (at device mps)"]
    monkeypatch.setattr(sweep.trackers, "require", absent)
    assert problems_of(plan("trackers=tensorboard,wandb")) == ["there is no ('wandb',) (at trackers wandb)"]


def test_data_without_a_validation_split_is_refused(plan, text_folder, make_dataset, tmp_path):
    data = make_dataset(text_folder, tmp_path / "data", tokenizer_kind="bytes", validation_fraction=0.0)
    with pytest.raises(UserError, match="has no validation split to compare runs by"):
        check(plan(settings={"data": str(data.directory)}))


@pytest.mark.parametrize(
    ("axis", "wanted", "found"),
    [
        ("mask_rate=0.2,0.3", "masked_next_token", "masked_next_token"),
        ("objective=next_token,hybrid", "next_token", "next_token"),
        ("objective=next_token,hybrid", "", "name what to compare: --measure next_token"),
        ("objective=next_token,hybrid", "bits_per_byte", "does not suit these points: choose next_token"),
        ("objective=next_token,masked_token", "", "no measure in common"),
        ('objective="hybrid:0.5,simclr:0.5"', "loss", "loss"),
        ('objective=hybrid,"hybrid:0.5,simclr:0.5"', "masked_next_token", "masked_next_token"),
        ("objective=simclr", "loss", "loss"),
        ("objective=simclr,byol", "", "no measure in common"),
        ("mask_rate=0.2,0.3", "knn_accuracy", "choose bits_per_byte or next_token or masked_next_token"),
    ],
)
def test_the_measure_suits_all_points(plan, axis, wanted, found):
    asked = plan(axis, measure=wanted, settings={"view_tokens": 16})
    if found == wanted:
        assert check(asked) == found
    else:
        with pytest.raises(UserError, match=found):
            check(asked)


def test_images_are_judged_by_their_classes_and_a_collapsed_point_comes_last(plan, seeing, pictures, tmp_path):
    seeing.replace(data=(str(pictures.directory),), steps=200).save(tmp_path / "seeing.toml")
    images = replace(plan("learning_rate=0.01,0.03"), recipe=str(tmp_path / "seeing.toml"))
    assert check(replace(images, measure="")) == "knn_accuracy"
    assert check(replace(images, measure="loss")) == "loss"
    with pytest.raises(UserError, match="choose knn_accuracy"):
        check(replace(images, axes=[Axis("objective", ("simclr", "byol"))], measure="loss"))

    def pretend(config: Config, path: Path) -> None:
        Pretend()(config, path)
        alive = config.optimizer.learning_rate > 0.02
        found = {"loss": 1.0 if alive else 0.0, "images": 8, "spread": 0.9 if alive else 0.0, "effective_rank": 3.0}
        line = {"step": 200, "validation": {"simclr": found | {"knn_accuracy": config.optimizer.learning_rate}}}
        (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    table = swept(replace(images, measure="loss"), pretend)
    assert [(row["point"], row["status"]) for row in table["points"]] == [(2, "finished"), (1, "collapsed")]
    assert "the model has collapsed at step 200" in table["points"][1]["note"]
    better = swept(replace(images, measure="knn_accuracy", axes=[Axis("learning_rate", (0.03, 0.04))]), pretend)
    assert [(row["point"], row["value"]) for row in better["points"]] == [(3, 0.04), (2, 0.03), (1, None)]


def test_the_value_of_a_validation_is_a_mean_or_that_of_a_readout():
    groups = {"next_token": {"bits_per_byte": 2.0}, "masked_token": {"bits_per_byte": 1.0}}
    assert value_of(groups, "bits_per_byte") == 1.5
    assert value_of(groups, "masked_token") == 1.0
    assert value_of(groups | {"simclr": {"loss": 3.0}}, "bits_per_byte") == 1.5
    assert value_of(groups | {"simclr": {"loss": 3.0}}, "loss") == 3.0
