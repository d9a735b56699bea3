from __future__ import annotations

import os
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner, Result

from data_prep.cli.errors import FriendlyCommand, FriendlyGroup
from data_prep.errors import UserError


def run_with(error: BaseException, *, grouped: bool) -> Result:
    def fail() -> None:
        raise error

    if not grouped:
        return CliRunner().invoke(FriendlyCommand("fail", callback=fail))
    group = FriendlyGroup("main")
    group.command("fail")(fail)
    return CliRunner().invoke(group, ["fail"])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (UserError("no such thing: do this"), 2, "error: no such thing: do this\n"),
        (KeyboardInterrupt(), 130, "stopped\n"),
        (KeyboardInterrupt("stopped; again"), 130, "stopped; again\n"),
        (OSError(28, "No space left on device"), 1, "error: no space left on device\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, 'error: "/x": permission denied\n'),
        (ChildProcessError("a worker died"), 1, "error: a worker died\n"),
        (BrokenPipeError(32, "Broken pipe"), 1, ""),
    ],
)
def test_errors_become_a_line_and_a_status(error: BaseException, status: int, shown: str, grouped: bool) -> None:
    result = run_with(error, grouped=grouped)
    assert (result.exit_code, result.stderr, result.stdout) == (status, shown, "")


def test_a_bug_keeps_its_traceback() -> None:
    assert isinstance(run_with(ZeroDivisionError(), grouped=True).exception, ZeroDivisionError)


def test_misspelt_commands_and_options_get_a_suggestion() -> None:
    group = FriendlyGroup("main")
    group.command("build")(click.option("--out")(lambda out: None))
    for arguments, meant in ((["biuld"], "build"), (["build", "--outt", "x"], "--out")):
        result = CliRunner().invoke(group, arguments)
        assert result.exit_code == 2
        assert meant in result.stderr


SPEAKING = """
import click
from data_prep.cli import errors
errors.WINDOWS = {windows}
errors.FriendlyCommand("speak", callback=lambda: click.echo(f"naïve → 文 {{input()}}")).main()
"""


@pytest.mark.parametrize(("windows", "written"), [(False, "naïve ? ? cafÃ©"), (True, "naïve → 文 café")])
def test_what_an_output_cannot_encode_ends_no_command(windows: bool, written: str) -> None:
    command = [sys.executable, "-c", SPEAKING.format(windows=windows)]
    environment = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(command, input="café".encode(), capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode("utf-8" if windows else "cp1252").splitlines() == [written]
