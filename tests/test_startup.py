"""What a command imports, seen in a process of its own: each of these packages takes a second or so, or more."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

HEAVY = ("torch._dynamo", "triton", "sympy", "datasets", "pyarrow", "pandas", "transformers", "matplotlib")
PROGRAM = """
import json, sys
from lm.cli.main import main
try:
    main(prog_name="kindling", args=sys.argv[2:])
finally:
    json.dump([name for name in sys.modules], open(sys.argv[1], "w"))
"""


@pytest.fixture
def modules_of(tmp_path):
    """The modules that a command imports: (*arguments) → names; the command must succeed, or exit with ``status``."""

    def run(*arguments: object, status: int = 0) -> set[str]:
        file = tmp_path / "modules.json"
        command = [sys.executable, "-c", PROGRAM, file, *arguments]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
        assert done.returncode == status, done.stderr
        return set(json.loads(file.read_text()))

    return run


def test_generating_and_filling_import_nothing_heavy(trained, modules_of):
    loaded = modules_of("sample", trained.path, "--prompt", "The", "--fill", "The [MASK].", "--max-new-tokens", 2)
    assert not loaded.intersection(HEAVY)


def test_training_imports_nothing_heavy_until_its_report(small, dataset, tmp_path, modules_of):
    small.save(tmp_path / "tiny.toml")
    loaded = modules_of("train", tmp_path / "tiny.toml", "--run", tmp_path / "run", "--steps", 2)
    assert loaded.intersection(HEAVY) <= {"matplotlib"}


def test_evaluating_imports_nothing_heavy(trained, modules_of):
    assert not modules_of("evaluate", trained.path).intersection(HEAVY)


def test_fine_tuning_and_predicting_import_nothing_heavy(trained, tmp_path, modules_of):
    file, run = tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps({"text": word, "label": word}) + "\n" for word in ("river", "owl")))
    task = ("--task", "classification", "--train", file, "--epochs", 1)
    loaded = modules_of("finetune", trained.path, *task, "--run", run)
    assert loaded.intersection(HEAVY) <= {"pandas", "pyarrow"}  # which scikit-learn imports if they are installed
    assert not modules_of("predict", run, "--input", file).intersection(HEAVY)


def test_building_a_dataset_imports_no_pytorch(text_folder, tmp_path, modules_of):
    loaded = modules_of("prep", "build", text_folder, "--out", tmp_path / "data", "--vocab-size", 400)
    assert not loaded.intersection(("torch", *HEAVY))


def test_nothing_is_collected_when_a_command_ends():
    """The callback that is registered first runs last."""
    program = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 10_000)); "
    program += "from lm.cli.main import main; main(args=['prep', '--help'])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines()[-1] == "True"
