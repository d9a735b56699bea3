"""docs/tutorial.md, followed literally: its blocks run in order in an empty folder, and print what the page shows."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lm.runs.directory import open_run

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
# A block of commands, and right below it, if there is one, what it prints.
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```\n(?:```text\n(.*?)^```$)?", re.M | re.S)
BLOCKS = [(language, commands, shown) for language, commands, shown in BLOCK.findall(PAGE)]
STOP = "^C"  # the reader presses Ctrl-C after the line above


def shape(line: str) -> str:
    """A line without its numbers, the width of its columns, and the tokens that a model finds probable.

    The page learns from Python's own documentation, so its tokens differ between versions of Python.
    """
    line = " ".join(re.sub(r"\d[\d.,:]*(?:e-?\d+)?", "0", line).split())
    return re.sub(r"""(['"]).*?\1 0%""", "token 0%", line)


def pattern(line: str) -> str:
    """The regular expression of a line of the page, in which … stands for anything."""
    return ".*".join(re.escape(part) for part in shape(line).split("…"))


def matches(shown: str, printed: str) -> bool:
    """Whether the printed text has the shape of the one shown: the same lines, and any lines for a line of only …."""
    lines = [line for line in shown.splitlines() if line != STOP]
    expected = "".join("(?:.*\n)*?" if line.strip() == "…" else f"{pattern(line)}\n" for line in lines)
    return re.fullmatch(expected, "".join(f"{shape(line)}\n" for line in printed.splitlines())) is not None


def run(command: list[str], folder: Path, environment: dict[str, str], stop_after: str | None) -> tuple[int, str]:
    """The exit status and the output; press Ctrl-C once a line has the shape of ``stop_after``."""
    program = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        encoding="utf-8",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,  # Ctrl-C reaches the shell and what it runs, and not this process
    )
    assert program.stdout is not None
    lines = []
    try:
        for line in program.stdout:
            lines.append(line)
            if stop_after and re.fullmatch(pattern(stop_after), shape(line)):
                os.killpg(program.pid, signal.SIGINT)
                stop_after = None
        return program.wait(timeout=600), "".join(lines)
    finally:
        if program.poll() is None:
            os.killpg(program.pid, signal.SIGKILL)
            program.wait()
        program.stdout.close()


def line_before_stop(shown: str) -> str | None:
    lines = shown.splitlines()
    return lines[lines.index(STOP) - 1] if STOP in lines else None


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, list[tuple[int, str]]]]:
    """The folder of a reader who has followed the page, and the status and output of each block."""
    folder = tmp_path_factory.mktemp("first")
    programs = tmp_path_factory.mktemp("programs")
    for name, start in {"python": "", "kindling": " -P -c 'from lm.cli.main import main; main()'"}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{start} "$@"\n', encoding="utf-8")
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUTF8": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }
    start = {"sh": ["bash", "-e", "-c"], "python": [str(programs / "python"), "-c"]}
    results = []
    for language, commands, shown in BLOCKS:
        results.append(run([*start[language], commands], folder, environment, line_before_stop(shown)))
        if results[-1][0] and STOP not in shown:
            break
    yield folder, results


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_each_block_of_the_tutorial_runs_and_prints_what_the_page_shows(followed, number):
    _, commands, shown = BLOCKS[number]
    assert len(followed[1]) > number, "a block before this one failed"
    status, printed = followed[1][number]
    assert (status != 0) == (STOP in shown), f"{commands}\n{printed}"
    assert not shown or matches(shown, printed), f"{commands}\n{printed}"


def test_the_stopped_run_is_resumed_to_its_end(followed):
    lines = list(open_run(followed[0] / "runs" / "mine").metrics())
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == sorted(set(steps))
    assert steps[-1] == 150


def test_the_tutorial_shows_most_outputs_and_stops_one_run():
    assert sum(bool(shown) for _, _, shown in BLOCKS) >= len(BLOCKS) - 3
    assert [STOP in shown for _, _, shown in BLOCKS].count(True) == 1


def test_each_section_with_commands_ends_with_exercises():
    for section in re.split(r"^## ", PAGE, flags=re.M)[3:]:  # after the title, the installation and the text
        if "```sh" in section:
            last = section.strip().split("\n\n")[-1]
            assert last.startswith("**Exercises.** (a)"), section[:40]


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("step  10/150  loss 6.856  0:00:30 left\n", "step 20/200  loss 7.1  0:01:02 left\n", True),
        ("step  10/150  loss 6.856\n", "step 20/200  gain 7.1\n", False),
        ("a\n…\nd\n", "a\nb\nc\nd\n", True),
        ("a\nd\n", "a\nb\nd\n", False),
        ("The following …\n", "The following text\n", True),
        ("The following …\n", "The text\n", False),
        ("a\n", "a\nerror\n", False),
    ],
)
def test_outputs_match_in_shape(shown, printed, same):
    assert matches(shown, printed) is same
