"""What needs no tensor is found wrong before PyTorch is imported, and in one sentence."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from lm.config.recipes import load_config
from lm.config.settings import Config

PROGRAM = """
import json, sys
from click.testing import CliRunner
from lm.cli.main import main
for arguments in json.loads(sys.argv[1]):
    told = CliRunner().invoke(main, arguments)
    print(json.dumps([told.exit_code, told.stderr, sorted({"torch", "datasets", "matplotlib"} & set(sys.modules))]))
"""
CASES = [
    ("sample none --prompt a", "there is no run directory none"),
    ("serve none", "there is no run directory none"),
    ("predict none --input a.txt", "there is no run directory none"),
    ("finetune none --run new", "there is no run directory none"),
    ("finetune plain --run new", "choose a task, for example --task classification"),
    ("finetune plain --run new --task classification", "name a file with training examples: --train FILE"),
    ("finetune plain --run new --task classification --train a.jsonl --epochs x", "--epochs must be a number"),
    ("compare plain", "name at least two runs to compare"),
    ("compare plain none", "there is no run directory none"),
    ("train tiny", "no data: name a folder of token shards with --data"),
    ("train tiny --data texts", "is not a directory"),
    ("train tiny --data plain", "is not a Kindling dataset"),
    ("embed plain --input a.txt --output v.csv", "cannot write to v.csv: name a file that ends in .jsonl or .npy"),
    ("predict task --input a.txt --output v.npy", "cannot write to v.npy: name a file that ends in .jsonl or .csv"),
    ("predict plain --input a.txt", "plain was not fine-tuned on a task with a head"),
    ("sample task --prompt a", "task is fine-tuned for classification and is no longer a language model"),
    ("serve task", "task is fine-tuned for classification and is no longer a language model"),
    ("sample plain --prompt a --fill b[mask:2]", 'nothing to fill in "b[mask:2]": write [MASK:2] for [mask:2]'),
    ("sample plain --prompt a --fill <mask>", "write [MASK] for <mask>"),
    ("sample plain --fill b", 'nothing to fill in "b": write [MASK] where a word is missing'),
    ("sample plain", "nothing to do"),
    ("sample causal --fill [MASK]", "it can continue a prompt (--prompt), but not fill masks"),
]


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """What each of the commands says, all in one process and a folder with three runs."""
    folder = tmp_path_factory.mktemp("early")
    changes = {"plain": {}, "task": {"task": "classification"}, "causal": {"objective": "next_token"}}
    for name, settings in changes.items():
        (folder / name).mkdir()
        Config().replace(**settings).save(folder / name / "config.toml")
        load_config(folder / name / "config.toml")
    commands = json.dumps([command.split() for command, _ in CASES])
    done = subprocess.run([sys.executable, "-c", PROGRAM, commands], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return dict(zip((command for command, _ in CASES), map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("command", "sentence"), CASES)
def test_a_mistake_is_reported_without_pytorch(command, sentence, told):
    status, error, loaded = told[command]
    assert status == 2, error
    assert sentence in error
    assert error.count("\n") == 1
    assert loaded == []
