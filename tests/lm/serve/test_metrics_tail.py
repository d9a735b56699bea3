from __future__ import annotations

import json

import pytest

from lm.runs.metrics_log import MetricsLog
from lm.serve import metrics_tail
from lm.serve.metrics_tail import metrics_from


def line(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / (step + 1)}


def test_what_was_added_since_is_told_and_half_a_line_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert metrics_from(path, "", 0)["lines"] == []
    log = MetricsLog(path, 0)
    log.write(line(1))
    first = metrics_from(path, "", 0)
    assert (first["lines"], first["whole"], first["more"]) == ([line(1)], True, False)
    log.write(line(2))
    with path.open("a") as file:
        file.write('{"step": 3, ')
    second = metrics_from(path, first["file"], first["next"])
    assert (second["lines"], second["whole"]) == ([line(2)], False)
    with path.open("a") as file:
        file.write('"loss": 5}\n')
    assert metrics_from(path, second["file"], second["next"])["lines"] == [{"step": 3, "loss": 5}]


@pytest.mark.parametrize("more", [1, 20])
def test_a_file_that_was_cut_back_is_told_from_its_beginning(tmp_path, more):
    """Whether it is shorter by now or longer again."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write(line(step))
    first = metrics_from(path, "", 0)
    log.go_back(1)
    for step in range(7, 7 + more):
        log.write(line(step))
    second = metrics_from(path, first["file"], first["next"])
    assert (second["lines"], second["whole"]) == ([line(1), *map(line, range(7, 7 + more))], True)


def test_a_long_file_comes_in_parts_that_are_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_tail, "READ_AT_ONCE", 100)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(step)) + "\n" for step in range(50)))
    lines, file, start, more = [], "", 0, True
    while more:
        part = metrics_from(path, file, start)
        lines += part["lines"]
        file, start, more = part["file"], part["next"], part["more"]
    assert lines == [line(step) for step in range(50)]


def test_what_json_has_not_is_none_and_what_is_no_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\nbroken\n[1]\n{"step": 2}\n')
    assert metrics_from(path, "", 0)["lines"] == [{"step": 1, "loss": None}, {"step": 2}]
