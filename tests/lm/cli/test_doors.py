"""What every command does with input that is no text, output that goes nowhere, and names from other programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from data_prep.errors.command_names import command, example_recipe
from data_prep.errors.other_names import OTHER_NAMES, other_name
from data_prep.settings import BuildSettings, CleaningSettings, ReadSettings, TokenizerSettings, option_of, settings_of
from lm.cli.main import main
from lm.config.settings import all_settings

ROOT = Path(__file__).parents[3]
LATIN = os.fsdecode(b"caf\xe9")


def kindling(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def commands(group: click.Group = main, before: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], click.Command]]:
    """Every command with the words that call it."""
    found = []
    for name, each in group.commands.items():
        words = (*before, name)
        found += commands(each, words) if isinstance(each, click.Group) else [(words, each)]
    return found


COMMANDS = commands()
RECIPE = "configs/tiny.toml"


@pytest.mark.parametrize(
    ("words", "each"), COMMANDS, ids=lambda part: "-".join(part) if isinstance(part, tuple) else ""
)
def test_every_command_refuses_bytes_that_are_no_text(words, each):
    options = [option.opts[0] for option in each.params if isinstance(option, click.Option) and not option.is_flag]
    for arguments in ([LATIN], *([option, LATIN] for option in options), [f"{(options or ['--x'])[0]}={LATIN}"]):
        result = kindling(*words, *arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments
        assert 'caf\\xe9" is not UTF-8' in result.stderr
        assert len(result.stderr.splitlines()) == 1


def test_an_environment_variable_that_is_no_text_is_refused_and_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("KINDLING_API_KEY", LATIN)
    result = kindling("serve", tmp_path)
    assert (result.exit_code, result.stderr) == (2, "error: the value of --api-key is not UTF-8\n")


@pytest.mark.parametrize(
    ("words", "each"), COMMANDS, ids=lambda part: "-".join(part) if isinstance(part, tuple) else ""
)
def test_every_command_refuses_numbers_that_nothing_can_hold(words, each, tmp_path):
    for option in each.params:
        is_number = isinstance(option, click.Option) and isinstance(option.type, click.types.IntParamType)
        for value in ["9" * 25, "-" + "9" * 25] if is_number else []:
            needed = [
                word
                for other in each.params
                if other.required and other is not option
                for word in ([other.opts[0]] if isinstance(other, click.Option) else [])
                + [
                    other.type.choices[0]
                    if isinstance(other.type, click.Choice)
                    else "8"
                    if isinstance(other.type, click.types.IntParamType)
                    else str(tmp_path)
                ]
            ]
            result = kindling(*words, *needed, f"{option.opts[0]}={value}")
            assert result.exit_code == 2, (option.opts, result.output)
            assert "Traceback" not in result.output
            assert option.opts[0] in result.stderr, result.stderr


def run_kindling(*arguments: object, **streams: object) -> subprocess.CompletedProcess[str]:
    code = "import sys; sys.argv[0] = 'kindling'; from lm.cli.main import main; main()"
    call = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(call, cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=120, check=False, **streams)


SHORT = [["--help"], ["prep", "inspect", "{data}"]]


@pytest.mark.parametrize("arguments", SHORT, ids=["help", "inspect"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_is_one_sentence(arguments, dataset):
    with Path("/dev/full").open("w") as full:
        done = run_kindling(*(part.format(data=dataset.directory) for part in arguments), stdout=full)
    assert (done.returncode, done.stderr) == (1, "error: no space left on device\n")


@pytest.mark.parametrize("arguments", SHORT, ids=["help", "inspect"])
def test_a_closed_output_is_one_sentence(arguments, dataset):
    done = run_kindling(*(part.format(data=dataset.directory) for part in arguments), preexec_fn=lambda: os.close(1))
    assert (done.returncode, done.stderr) == (1, "error: standard output is closed\n")


def test_a_closed_pipe_is_quiet(dataset):
    reader, writer = os.pipe()
    os.close(reader)
    done = run_kindling("prep", "inspect", dataset.directory, stdout=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_command_that_prints_nothing_needs_no_output(tmp_path):
    done = run_kindling("sample", tmp_path / "none", "--prompt", "a", preexec_fn=lambda: (os.close(0), os.close(1)))
    assert done.returncode == 2
    assert done.stderr.startswith("error: there is no run directory")


@pytest.mark.parametrize(
    ("started", "expected"),
    [
        ("kindling", ("kindling train", "kindling prep build", "kindling predict", "tiny")),
        ("/opt/venv/bin/kindling", ("kindling train", "kindling prep build", "kindling predict", "tiny")),
        ("train.py", ("python train.py", "python -m data_prep build", "kindling predict", RECIPE)),
        ("../k/sample.py", ("python ../k/train.py", "python -m data_prep build", "kindling predict", RECIPE)),
        ("/k/data_prep/__main__.py", ("python train.py", "python -m data_prep build", "kindling predict", RECIPE)),
        ("my_own_train.py", ("kindling train", "kindling prep build", "kindling predict", "tiny")),
        ("", ("kindling train", "kindling prep build", "kindling predict", "tiny")),
    ],
)  # fmt: skip
def test_messages_name_commands_as_the_user_calls_them(started, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.chdir(ROOT)
    assert (command("train"), command("prep build"), command("predict"), example_recipe()) == expected
    monkeypatch.chdir(tmp_path)
    assert example_recipe() == "tiny"
    if started.endswith("__main__.py"):
        assert command("train") == "kindling train"


ALIASES = [
    *[("train", alias, ours) for alias, ours in {
        "--lr": "--learning-rate", "--batch-size": "--batch-tokens", "--epochs": "--steps", "--block-size":
        "--context-length", "--n-layer": "--num-layers", "--n-head": "--num-heads", "--n-embd": "--hidden-size",
        "--max-iters": "--steps", "--max-steps": "--steps", "--wd": "--weight-decay", "--warmup": "--warmup-fraction",
        "--warmup-steps": "--warmup-fraction", "--grad-clip": "--gradient-clip", "--eval-interval": "--validate-every",
        "--out-dir": "--run", "--dtype": "--precision", "--n_layer": "--num-layers",
    }.items()],
    *[("finetune {run} --run x", alias, ours) for alias, ours in {
        "--lr": "--learning-rate", "--batch-size": "--batch-examples", "--num-train-epochs": "--epochs", "--max-steps":
        "--epochs", "--lora-r": "--lora-rank", "--weight_decay": "--weight-decay",
    }.items()],
    *[("sample {run}", alias, ours) for alias, ours in {
        "--num-beams": "--temperature", "--max-tokens": "--max-new-tokens", "--temp": "--temperature",
        "--repeat-penalty": "--repetition-penalty", "--batch-size": "--rows", "--max-length": "--max-new-tokens",
    }.items()],
    *[("prep build x --out y", alias, ours) for alias, ours in {
        "--val-fraction": "--validation-fraction", "--num-workers": "--workers",
        "--dedup": "--duplicates", "--special-tokens": "--extra-token",
    }.items()],
    ("embed {run} --input x", "--out", "--output"), ("predict {run} --input x", "--out", "--output"),
    ("export {run} --to hf", "--output", "--out"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "alias", "ours"), ALIASES)
def test_names_of_other_programs_are_answered_with_ours(words, alias, ours, random_run):
    result = kindling(*(word.format(run=random_run.path) for word in words.split()), alias, "1")
    assert result.exit_code == 2
    assert f'error: unknown option {alias}: did you mean "{ours}"?' in result.stderr


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        *[("eval", "evaluate"), ("generate", "sample"), ("build", "prep build"), ("verify", "prep verify")],
        *[("tokenize", "prep build"), ("trian", "train"), ("pretrain", "train"), ("infer", "predict")],
    ],
)
def test_another_name_of_a_command_is_answered_with_ours(name, ours):
    result = kindling(name, "x")
    assert (result.exit_code, result.stderr) == (2, f'error: there is no command "{name}": did you mean "{ours}"?\n')


def test_a_name_of_no_command_is_answered_with_all():
    assert 'there is no command "quux": choose one of prep, demo, train, sample,' in kindling("quux").stderr
    assert 'there is no command "buidl": did you mean "build"?' in kindling("prep", "buidl").stderr


def test_another_unit_is_explained(random_run):
    told = kindling("train", "tiny", "--batch-size", 8, "--warmup-steps", 100).stderr
    assert "(it counts tokens: multiply the sequences by the context length)" in told
    assert "(it is a share of the steps, from 0 to 1)" in told
    assert "there is no beam search" in kindling("sample", random_run.path, "--num-beams", 2).stderr


def test_keys_of_a_recipe_are_answered_alike(tmp_path, random_run, write_rows):
    (tmp_path / "r.toml").write_text("[optimizer]\nlr = 0.1\n[data]\nbatch_size = 8\n")
    told = kindling("train", tmp_path / "r.toml").stderr
    assert f'unknown setting "lr" in {tmp_path}/r.toml: did you mean "learning_rate"?' in told
    assert 'did you mean "batch_tokens"? (it counts tokens' in told
    told = kindling("finetune", random_run.path, "--run", tmp_path / "x", "--recipe", tmp_path / "r.toml").stderr
    assert 'did you mean "batch_examples"?' in told


def test_every_name_that_is_suggested_exists():
    known = {setting.name for setting in all_settings()}
    for kind in (BuildSettings, CleaningSettings, ReadSettings, TokenizerSettings):
        known |= {option_of(each).strip("-").replace("-", "_") for each in settings_of(kind)}
    for words, each in COMMANDS:
        known |= {" ".join(words)}
        known |= {option.opts[0].strip("-").replace("-", "_") for option in each.params}
    assert not {ours for ours, _, _ in OTHER_NAMES} - known
    assert other_name("learning_rat", ["learning_rate"]) == ""


def test_a_recipe_by_the_name_of_its_file_is_answered_with_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = kindling("train", "configs/tiny.toml")
    assert result.exit_code == 2
    assert 'there is no file configs/tiny.toml: the recipe that comes with Kindling is called "tiny"' in result.stderr
