"""Fine-tuning end to end, on the smallest pretrained run there is."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.finetuning.finetune import finetune
from lm.finetuning.predict import open_predictor, predict, read_inputs
from lm.runs import checkpoint
from lm.runs.base_weights import BASE, starting_trunk
from lm.runs.directory import open_run
from tests.conftest import StopAt

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("kind", "metric", "least"),
    [("classification", "accuracy", 0.95), ("regression", "pearson", 0.9), ("tokens", "accuracy", 0.95),
     ("choice", "accuracy", 0.95), ("pair", "loss", 0.0)],
)  # fmt: skip
def test_every_kind_of_task_is_learned(kind, metric, least, task_settings, recorder, tmp_path):
    done = finetune(task_settings(kind, pairs="together"), tmp_path / "run", recorder)
    assert done.scores[metric] > least
    losses = [line["loss"] for line in recorder.lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert done.checkpoint("best").step == done.step


def test_pairs_that_are_read_apart_are_learned_and_answered_like_alone(task_settings, task_files, recorder, tmp_path):
    done = finetune(task_settings("pair", epochs=20), tmp_path / "run", recorder)
    assert done.scores["accuracy"] > 0.8
    assert "pairs are read apart" in " ".join(recorder.notes)
    predictor = open_predictor(done.path, CPU)
    examples = list(read_inputs(predictor, task_files["pair"][1]))
    together = [found for found, _ in predict(predictor, examples)]
    for number in (0, 7, 33):
        ((alone, _),) = predict(predictor, [examples[number]])
        assert alone["label"] == together[number]["label"]
        assert alone["probabilities"] == pytest.approx(together[number]["probabilities"], abs=1e-5)


@pytest.mark.parametrize(
    "changes", [{"method": "lora", "lora_rank": 4}, {"method": "probe"}, {"reads": "causal"}, {"weights": "random"}]
)
def test_every_method_learns_and_moves_only_what_it_may(changes, task_settings, recorder, tmp_path, trained):
    done = finetune(task_settings("classification", **changes), tmp_path / "run", recorder)
    names = done.newest().model().keys()
    if changes.get("method") == "lora":
        assert {name.split(".")[-1] for name in names if not name.startswith("head.")} == {"a", "b"}
        assert done.trained_parameters < 0.3 * sum(t.numel() for t in trained.newest().model().values())
    if changes.get("method") == "probe":
        assert names == {"head.weight", "head.bias"}
        assert recorder.lines[-1]["metrics"]["loss"] < recorder.lines[0]["loss"]  # little, of features that say little
    else:
        assert done.scores["accuracy"] > (0.7 if changes.get("weights") == "random" else 0.9)


def assert_same_run(a: Path, b: Path) -> None:
    differ = {"tokens_per_second", "memory_bytes"}
    lines = [
        [{n: v for n, v in line.items() if n not in differ} for line in open_run(path).metrics()] for path in (a, b)
    ]
    assert lines[0] == lines[1]
    assert checkpoint.steps(a / "checkpoints") == checkpoint.steps(b / "checkpoints")
    for step in checkpoint.steps(a / "checkpoints"):
        first, second = (checkpoint.of_step(path / "checkpoints", step) for path in (a, b))
        assert first.state == second.state
    for name in ("config.toml", "answers.json", "tokenizer.json", BASE):
        assert (a / name).read_bytes() == (b / name).read_bytes()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_fine_tuning_that_was_cut_off_ends_as_if_undisturbed(method, task_settings, recorder, tmp_path):
    config = task_settings("classification", method=method, dropout=0.2, checkpoint_every=5, log_every=3, patience=2)
    finetune(config, tmp_path / "through", recorder)
    for stop in (3, 17, 31):
        with pytest.raises(InterruptedError):
            finetune(config, tmp_path / "run", StopAt(stop))
    finetune(config, tmp_path / "run", recorder)
    assert_same_run(tmp_path / "run", tmp_path / "through")


def test_finetune_py_killed_and_called_again_ends_as_if_undisturbed(
    task_settings, trained, task_files, recorder, tmp_path
):
    train, validation = task_files["classification"]
    config = task_settings("classification", epochs=8, checkpoint_every=3, dropout=0.1)
    finetune(config, tmp_path / "through", recorder)
    command = [
        *(sys.executable, "finetune.py", trained.path, "--task", "classification", "--train", train),
        *("--validation", validation, "--run", tmp_path / "run", "--epochs", 8, "--batch-examples", 16),
        *("--learning-rate", 0.01, "--dropout", 0.1, "--threads", 1, "--checkpoint-every", 3),
    ]
    command = list(map(str, command))
    first = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    while not checkpoint.steps(tmp_path / "run" / "checkpoints"):
        assert first.poll() is None, first.stderr.read()
        time.sleep(0.05)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[0] < 96
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_same_run(tmp_path / "run", tmp_path / "through")


def test_early_stopping_ends_the_run_keeps_the_best_and_does_not_resume(task_settings, recorder, tmp_path):
    config = task_settings("classification", epochs=20, patience=2, validations_per_epoch=3, judged_by="accuracy")
    done = finetune(config, tmp_path / "run", recorder)
    judged = [(line["step"], line["metrics"]["accuracy"]) for line in done.metrics() if "metrics" in line]
    best = max(value for _, value in judged)
    assert done.step == next(step for step, value in judged if value == best)
    assert [step for step, _ in judged].index(done.step) == len(judged) - 3
    assert judged[-1][0] < config.replace(steps=240).training.steps
    assert any("2 validations in a row without improvement" in note for note in recorder.notes)
    lines = list(done.metrics())
    finetune(config, tmp_path / "run", recorder)
    assert recorder.notes[-1].startswith(f"{tmp_path / 'run'} is trained")
    assert list(done.metrics()) == lines


def test_another_task_or_data_is_refused_and_more_epochs_are_not(task_settings, task_files, recorder, tmp_path):
    finetune(task_settings("classification", epochs=1), tmp_path / "run", recorder)
    with pytest.raises(UserError, match=r"was started with method 'full' \(now 'lora'\): choose another --run"):
        finetune(task_settings("classification", method="lora"), tmp_path / "run", recorder)
    with pytest.raises(UserError, match="was trained on other data"):
        finetune(task_settings("classification", train=task_files["classification"][1]), tmp_path / "run", recorder)
    assert finetune(task_settings("classification", epochs=2), tmp_path / "run", recorder).newest().step == 24


def test_what_was_cut_off_before_its_first_checkpoint_starts_over_with_the_base_that_is_named_now(
    task_settings, trained, quietly, small, recorder, tmp_path
):
    other = quietly(small.replace(steps=2, seed=5), tmp_path / "other")
    with pytest.raises(InterruptedError):
        finetune(task_settings("classification", base=str(other.path)), tmp_path / "run", StopAt(1))
    done = finetune(task_settings("classification", epochs=1), tmp_path / "run", recorder)
    assert (done.path / BASE).read_bytes() == trained.plain_weights().read_bytes()


def test_a_base_that_trains_on_does_not_change_what_was_begun(task_settings, classifier, trained):
    base = classifier.path / BASE
    assert base.read_bytes() == (trained.newest().path / "model.safetensors").read_bytes()
    trunk = starting_trunk(classifier.config, classifier.path)
    for name, tensor in trained.newest().model().items():
        assert torch.equal(trunk.state_dict()[name], tensor)


def test_layer_decay_slows_the_lower_blocks(task_settings, recorder, tmp_path, trained):
    done = finetune(task_settings("classification", layer_decay=0.1, epochs=1), tmp_path / "run", recorder)
    after, before = done.newest().model(), trained.newest().model()
    moved = [
        float((after[f"trunk.{n}"] - before[n]).abs().mean())
        for n in (f"blocks.{b}.attention.value.weight" for b in (0, 1))
    ]
    assert moved[0] < 0.3 * moved[1]


def test_a_run_with_a_head_writes_no_text_and_a_plain_run_answers_nothing(classifier, trained):
    with pytest.raises(UserError, match="for classification and is no longer a language model: use kindling predict"):
        classifier.load_model(CPU)
    with pytest.raises(UserError, match="was not fine-tuned on a task with a head: kindling finetune"):
        open_predictor(trained.path, CPU)
    result = CliRunner().invoke(main, ["sample", str(classifier.path), "--prompt", "a"])
    assert (result.exit_code, "use kindling predict" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": ""}, "name a file with training examples: --train FILE"),
        ({"task": "none"}, "choose a task, for example --task classification"),
        ({"train": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"label_column": "answer"}, "there is no column"),
        ({"judged_by": "pearson"}, "judged_by pearson is for regression"),
    ],
)
def test_an_invalid_task_is_refused_before_anything_is_written(changes, words, task_settings, recorder, tmp_path):
    with pytest.raises(UserError, match=words):
        finetune(task_settings("classification", **changes), tmp_path / "run", recorder)
    assert not (tmp_path / "run").exists()


def test_labels_that_were_not_trained_are_reported_with_file_and_line(task_settings, write_rows, recorder, tmp_path):
    validation = write_rows(tmp_path / "v.jsonl", [{"text": "a", "label": "place"}, {"text": "b", "label": "thing"}])
    with pytest.raises(UserError, match=r'v\.jsonl, line 2: the label "thing" does not occur in the training examples'):
        finetune(task_settings("classification", validation=validation), tmp_path / "run", recorder)


def test_seeds_are_runs_of_their_own_with_mean_and_deviation(trained, task_files, tmp_path):
    train, validation = task_files["classification"]
    arguments = [
        "--task",
        "classification",
        "--train",
        train,
        "--validation",
        validation,
        "--run",
        str(tmp_path / "out"),
    ]
    more = ["--epochs", "1", "--batch-examples", "32", "--threads", "1", "--seeds", "3,4", "--json"]
    result = CliRunner().invoke(main, ["finetune", str(trained.path), *arguments, *more])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    values = [run["metrics"]["loss"] for run in told["runs"]]
    assert [Path(run["run"]).name for run in told["runs"]] == ["seed_3", "seed_4"]
    assert values[0] != values[1]
    assert told["mean"]["loss"] == pytest.approx(sum(values) / 2)
    assert told["sd"]["loss"] == pytest.approx(abs(values[0] - values[1]) / 2**0.5)


@pytest.mark.parametrize("validates", [True, False])
def test_the_final_numbers_say_which_step_they_are_of(validates, trained, task_files, tmp_path):
    train, validation = task_files["classification"]
    more = ["--validation", validation] if validates else []
    arguments = ["--task", "classification", "--train", train, *more, "--epochs", "0.9", "--threads", "1"]
    result = CliRunner().invoke(main, ["finetune", str(trained.path), *arguments, "--run", str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    lines = [line.split() for line in result.stdout.splitlines()]
    assert lines[0] == ["step", "6"]
    assert [name for name, _ in lines[1:]][:2] == (["loss", "accuracy"] if validates else [])
    which = "best step: 6" if validates else "last step: 6"
    following = f"next: kindling predict {tmp_path / 'out'} --input FILE --output FILE"
    assert f"{which}; {following}\n" in result.stderr
    assert "6 steps x 32 examples = 1.00 epochs (0.9, rounded up to whole steps)" in result.stderr


def test_the_help_explains_every_setting_of_a_fine_tuning():
    told = CliRunner().invoke(main, ["finetune", "--help-all"]).stdout
    for option in (
        "--task",
        "--method",
        "--lora-rank",
        "--epochs",
        "--dropout",
        "--learning-rate",
        "--seed",
        "--patience",
    ):
        assert option in told
    assert "--steps" not in told
    assert "--objective" not in told
