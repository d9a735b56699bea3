from __future__ import annotations

import json

import pytest
import torch

from lm.metrics import Interval, MetricsLog, read


def test_an_interval_holds_means_over_its_steps():
    interval = Interval()
    interval.add({"a": torch.tensor(1.0), "b": torch.tensor(4.0)}, {"a": 0.25, "b": 0.75}, torch.tensor(2.0))
    interval.add({"a": torch.tensor(3.0)}, {"a": 1.0}, torch.tensor(4.0))
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
