from __future__ import annotations

import json

import pytest

from lm.runs.metrics_log import MetricsLog
from lm.serve import metrics_tail
from lm.serve.metrics_tail import read_tail


def line(step: int) -> dict[str, float]:
    return {"step": step, "loss": 1 / (step + 1)}


def test_new_lines_are_returned_and_half_a_line_waits(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_tail(path, "", 0)["lines"] == []
    log = MetricsLog(path, 0)
    log.write(line(1))
    first = read_tail(path, "", 0)
    assert (first["lines"], first["whole"], first["more"]) == ([line(1)], True, False)
    log.write(line(2))
    with path.open("a") as file:
        file.write('{"step": 3, ')
    second = read_tail(path, first["file"], first["next"])
    assert (second["lines"], second["whole"]) == ([line(2)], False)
    with path.open("a") as file:
        file.write('"loss": 5}\n')
    assert read_tail(path, second["file"], second["next"])["lines"] == [{"step": 3, "loss": 5}]


@pytest.mark.parametrize("more", [1, 20])
def test_a_truncated_file_is_read_from_its_beginning(tmp_path, more):
    """Whether it is still shorter or longer again."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write(line(step))
    first = read_tail(path, "", 0)
    log.go_back(1)
    for step in range(7, 7 + more):
        log.write(line(step))
    second = read_tail(path, first["file"], first["next"])
    assert (second["lines"], second["whole"]) == ([line(1), *map(line, range(7, 7 + more))], True)


def test_the_parts_of_a_long_file_make_up_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics_tail, "READ_AT_ONCE", 100)
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(line(step)) + "\n" for step in range(50)))
    lines, file, start, more = [], "", 0, True
    while more:
        part = read_tail(path, file, start)
        lines += part["lines"]
        file, start, more = part["file"], part["next"], part["more"]
    assert lines == [line(step) for step in range(50)]


def test_nan_becomes_none_and_invalid_lines_are_skipped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": NaN}\nbroken\n[1]\n{"step": 2}\n')
    assert read_tail(path, "", 0)["lines"] == [{"step": 1, "loss": None}, {"step": 2}]
