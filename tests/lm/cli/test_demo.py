from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lm.cli import demo
from lm.cli.main import main
from lm.config.recipes import load_config

ROOT = Path(__file__).parents[3]


def parsed(stage: str) -> dict:
    """The options of a stage as its command takes them, with the command's name."""
    group, arguments = main, shlex.split(stage)
    while isinstance(group, click.Group):
        name, group, arguments = group.resolve_command(click.Context(group), arguments)
    return {"command": name, **group.make_context(name, arguments).params}


def test_each_stage_continues_the_one_before_and_samples_as_the_recipe_reports():
    stages = [parsed(stage) for stage in demo.STAGES]
    assert [stage["command"] for stage in stages] == ["build", "train", "evaluate", "sample", "sample", "report"]
    build, train, *rest = stages
    assert str(build["out"]) == train["data"][0]
    assert {stage["run"] for stage in rest} == {train["run_path"]}
    report = load_config(ROOT / "configs" / f"{train['recipe']}.toml").report
    assert (stages[3]["prompts"], stages[4]["fills"]) == (report.prompts, report.fills)
    assert "kindling demo" in (ROOT / "Makefile").read_text()


def test_each_stage_on_images_continues_the_one_before():
    stages = [parsed(stage) for stage in demo.IMAGE_STAGES]
    assert [stage["command"] for stage in stages] == ["images", "train", "evaluate", "report"]
    images, train, *rest = stages
    assert images["sources"] == ("builtin:digits",)
    assert str(images["out"]) == train["data"][0]
    assert {stage["run"] for stage in rest} == {train["run_path"]}
    assert load_config(ROOT / "configs" / f"{train['recipe']}.toml").reads_images
    assert "kindling demo --images" in (ROOT / "Makefile").read_text()


def test_the_option_chooses_the_stages(monkeypatch):
    monkeypatch.setattr(demo, "STAGES", ("--version",))
    monkeypatch.setattr(demo, "IMAGE_STAGES", ("prep --help",))
    for options, shown in (([], "$ kindling --version\n"), (["--images"], "$ kindling prep --help\n")):
        result = CliRunner().invoke(main, ["demo", *options])
        assert result.exit_code == 0
        assert shown in result.stdout


@pytest.mark.parametrize(
    ("stages", "status", "shown"),
    [
        (["--version", "prep --help"], 0, ["$ kindling --version", "kindling, version", "$ kindling prep --help"]),
        (["sample none --prompt a", "--version"], 2, ["$ kindling sample none --prompt a"]),
    ],
)
def test_a_stage_that_fails_ends_the_demo_with_its_status(stages, status, shown, monkeypatch, capfd):
    monkeypatch.setattr(demo, "STAGES", tuple(stages))
    result = CliRunner().invoke(main, ["demo"])
    assert result.exit_code == status
    told = result.stdout + capfd.readouterr().out
    assert all(line in told for line in shown)
    assert told.count("$ kindling") == (2 if status == 0 else 1)


def test_ctrl_c_lets_the_stage_end_by_itself(tmp_path):
    """The stage saves what it has; the demo passes its status on."""
    stage = "import pathlib, time\ntry:\n pathlib.Path('began').touch(); time.sleep(120)\n"
    stage += "except KeyboardInterrupt:\n time.sleep(0.5); pathlib.Path('saved').touch(); raise SystemExit(130)"
    program = "from lm.cli import demo; import sys; real = demo.subprocess.Popen\n"
    program += f"demo.subprocess.Popen = lambda command: real([sys.executable, '-c', {stage!r}])\n"
    program += "demo.demo(standalone_mode=True)"
    process = subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, start_new_session=True)
    while not (tmp_path / "began").exists():
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert (tmp_path / "saved").exists()
