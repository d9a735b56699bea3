"""The scripts as a user calls them, each in its own process; those that end with a mistake, in this one."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from lm.config.settings import pretraining_settings

ROOT = Path(__file__).parent.parent
LONG = ("--context-length", "65536")
SMALL = (
    *("--num-layers", 1, "--hidden-size", 32, "--num-heads", 2, "--context-length", 32, "--batch-tokens", 256),
    *("--steps", 30, "--learning-rate", 0.01, "--threads", 1, "--device", "cpu"),
)


def call(*arguments: object, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run ``python …`` in the root of the checkout."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONUTF8": "1"},
        check=False,
    )


def succeed(*arguments: object) -> subprocess.CompletedProcess[str]:
    done = call(*arguments)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


@pytest.fixture(scope="module")
def data(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scripts") / "data"
    done = succeed(
        *("-m", "data_prep", "build", text_folder, "--out", out),
        *("--vocab-size", 400, "--validation-fraction", 0.1, "--workers", 1),
    )
    assert "train.py configs/tiny.toml" in done.stdout + done.stderr
    return out


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scripts") / "run"
    done = succeed("train.py", "configs/tiny.toml", "--data", data, "--run", path, *SMALL)
    assert done.stdout == ""
    return path


def test_training_leaves_a_run_directory_with_a_report(run):
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "config.toml", "metrics.jsonl", "report.html", "tokenizer.json"
    }  # fmt: skip
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step_00000030"]


def test_sampling_writes_text_alone_and_the_same_for_the_same_seed(run):
    command = ["sample.py", run, "--prompt", "The captain", "--max-new-tokens", 20, "--seed", 4]
    done = succeed(*command)
    assert done.stdout.startswith("The captain")
    assert done.stderr == ""
    assert succeed(*command).stdout == done.stdout


def test_sampling_fills_masks_and_speaks_json(run):
    done = succeed("sample.py", run, "--prompt", "An owl", "--fill", "The old [MASK] found an owl.", "--json")
    continued, filled = map(json.loads, done.stdout.splitlines())
    assert continued["prompt"] == "An owl"
    assert filled["filled"].startswith("The old ")
    assert "[MASK]" not in filled["filled"]


def test_evaluation_and_report_follow(run):
    answer = json.loads(succeed("evaluate.py", run, "--json").stdout)
    assert answer["step"] == 30
    table = succeed("evaluate.py", run).stdout
    assert f"{answer['validation']['next_token']['bits_per_byte']:.4f}" in table
    report = succeed("-c", "from lm.cli.main import main; main()", "report", run)
    assert report.stdout.strip() == str(run / "report.html")
    assert "Loss on the validation split" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["sample.py", "{empty}", "--prompt", "a"], ["{empty} is not a run directory"]),
        (["evaluate.py", "{empty}"], ["{empty} is not a run directory"]),
        (["sample.py", "{new}", "--prompt", "a"], ["there is no run directory {new}"]),
        (["train.py", "{recipe}", "--run", "{new}"], ['"hidden_sise"', 'did you mean "hidden_size"?']),
        (["train.py", "configs/tiny.toml", "--run", "{new}", "--hiden-size", "64"], ['did you mean "--hidden-size"?']),
        (["train.py", "configs/tiny.toml", "--run", "{new}", "--num-heads", "5"], ["hidden_size 192", "num_heads 5"]),
        (["train.py", "configs/tiny.toml", "--run", "{new}"], ["no data"]),
        (["train.py", "configs/tiny.toml", "--run", "{new}", "--data", "{empty}"], ["is not a Kindling dataset"]),
        (
            ["train.py", "tiny", "--run", "{new}", "--data", "{data}", "--batch-tokens", "65536", *LONG],
            ["context_length 65536 is longer than the training text"],
        ),
        (["train.py", "configs/tinny.toml"], ['no recipe "configs/tinny.toml"', 'did you mean "configs/tiny.toml"?']),
        (
            ["train.py", "{recipe}", "--run", "{new}", "--dropout", "7", "--stpes", "3"],
            ['"hidden_sise"', "--dropout must be at most 0.9", "--stpes"],
        ),
    ],
)  # fmt: skip
def test_mistakes_get_one_clear_message_and_leave_nothing_behind(data, tmp_path, capfd, monkeypatch, command, words):
    places = {"empty": tmp_path / "empty", "new": tmp_path / "new", "recipe": tmp_path / "bad.toml", "data": data}
    places["empty"].mkdir()
    places["recipe"].write_text("[model]\nhidden_sise = 64\n")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [part.format(**places) for part in command])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(command[0], run_name="__main__")
    stdout, stderr = capfd.readouterr()
    assert ended.value.code == 2, stderr
    assert stdout == ""
    assert "Traceback" not in stderr
    for word in words:
        assert word.format(**places) in stderr
    assert len(stderr.splitlines()) <= len(words)  # one line per mistake
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.toml", "empty"]
    assert list(places["empty"].iterdir()) == []


PROGRAMS = {
    "train": ["train.py"],
    "sample": ["sample.py"],
    "finetune": ["finetune.py"],
    "evaluate": ["evaluate.py"],
    "build": ["-m", "data_prep", "build"],
    "kindling": ["-c", "from lm.cli.main import main; main()"],
}
HEAVY = {"torch", "numpy", "tokenizers", "matplotlib", "jinja2", "datasets", "triton"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_help_is_quick_because_it_imports_nothing_slow(name):
    done = succeed("-X", "importtime", *PROGRAMS[name], "--help")
    assert "Usage:" in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
    assert "click" in imported
    assert not imported & HEAVY
    if name == "train":
        everything = succeed(*PROGRAMS[name], "--help-all").stdout
        assert all(setting.option in everything for setting in pretraining_settings())


def test_help_and_mistakes_do_not_wait_for_torch():
    code = """
import sys
from lm.cli.main import main
for arguments in (["train", "--help"], ["sample", "--help"], ["evaluate", "--help"], ["finetune", "--help"],
                  ["predict", "--help"], ["train", "tiny", "--stpes", "3"]):
    try:
        main(arguments)
    except SystemExit:
        pass
print(*sys.modules)
"""
    imported = succeed("-c", code).stdout.splitlines()[-1].split()
    assert "lm.cli.main" in imported
    assert not HEAVY & set(imported)
