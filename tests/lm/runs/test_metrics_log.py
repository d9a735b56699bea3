from __future__ import annotations

import json
from typing import Any

import pytest

from lm.runs.metrics_log import (
    Interval,
    MetricsLog,
    best_validation,
    loss_of_readouts,
    overfitting,
    read,
    rows_validated,
    series,
    summary,
)


class Follower:
    """Keeps what it is told, in order."""

    def __init__(self, path) -> None:
        self.path, self.told = path, []

    def write(self, line: dict[str, Any]) -> None:
        assert json.loads(self.path.read_text().splitlines()[-1]) == line  # the file has it first
        self.told.append(line["step"])

    def go_back(self, step: int) -> None:
        self.told.append(f"back to {step}")

    def close(self) -> None:
        self.told.append("closed")


def validation(step: int, **losses: float) -> dict[str, Any]:
    told = {name: {"nats_per_token": loss, "bits_per_byte": loss / 2} for name, loss in losses.items()}
    return {"step": step, "validation": told}


def test_followers_are_given_what_goes_into_the_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    with MetricsLog(path, 0, [follower]) as log:
        for step in (1, 2, 3):
            log.write({"step": step})
        log.go_back(1)
        log.write({"step": 2, "event": "roll_back"})
    assert follower.told == [1, 2, 3, "back to 1", 2, "closed"]
    assert list(read(path)) == [{"step": 1}, {"step": 2, "event": "roll_back"}]


def test_followers_are_closed_when_the_run_fails(tmp_path):
    follower = Follower(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError), MetricsLog(follower.path, 0, [follower]):
        raise OSError("the disk is full")
    assert follower.told == ["closed"]


def test_each_objective_is_averaged_over_its_own_share_of_the_rows():
    interval = Interval()
    for masked in (0.25, 0.75):
        losses = {"next_token": 4.0 * (1 - masked), "masked_next_token": 2.0 * masked}
        interval.add(losses, {"next_token": 1 - masked, "masked_next_token": masked}, 1.0)
    assert interval.means() == pytest.approx(
        {"loss": 3.0, "loss_next_token": 4.0, "loss_masked_next_token": 2.0, "gradient_norm": 1.0}
    )


def test_the_best_validation_has_the_lowest_mean_over_its_readouts():
    lines = [
        {"step": 5, "loss": 1.0},
        validation(10, next_token=3.0, masked_next_token=4.0),
        validation(20, next_token=2.0, masked_next_token=4.0),
        validation(30, next_token=1.9, masked_next_token=4.1),
        validation(40, next_token=1.5, masked_next_token=5.0),
        {"step": 50, "validation": {}},
    ]
    assert best_validation(lines) == lines[2]
    assert loss_of_readouts(lines[1]) == 3.5
    assert loss_of_readouts(lines[-1]) is None
    assert best_validation(lines[-1:]) is None


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"rows": {"taken": 128, "of": 1024}}, "128 of 1,024 rows"),
        ({"rows": {"taken": 7, "of": 7}}, "whole split"),
        ({}, ""),
    ],
)
def test_what_a_validation_is_about_is_said_in_words(line, words):
    assert rows_validated(line) == words


def test_overfitting_is_told_after_three_validations_that_did_not_reach_the_best():
    lines = [validation(step, next_token=loss) for step, loss in ((10, 3.0), (20, 2.0), (30, 2.5), (40, 2.1))]
    assert overfitting(lines) == ""
    told = overfitting([*lines, validation(50, next_token=2.0)])
    assert told.startswith("The validation loss was lowest at step 20 and has not improved in 3 validations")
    assert overfitting([*lines, validation(50, next_token=1.9)]) == ""
    assert overfitting([]) == ""


def test_a_summary_has_the_last_place_median_speeds_and_the_most_memory():
    lines: list[dict[str, Any]] = [
        {"step": s, "tokens": 10 * s, "epoch": s / 10, "loss": 1.0, "tokens_per_second": speed, "memory_bytes": memory}
        for s, speed, memory in ((1, 5.0, 30), (2, 100.0, 50), (3, 7.0, 40))
    ]
    where = {"step": 3, "tokens": 30, "epoch": 0.3}
    assert summary([*lines, validation(4, next_token=1.0)]) == where | {"tokens_per_second": 7.0, "memory_bytes": 50}
    lines[0]["share_of_peak"], lines[1]["share_of_peak"], lines[2]["share_of_peak"] = 0.2, 0.4, None
    assert summary(lines)["share_of_peak"] == pytest.approx(0.3)
    assert summary([validation(4, next_token=1.0)]) == {}
    assert series(lines, "share_of_peak") == [(1, 0.2), (2, 0.4)]


def test_an_interval_holds_means_over_its_steps():
    interval = Interval()
    interval.add({"a": 1.0, "b": 4.0}, {"a": 0.25, "b": 0.75}, 2.0)
    interval.add({"a": 3.0}, {"a": 1.0}, 4.0)
    assert interval.means() == pytest.approx({"loss": 4.0, "loss_a": 3.2, "loss_b": 4 / 0.75, "gradient_norm": 3.0})
    interval.skipped = 2
    assert interval.means()["skipped"] == 2


def test_lines_after_the_step_are_dropped_and_those_before_it_stay(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "loss": 0.1 + 0.2}, {"step": 2, "event": "skip"}, {"step": 2, "loss": 1e-300}, {"step": 3}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 2, "lo')
    before = path.read_bytes()
    with MetricsLog(path, 2) as log:
        assert path.read_bytes() == before[: before.index(b'{"step": 3}')]
        log.write({"step": 3, "loss": 2.0})
        log.go_back(1)
        log.write({"step": 2, "loss": 5.0})
    assert list(read(path)) == [lines[0], {"step": 2, "loss": 5.0}]


@pytest.mark.parametrize("broken", ['{"step": 2, "lo', "[]", '{"loss": 1}', "\0\0"])
def test_reading_ends_before_a_line_that_is_broken(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{broken}\n{{"step": 3}}\n')
    assert list(read(path)) == [{"step": 1}]


def test_without_a_file_there_are_no_lines(tmp_path):
    assert list(read(tmp_path / "metrics.jsonl")) == []
