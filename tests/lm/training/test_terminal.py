"""Tests of ``lm.training.terminal``, named so that ``data_prep`` can have a ``test_progress.py`` too."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from lm.training import terminal
from lm.training.terminal import TerminalProgress

LINE = {"step": 10, "epoch": 0.125, "loss": 3.21449, "learning_rate": 0.002, "tokens_per_second": 12345.6}
VALIDATION = {"step": 10, "validation": {"next_token": {"nats_per_token": 2.5, "bits_per_byte": 1.25, "predicted": 7}}}


def told(capsys: pytest.CaptureFixture) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_without_a_terminal_there_are_plain_lines_on_stderr(capsys):
    reporter = TerminalProgress()
    reporter.note("[bold]as it is[/bold]")
    reporter.begin(0, 20)
    reporter.step(10)
    reporter.metrics(LINE)
    reporter.metrics(VALIDATION)
    reporter.metrics(LINE | {"step": 20})
    reporter.end()
    lines = told(capsys).splitlines()
    assert lines[0] == "[bold]as it is[/bold]"
    assert lines[1] == ("step     10/20  loss 3.214  epoch 0.12  12,346 tokens/s  learning rate 0.002  0:00:00 left")
    assert lines[2] == "step     10  validation: next_token 2.500 nats/token (1.250 bits/byte)"
    assert lines[3].startswith("step     20/20")
    assert not any("\x1b" in line for line in lines)


def test_lines_between_the_first_and_the_last_are_ten_seconds_apart(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    reporter = TerminalProgress()
    reporter.begin(0, 100)
    for step in range(1, 101):
        clock[0] += 3
        reporter.metrics(LINE | {"step": step})
    shown = [int(line.split()[1].split("/")[0]) for line in told(capsys).splitlines()]
    assert shown == [*range(1, 100, 4), 100]


def test_the_time_left_counts_only_steps_of_this_session(capsys, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(terminal, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    reporter = TerminalProgress()
    reporter.begin(50, 100)
    clock[0] += 600  # ten steps in ten minutes, forty to go
    reporter.metrics(LINE | {"step": 60})
    assert "0:40:00 left" in told(capsys)


def test_a_validation_without_text_says_so(capsys):
    TerminalProgress().metrics({"step": 3, "validation": {}})
    assert "the data has no validation split" in told(capsys)


@pytest.mark.parametrize(("taken", "words"), [(128, "128 of 1,024 rows"), (1024, "whole split")])
def test_a_validation_says_what_part_of_the_split_it_is_about(capsys, taken, words):
    TerminalProgress().metrics(VALIDATION | {"rows": {"taken": taken, "of": 1024}})
    assert f"validation, {words}: next_token 2.500" in told(capsys)


def test_the_share_of_peak_is_shown_where_it_is_known(capsys):
    reporter = TerminalProgress()
    reporter.begin(0, 10)
    reporter.metrics(LINE | {"share_of_peak": 0.413})
    assert "12,346 tokens/s  41% of peak  learning rate" in told(capsys)


def test_on_a_terminal_there_is_a_bar_with_the_loss():
    reporter = TerminalProgress()
    screen = io.StringIO()
    reporter.console = Console(file=screen, force_terminal=True, width=160, highlight=False)
    reporter.bar.live.console = reporter.console
    reporter.begin(0, 20)
    reporter.metrics(LINE)
    reporter.step(11)
    reporter.metrics(VALIDATION)
    reporter.end()
    assert "11/20" in screen.getvalue()
    assert "loss 3.214 · epoch 0.12 · 12,346 tokens/s" in screen.getvalue()
    assert "next_token 2.500 nats/token" in screen.getvalue()


def test_a_narrow_terminal_loses_no_number():
    reporter = TerminalProgress()
    screen = io.StringIO()
    reporter.console = Console(file=screen, force_terminal=True, width=80, highlight=False)
    reporter.bar.live.console = reporter.console
    reporter.begin(0, 40_000)
    reporter.metrics(LINE | {"step": 12_000, "tokens_per_second": 1_210_638.0, "share_of_peak": 0.41})
    reporter.end()
    assert "…" not in screen.getvalue()
    for number in ("12000/40000", "loss 3.214", "epoch 0.12", "1,210,638", "41%"):
        assert number in screen.getvalue()
