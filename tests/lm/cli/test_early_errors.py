"""What needs no tensor is found wrong before PyTorch is imported, and in one sentence."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from lm.config.recipes import load_config
from lm.config.settings import Config
from tests.lm.cli.test_main import assert_refused, kindling

PROGRAM = """
import json, sys
from click.testing import CliRunner
from lm.cli.main import main
for arguments in json.loads(sys.argv[1]):
    told = CliRunner().invoke(main, arguments, prog_name="kindling")
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
    ("train tiny --data texts", 'there is no folder "texts"'),
    (
        "train tiny --data other.jsonl",
        '"other.jsonl" is a file, not a Kindling dataset; make one with: kindling prep build other',
    ),
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
    ("sample plain a", "got unexpected extra argument (a): write a text to continue as --prompt TEXT, in quotes"),
    ("predict plain", "missing option '--input' (see kindling predict --help)"),
    ("predict plain --input a.txt b", "got unexpected extra argument (b): name a file as --input FILE"),
    (
        "export plain --out new",
        "missing option '--to'. Choose from: hf, gguf, sentence-transformers, peft (see kindling",
    ),
    ("export plain --to x --out new", "invalid value for '--to': 'x' is not one of 'hf', 'gguf'"),
    ("serve plain --nonsense", "no such option '--nonsense' (see kindling serve --help)"),
    ("help", 'there is no command "help": kindling --help lists the commands'),
    ("finetune plain --run plain --task classification --train a.jsonl", "plain is a pretrained run, not one of"),
    ("sample plain --input none.jsonl", "cannot read none.jsonl: there is no such file"),
    ("sample plain --input other.jsonl --output no/a.jsonl", "cannot write to no/a.jsonl: there is no folder no"),
    ("predict task --input none.jsonl", "there is no file none.jsonl"),
    ("predict task --input other.jsonl", 'there is no column "text" in "other"'),
    ("predict task --input a.txt --output no/a.jsonl", "cannot write to no/a.jsonl: there is no folder no"),
    ("embed plain --input none.jsonl --output v.npy", "there is no file none.jsonl"),
    ("embed plain --input other.jsonl --output v.npy", 'there is no column "text" in "other"'),
    ("embed plain --input other.jsonl --output no/v.npy", "cannot write to no/v.npy: there is no folder no"),
    ("embed task --input other.jsonl --output v.npy", "task is fine-tuned for classification"),
    ("evaluate task", "task is fine-tuned for classification"),
    ("evaluate plain --data none", 'there is no folder "none"'),
    ("evaluate plain --text none.txt", 'there is no file or folder "none.txt"'),
    ("evaluate plain --text other.jsonl", 'has no text in the field "text"'),
    ("evaluate plain --text other.jsonl --stride 9999", "--stride must be between 1 and the context length"),
    ("evaluate plain --pairs none", "there are no pairs at none"),
    ("evaluate plain --choices other.jsonl", "there is no column"),
    ("evaluate plain --similarity none.csv", "there is no file none.csv"),
    ("finetune plain --run new --task classification --train none.jsonl", "there is no file none.jsonl"),
    ("finetune plain --run new --task classification --train other.jsonl", "there is no column"),
    ("finetune plain --run new --task classification --train a.jsonl --seeds x", "--seeds x must be different whole"),
    ("tasks plain --out new --tasks none.toml", "cannot read the tasks none.toml"),
    ("tasks plain --out new --seeds x", "--seeds x must be different whole numbers"),
    ("tasks plain --out other.jsonl", "other.jsonl is a file: choose another --out"),
    ("compare plain task --out no/c.html", "cannot write to no/c.html: there is no folder no"),
    ("compare plain task --out plain", "cannot write to plain: it is a folder"),
    ("report plain --fill x", 'nothing to fill in "x"'),
    ("export plain --to hf --out task", '"task" already exists and is not an empty folder: choose another --out'),
    ("export plain --to gguf --out other.jsonl", "other.jsonl already exists: choose another --out"),
    ("export plain --to peft --out new", "plain has no LoRA adapter"),
    ("export task --to gguf --out new", "task is fine-tuned for classification"),
    ("import plain --run task", '"task" already exists and is not an empty folder: choose another --run'),
    ("import plain --run new", "plain has no config.json"),
    ("merge plain --out new", "plain is not fine-tuned: its weights are plain already"),
    ("merge task --out plain", '"plain" already exists and is not an empty folder: choose another --out'),
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
    (folder / "other.jsonl").write_text('{"other": "x"}\n')
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


@pytest.fixture(scope="module")
def without_weights(trained, tmp_path_factory):
    """A run whose weights cannot be read: a command that needs them finds no intact checkpoint."""
    run = shutil.copytree(trained.path, tmp_path_factory.mktemp("weights") / "run")
    for weights in run.rglob("*.safetensors"):
        weights.write_bytes(b"")
    assert_refused(kindling("sample", run, "--prompt", "A"), "is damaged")
    return run


LATER = [
    ("sample RUN --prompt A --checkpoint last", 'there is no checkpoint "last"'),
    ("sample RUN --prompt A --checkpoint 7", "has no checkpoint of step 7: available are 100, 50"),
    (f"sample RUN --fill {'word ' * 50}[MASK]", "this model reads at most 32 at once"),
    ("evaluate RUN --pairs rows.jsonl", '"sentence_good" is missing'),
    ("evaluate RUN --similarity rows.jsonl --layer 9", "layer"),
    ("finetune RUN --run new --task classification --train bad.jsonl", 'bad.jsonl, line 2: "label" is missing'),
    ("export RUN --to gguf --out new --readout masked_next_token", "cannot use the readout masked_next_token"),
    ("serve RUN --host nowhere.invalid", '"nowhere.invalid" is not an address of this machine'),
]


@pytest.mark.parametrize(("command", "sentence"), LATER)
def test_a_mistake_is_reported_before_the_weights_are_read(command, sentence, without_weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    row = {"text": "A boat", "text_pair": "An owl", "label": 1}
    for name, rows in (("rows", [row, row]), ("bad", [row, {"text": "A"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    program, _, option, *rest = command.split(maxsplit=3 if "--fill" in command else -1)
    result = kindling(program, without_weights, option, *rest)
    assert_refused(result, sentence)
