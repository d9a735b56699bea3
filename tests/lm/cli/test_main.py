from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from lm import __version__
from lm.cli.main import main
from lm.config.recipes import load_config
from lm.config.settings import pretraining_settings
from lm.evaluation.validation_loss import verdict
from lm.runs.directory import open_run

SMALL = "--num-layers 1 --hidden-size 32 --num-heads 2 --context-length 32 --batch-tokens 128 --threads 1 --device cpu"


def kindling(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def assert_refused(result: Result, *words: str) -> None:
    """Exit status 2, one error on stderr, nothing on stdout, no traceback."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


@pytest.fixture(scope="module")
def run(trained, tmp_path_factory) -> Path:
    return shutil.copytree(trained.path, tmp_path_factory.mktemp("cli") / "run")


@pytest.fixture
def begin(dataset, tmp_path):
    """``kindling train tiny`` with few small steps."""

    def call(*arguments: object) -> Result:
        return kindling(
            "train", "tiny", "--data", dataset.directory, "--run", tmp_path / "run", *SMALL.split(), *arguments
        )

    return call


def test_help_lists_the_commands_and_every_setting():
    assert all(
        name in kindling("--help").stdout for name in ("train", "sample", "evaluate", "report", "compare", "prep")
    )
    told = kindling("train", "--help-all").stdout
    words = " ".join(told.split())
    for setting in pretraining_settings():
        assert setting.option in told
        assert " ".join(setting.help.split()[1:4]) in words
        assert f"[{setting.section}]" in told


@pytest.mark.parametrize("command", ["train", "finetune", "tasks"])
def test_the_short_help_has_an_example_and_a_screenful_of_settings(command):
    short, whole = (kindling(command, option).stdout for option in ("--help", "--help-all"))
    assert f"  kindling {command} " in short
    assert 12 <= len(re.findall(r"^  --[a-z-]+(?:, --[a-z-]+)? [A-Z]", short, re.MULTILINE)) <= 20
    assert len(whole.splitlines()) > 2 * len(short.splitlines())


def test_the_field_or_column_of_a_text_goes_by_both_names():
    for command in ("prep build", "finetune", "tasks", "predict", "embed"):
        told = kindling(*command.split(), "--help-all").stdout
        assert re.search("--text-(column|field), --text-(column|field) ", told), command
    told = kindling("evaluate", "--help-all").stdout
    assert re.search("--text-field TEXT .*of records", told)
    assert re.search("--text-column NAME", told)


def test_the_version_is_printed():
    assert __version__ in kindling("--version").stdout


def test_the_help_imports_no_torch_and_few_modules():
    code = "import sys, lm.cli.main; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    large = {"torch", "numpy", "safetensors", "tokenizers", "rich", "tomllib", "tomli_w", "statistics", "decimal"}
    assert not large & set(loaded)
    assert len([name for name in loaded if name.startswith(("lm", "data_prep"))]) < 40


def test_data_may_be_repeated_with_weights(begin, dataset, other_dataset, tmp_path):
    result = begin("--data", f"{other_dataset.directory}@2", "--steps", 2)
    assert result.exit_code == 0, result.output
    saved = load_config(tmp_path / "run" / "config.toml")
    assert saved.data.data == (str(dataset.directory), f"{other_dataset.directory}@2")
    assert "66.7% of the rows" in result.stderr


def test_train_trains_reports_and_tells_what_is_next(begin, tmp_path):
    result = begin("--steps", 3, "--json", "--prompts", '["The captain"]')
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    run = tmp_path / "run"
    assert answer["run"] == str(run)
    assert answer["step"] == 3
    assert answer["validation"].keys() == {"next_token", "masked_next_token"}
    assert f"next: kindling evaluate {run}" in result.stderr
    assert "hybrid (10% to 70% of the rows masked) on" in result.stderr
    compressed = re.search(
        r"next_token and masked_next_token are still worse than bz2 -9 \((.*) bits/byte\)", result.stderr
    )
    losses = [loss["bits_per_byte"] for loss in answer["validation"].values()]
    assert 0 < float(compressed[1]) < min(losses)
    assert "step      3/3  loss" in result.stderr
    config = load_config(run / "config.toml")
    assert (config.training.steps, config.model.hidden_size) == (3, 32)
    assert "The captain" in (run / "report.html").read_text(encoding="utf-8")


def test_the_same_command_goes_on_and_a_finished_run_stays(begin, tmp_path):
    assert begin("--steps", 2).exit_code == 0
    assert "resuming at step 2" in begin("--steps", 4).stderr
    result = begin("--steps", 4)
    assert result.exit_code == 0
    assert "4 of 4 steps are done" in result.stderr
    assert result.stdout == ""
    assert open_run(tmp_path / "run").latest().step == 4


def test_a_run_of_another_shape_is_refused_with_the_command_that_trains_it_on(begin, tmp_path):
    assert begin("--steps", 2).exit_code == 0
    run = tmp_path / "run"
    told = begin("--steps", 3, "--batch-tokens", 256)
    assert_refused(
        told, "batch_tokens 128 (now 256)", f"its own settings: kindling train --resume --run {run} --steps 3"
    )
    again = kindling(*told.stderr.strip().partition("settings: kindling ")[2].split())
    assert again.exit_code == 0, again.output
    assert open_run(run).latest().step == 3


def test_what_was_imported_or_merged_is_compared_with_where_it_comes_from(run, tmp_path):
    """And with what measures it, since it has no curves."""
    exported = kindling("export", run, "--to", "hf", "--readout", "next_token", "--out", tmp_path / "hf")
    assert exported.exit_code == 0, exported.output
    assert kindling("import", tmp_path / "hf", "--run", tmp_path / "again").exit_code == 0
    result = kindling("compare", run, tmp_path / "again", "--out", tmp_path / "page.html", "--json")
    assert result.exit_code == 0, result.output
    compared = json.loads(result.stdout)
    assert compared["runs"][1]["origin"] == f"imported from {tmp_path / 'hf'}"
    assert compared["remarks"][-1].endswith(f"kindling evaluate {tmp_path / 'again'} --data FOLDER measures it.")
    assert (tmp_path / "page.html").is_file()
    assert_refused(kindling("compare", run), "name at least two runs to compare")


def test_resume_needs_no_recipe_and_accepts_other_training_settings(begin, tmp_path):
    assert begin("--steps", 2).exit_code == 0
    assert_refused(begin("--steps", 4, "--learning-rate", "0.1"), "learning_rate 0.01 (now 0.1)", "--resume")
    result = kindling("train", "--run", tmp_path / "run", "--resume", "--steps", 3, "--learning-rate", "0.1")
    assert result.exit_code == 0, result.output
    assert load_config(tmp_path / "run" / "config.toml").optimizer.learning_rate == 0.1
    assert open_run(tmp_path / "run").latest().step == 3


def test_a_checkpoint_may_be_chosen(run):
    for which, step in (("50", 50), ("newest", 100), ("best", open_run(run).checkpoint("best").step)):
        told = json.loads(kindling("evaluate", run, "--checkpoint", which, "--json").stdout)
        assert told["step"] == step
        report = kindling("report", run, "--checkpoint", which)
        assert report.exit_code == 0, report.output
        assert f"to step {step} of 100" in (run / "report.html").read_text(encoding="utf-8")
    written = [
        kindling("sample", run, "--prompt", "The", "--max-new-tokens", 20, "--checkpoint", which).stdout
        for which in ("50", "100", "newest")
    ]
    assert written[0] != written[1] == written[2]
    for command in (["sample", run, "--prompt", "a"], ["evaluate", run], ["report", run]):
        assert_refused(kindling(*command, "--checkpoint", "7"), "has no checkpoint of step 7: available are 100, 50")


def test_a_run_is_named_after_its_recipe(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.toml").write_text("[training]\nsteps = 1\n")
    result = kindling("train", "mine.toml", "--data", dataset.directory, *SMALL.split())
    assert result.exit_code == 0, result.output
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()


def test_training_needs_a_recipe_or_a_run(tmp_path):
    assert_refused(kindling("train"), "name a recipe to train")
    assert_refused(kindling("train", "--run", tmp_path / "none"), "is not a run directory yet")
    assert_refused(kindling("train", "tinny"), 'no recipe "tinny": did you mean "tiny"?')


def test_all_mistakes_of_a_command_line_are_told_at_once(begin, tmp_path):
    result = begin("--stpes", "3", "--learning-rate", "fast", "--dropout", "3")
    assert_refused(
        result,
        'unknown option --stpes: did you mean "--steps"?',
        "--learning-rate must be a number, not 'fast'",
        "--dropout must be at most 0.9, not 3.0",
    )
    assert_refused(begin("extra"), "unexpected argument 'extra'")
    assert_refused(begin("--hidden-size", "33"), "hidden_size 33 is not divisible by num_heads 2")
    assert not (tmp_path / "run").exists()


def test_sample_writes_the_text_alone_to_stdout(run):
    result = kindling("sample", run, "--prompt", "The captain", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("The captain")
    assert result.stderr == ""
    assert kindling("sample", run, "--prompt", "The captain", "--max-new-tokens", 12).stdout == result.stdout
    other = [
        kindling("sample", run, "--prompt", "The captain", "--seed", seed, "--temperature", 1.5) for seed in (1, 2)
    ]
    assert other[0].stdout != other[1].stdout


def test_several_prompts_and_fills_come_one_after_another(run):
    result = kindling("sample", run, "--prompt", "A", "--prompt", "", "--fill", "The old [MASK] found an owl.")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("A")
    assert result.stdout.splitlines()[-1].startswith("The old ")
    assert "%" in result.stderr  # the candidates


def test_sample_as_json_has_a_line_each(run):
    fill = "The old [MASK] found a [MASK]."
    result = kindling("sample", run, "--json", "--prompt", "The café", "--fill", fill, "--temperature", 0)
    first, second = map(json.loads, result.stdout.splitlines())
    assert first.keys() == {"prompt", "continuation", "finish_reason"}
    assert first["prompt"] == "The café"
    assert second["fill"] == fill
    assert [len(candidates) for candidates in second["candidates"]] == [5, 5]
    for candidate in second["candidates"][0]:
        assert candidate.keys() == {"token", "probability"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", "a", "--temperature", "-1", "--top-p", "0"], ["temperature must be", "top_p must be"]),
        (["--prompt", "a", "--temperature", "warm"], ["'warm'"]),
        (["--prompt", "a", "--max-new-tokns", "3"], ["--max-new-tokns", "--max-new-tokens"]),
        ([], ["nothing to do: give --prompt"]),
        (["--fill", "no mask"], ["write [MASK] where a word is missing"]),
        (["--fill", "[MASK]" * 40], ["41 tokens; this model reads at most 32"]),
    ],
)
def test_what_sample_cannot_do_is_told(run, arguments, words):
    assert_refused(kindling("sample", run, *arguments), *words)


@pytest.mark.parametrize("command", [["sample", "--prompt", "a"], ["evaluate"], ["report"]])
def test_commands_refuse_a_folder_that_is_no_run(tmp_path, command):
    assert_refused(kindling(*command, tmp_path), f"{tmp_path} is not a run directory")
    assert_refused(kindling(*command, tmp_path / "none"), "there is no run directory")
    assert list(tmp_path.iterdir()) == []


def test_a_run_of_one_objective_refuses_the_other_way_of_writing(small, quietly, tmp_path):
    causal = quietly(small.replace(objective="next_token", steps=1), tmp_path / "causal").path
    masked = quietly(small.replace(objective="masked_token", steps=1), tmp_path / "masked").path
    assert_refused(kindling("sample", causal, "--fill", "a [MASK]"), "next_token only", "but not fill masks")
    assert_refused(kindling("sample", masked, "--prompt", "a"), "masked_token only", "but not continue a prompt")
    assert kindling("sample", masked, "--fill", "The old [MASK]").exit_code == 0


def test_evaluate_shows_losses_next_to_baselines(run):
    answer = json.loads(kindling("evaluate", run, "--json").stdout)
    result = kindling("evaluate", run)
    assert result.exit_code == 0
    for name, loss in answer["validation"].items():
        (line,) = [line for line in result.stdout.splitlines() if line.split()[:1] == [name] and len(line.split()) == 3]
        assert line.split()[1:] == [f"{loss['nats_per_token']:.4f}", f"{loss['bits_per_byte']:.4f}"]
    assert "unigram (baseline)" in result.stdout
    assert "bz2 -9 (baseline)" in result.stdout
    assert "whole validation split" in result.stdout
    assert verdict(answer) in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 120


def test_evaluate_refuses_data_of_another_tokenizer(run, byte_dataset):
    assert_refused(kindling("evaluate", run, "--data", byte_dataset.directory), "another tokenizer")
    assert_refused(kindling("evaluate", run, "--data", run), "is not a Kindling dataset")


def test_report_shows_the_evaluation_only_while_it_is_of_the_newest_checkpoint(run):
    answer = json.loads(kindling("evaluate", run, "--json").stdout)
    result = kindling("report", run, "--prompt", "The owl", "--fill", "The old [MASK]")
    assert result.stdout == f"{run / 'report.html'}\n"
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "Loss on the validation split" in page
    assert "The owl" in page
    (run / "evaluation.json").write_text(json.dumps(answer | {"checkpoint": "of another step"}))
    kindling("report", run)
    assert "Loss on the validation split" not in (run / "report.html").read_text(encoding="utf-8")
    (run / "evaluation.json").unlink()


def test_compare_shows_numbers_settings_and_remarks_and_writes_a_page(run, small, quietly, tmp_path):
    other = quietly(small.replace(steps=2, learning_rate=0.5), tmp_path / "[b]other").path
    result = kindling("compare", run, other, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["steps", "100", "of", "100", "2", "of", "2"] in lines
    assert ["learning_rate", "0.01", "0.5"] in lines
    assert "[b]other" in result.stdout
    assert result.stderr == f"{tmp_path / 'page.html'}\n"
    assert "2 of 2" in (tmp_path / "page.html").read_text(encoding="utf-8")
    answer = json.loads(kindling("compare", run, other, "--json", "--out", tmp_path / "page.html").stdout)
    assert [each["run"] for each in answer["runs"]] == [str(run), str(other)]
    assert answer["settings"]["learning_rate"] == [0.01, 0.5]


def test_compare_needs_two_runs_that_have_begun(run, tmp_path):
    assert_refused(kindling("compare", run, "--out", tmp_path / "page.html"), "name at least two runs to compare")
    assert_refused(kindling("compare", run, tmp_path, "--out", tmp_path / "page.html"), "is not a run directory")
    assert not (tmp_path / "page.html").exists()


def test_prep_is_the_other_package(text_folder, tmp_path):
    result = kindling("prep", "build", text_folder, "--out", tmp_path / "d", "--vocab-size", 300, "--workers", 1)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "d" / "manifest.json").is_file()


def test_an_unknown_option_before_the_recipe_is_told_as_such(tmp_path):
    result = CliRunner().invoke(main, ["train", "--stpes", "5", "tiny", "--run", str(tmp_path / "r")])
    assert 'unknown option --stpes: did you mean "--steps"?' in result.stderr


def test_a_run_that_is_a_file_is_the_persons_mistake(dataset, tmp_path):
    (tmp_path / "f").write_text("x")
    result = CliRunner().invoke(main, ["train", "tiny", "--data", str(dataset.directory), "--run", str(tmp_path / "f")])
    assert result.exit_code == 2


def test_a_fill_that_cannot_be_filled_is_told_before_training(dataset, tmp_path):
    arguments = "--num-layers 1 --hidden-size 32 --num-heads 2 --context-length 32 --batch-tokens 128 --steps 2"
    result = CliRunner().invoke(
        main,
        [
            "train",
            "tiny",
            "--data",
            str(dataset.directory),
            "--run",
            str(tmp_path / "r"),
            *arguments.split(),
            "--fills",
            '["no mask here"]',
        ],
    )
    assert result.exit_code == 0 or not (tmp_path / "r").exists()


def test_the_harness_is_named_where_it_is_not_installed(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert_refused(kindling("harness", run, "--tasks", "blimp"), 'pip install "kindling-lm[harness]"')
