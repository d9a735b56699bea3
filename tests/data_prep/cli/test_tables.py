from __future__ import annotations

import sys

import click
import pytest

from data_prep.cli.tables import console, print_table


def test_a_file_gets_full_width_and_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "value"), [("x" * 300, "1"), ("[bold]y[/bold]", "12,345")], "[an explanation] " + "word " * 80)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["name", "value"]
    assert lines[1] == "x" * 300 + " " * 7 + "1"
    assert lines[2].startswith("[bold]y[/bold]") and lines[2].endswith(" 12,345")
    print_table(("name", "what"), [("a", "several words"), ("b", "one")])
    assert capsys.readouterr().out.splitlines()[2] == "b     one"
    assert lines[3].startswith("[an explanation] word") and len(lines) == 4


def test_a_narrow_terminal_wraps_names_and_keeps_numbers_whole(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "24")
    assert console().width == 24
    print_table(("name", "value"), [("a name of many words", "1,234,567")])
    shown = capsys.readouterr().out
    assert "1,234,567" in shown
    assert max(len(click.unstyle(line)) for line in shown.splitlines()) <= 24
