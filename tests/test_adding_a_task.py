"""Follow ``docs/adding-a-task.md`` in a copy of the packages: its file, its lines, its commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "adding-a-task.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str) -> Iterator[tuple[str, str, str]]:
    """(language, the file that was named last before it, content) of each code block."""
    for found in BLOCK.finditer(text):
        named = re.findall(r"`([\w/-]+\.(?:py|jsonl))`", BLOCK.sub("", text[: found.start()]))
        yield found[1], named[-1], found[2]


def patched(content: str, diff: str) -> str:
    """The content after a diff without line numbers, whose old lines must occur exactly once."""
    lines = diff.splitlines(keepends=True)
    old = "".join(line[1:] for line in lines if line[0] in " -")
    new = "".join(line[1:] for line in lines if line[0] in " +")
    assert content.count(old) == 1, old
    return content.replace(old, new)


def test_following_the_page_adds_a_task_that_learns_and_predicts(trained, tmp_path):
    for package in ("lm", "data_prep"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "finetune.py", tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "mine").symlink_to(trained.path)
    commands: list[str] = []
    new_files = set()
    for language, name, content in blocks(PAGE.read_text(encoding="utf-8")):
        path = tmp_path / name
        if language == "diff":
            path.write_text(patched(path.read_text(encoding="utf-8"), content), encoding="utf-8")
        elif language == "sh":
            commands += content.splitlines()
        else:
            assert not path.exists()
            path.write_text(content, encoding="utf-8")
            new_files.add(name)
    assert new_files == {"lm/finetuning/multilabel.py", "news.jsonl"}
    assert len(commands) == 2
    program = {
        "python": [sys.executable],
        "kindling": [sys.executable, "-c", "from lm.cli.main import main; main()"],
    }
    for command in commands:
        first, *arguments = command.split()
        more = ["--device", "cpu"]
        if "finetune.py" in arguments:  # for a model of this size
            more += ["--threads", "1", "--learning-rate", "0.02", "--dropout", "0"]
        done = subprocess.run(
            [*program[first], *arguments, *more],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "runs/topics/metrics.jsonl").read_text().splitlines()]
    losses = [line["metrics"]["loss"] for line in lines if "metrics" in line]
    assert losses[-1] < 0.8 * losses[0]
    assert {"loss", "accuracy", "f1"} == lines[-1]["metrics"].keys()
    answers = [json.loads(line) for line in (tmp_path / "topics.jsonl").read_text().splitlines()]
    assert len(answers) == 4
    for answer in answers:
        assert answer["probabilities"].keys() == {"politics", "sports"}
        assert answer["labels"] == [name for name, chance in answer["probabilities"].items() if chance > 0.5]
