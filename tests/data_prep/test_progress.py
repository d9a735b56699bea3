from __future__ import annotations

import sys

import pytest

from data_prep.progress import ConsoleReporter, SilentReporter


def test_a_log_file_gets_plain_lines_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    reporter = ConsoleReporter()
    with reporter.stage("reading", 3_000_000) as advance:
        advance(1_000_000)
        advance(2_000_000)
    reporter.note("[bold] is text, not markup")
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.splitlines()
    assert lines[0].startswith("reading: 3.0 MB in ")
    assert lines[1] == "[bold] is text, not markup"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with ConsoleReporter().stage("reading", 100) as advance:
        advance(100)
    assert "\x1b[" in capsys.readouterr().err


def test_silence_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with SilentReporter().stage("reading", None) as advance:
        advance(5)
    SilentReporter().note("nothing")
    assert capsys.readouterr() == ("", "")
