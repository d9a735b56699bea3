"""Fine-tuning end to end, on the smallest pretrained run there is."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm import checkpoint
from lm.cli import main
from lm.finetune import finetune, finetune_config
from lm.predict import open_predictor
from lm.run_directory import open_run
from lm.starting import BASE, starting_trunk

ROOT = Path(__file__).parent.parent.parent
CPU = torch.device("cpu")
ANIMALS, PLACES = ("fox", "owl", "sparrow", "horse"), ("barn", "market", "river", "sky")


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sentence(draw: random.Random, word: str) -> str:
    before = " ".join(
        draw.choice(("the", "old", "young", "captain", "found", "carried")) for _ in range(draw.randint(0, 6))
    )
    after = " ".join(draw.choice(("again", "in", "morning", "boat", "lost")) for _ in range(draw.randint(0, 6)))
    return f"{before} {word} {after}".strip()


def rows_of(kind: str, count: int, seed: int) -> list[dict]:
    """Examples that a word decides: an animal or a place."""
    draw, rows = random.Random(seed), []
    for _ in range(count):
        is_place = draw.random() < 0.5
        word = draw.choice(PLACES if is_place else ANIMALS)
        text = sentence(draw, word)
        if kind == "classification":
            rows.append({"text": text, "label": "place" if is_place else "animal"})
        elif kind == "pair":
            other = draw.choice(PLACES + ANIMALS)
            rows.append({"text": word, "text_pair": other, "label": int((word in PLACES) == (other in PLACES))})
        elif kind == "regression":
            rows.append({"text": text, "label": 3.5 if is_place else 1.25})
        elif kind == "tokens":
            words = text.split()
            rows.append({"words": words, "tags": ["P" if w in PLACES else "A" if w in ANIMALS else "O" for w in words]})
        else:
            answers = [draw.choice(ANIMALS), draw.choice(PLACES)]
            rows.append({"text": "which one is a place?", "choices": answers if draw.random() < 0.5 else answers[::-1]})
            rows[-1]["label"] = int(rows[-1]["choices"][1] in PLACES)
    return rows


@pytest.fixture(scope="session")
def task_files(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """Of each kind of task a training and a validation file."""
    folder = tmp_path_factory.mktemp("tasks")
    kinds = ("classification", "pair", "regression", "tokens", "choice")
    return {
        kind: tuple(write(folder / f"{kind}-{part}.jsonl", rows_of(kind, n, n)) for part, n in (("t", 192), ("v", 64)))
        for kind in kinds
    }


@pytest.fixture(scope="session")
def settings(trained, task_files):
    """The settings of a fine-tuning of the trained run: (kind, **changes)."""

    def made(kind: str, **changes):
        train, validation = task_files[kind]
        task = {"task": "classification" if kind == "pair" else kind, "train": train, "validation": validation}
        usual = {"epochs": 4, "batch_examples": 16, "learning_rate": 0.01, "dropout": 0.0, "threads": 1}
        return finetune_config(trained, task | usual | changes)

    return made


@pytest.fixture(scope="session")
def classifier(settings, tmp_path_factory):
    from tests.conftest import Recorder

    return finetune(settings("classification"), tmp_path_factory.mktemp("finetuned") / "run", Recorder())


@pytest.mark.parametrize(
    ("kind", "metric", "least"),
    [("classification", "accuracy", 0.95), ("regression", "pearson", 0.9), ("tokens", "accuracy", 0.95),
     ("choice", "accuracy", 0.95), ("pair", "loss", 0.0)],
)  # fmt: skip
def test_every_kind_of_task_is_learned(kind, metric, least, settings, recorder, tmp_path):
    done = finetune(settings(kind), tmp_path / "run", recorder)
    assert done.metrics[metric] > least
    losses = [line["loss"] for line in recorder.lines if "loss" in line]
    assert losses[-1] < losses[0]
    assert done.run.checkpoint("best").step == done.step


@pytest.mark.parametrize(
    "changes", [{"method": "lora", "lora_rank": 4}, {"method": "probe"}, {"reads": "causal"}, {"weights": "random"}]
)
def test_every_method_learns_and_moves_only_what_it_may(changes, settings, recorder, tmp_path, trained):
    done = finetune(settings("classification", **changes), tmp_path / "run", recorder)
    names = done.run.newest().model().keys()
    if changes.get("method") == "lora":
        assert {name.split(".")[-1] for name in names if not name.startswith("head.")} == {"a", "b"}
        assert done.trained_parameters < 0.3 * sum(t.numel() for t in trained.newest().model().values())
    if changes.get("method") == "probe":
        assert names == {"head.weight", "head.bias"}
        assert recorder.lines[-1]["metrics"]["loss"] < recorder.lines[0]["loss"]  # little, of features that say little
    else:
        assert done.metrics["accuracy"] > 0.9


class StopAt:
    def __init__(self, step: int) -> None:
        self.at = step

    def note(self, text: str) -> None: ...
    def begin(self, done: int, total: int) -> None: ...
    def metrics(self, line: dict) -> None: ...
    def end(self) -> None: ...
    def step(self, step: int) -> None:
        if step == self.at:
            raise InterruptedError


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
def test_a_fine_tuning_that_was_cut_off_ends_as_if_undisturbed(method, settings, recorder, tmp_path):
    config = settings("classification", method=method, dropout=0.2, checkpoint_every=5, log_every=3, patience=2)
    finetune(config, tmp_path / "through", recorder)
    for stop in (3, 17, 31):
        with pytest.raises(InterruptedError):
            finetune(config, tmp_path / "run", StopAt(stop))
    finetune(config, tmp_path / "run", recorder)
    assert_same_run(tmp_path / "run", tmp_path / "through")


def test_finetune_py_killed_and_called_again_ends_as_if_undisturbed(settings, trained, task_files, recorder, tmp_path):
    train, validation = task_files["classification"]
    config = settings("classification", epochs=8, checkpoint_every=3, dropout=0.1)
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
        time.sleep(0.001)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert checkpoint.steps(tmp_path / "run" / "checkpoints")[0] < 96
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert_same_run(tmp_path / "run", tmp_path / "through")


def test_early_stopping_ends_the_run_keeps_the_best_and_does_not_go_on(settings, recorder, tmp_path):
    config = settings("classification", epochs=20, patience=2, validations_per_epoch=3, judged_by="accuracy")
    done = finetune(config, tmp_path / "run", recorder)
    judged = [(line["step"], line["metrics"]["accuracy"]) for line in done.run.metrics() if "metrics" in line]
    best = max(value for _, value in judged)
    assert done.step == next(step for step, value in judged if value == best)
    assert [step for step, _ in judged].index(done.step) == len(judged) - 3
    assert judged[-1][0] < config.replace(steps=240).training.steps
    assert any("2 validations in a row were no better than that of step" in note for note in recorder.notes)
    lines = list(done.run.metrics())
    finetune(config, tmp_path / "run", recorder)
    assert recorder.notes[-1].startswith(f"{tmp_path / 'run'} is trained")
    assert list(done.run.metrics()) == lines


def test_another_task_or_data_is_refused_and_more_epochs_are_not(settings, task_files, recorder, tmp_path):
    finetune(settings("classification", epochs=1), tmp_path / "run", recorder)
    with pytest.raises(UserError, match=r"was begun with method 'full' \(now 'lora'\): choose another --run"):
        finetune(settings("classification", method="lora"), tmp_path / "run", recorder)
    with pytest.raises(UserError, match="was trained on other data"):
        finetune(settings("classification", train=task_files["classification"][1]), tmp_path / "run", recorder)
    assert finetune(settings("classification", epochs=2), tmp_path / "run", recorder).run.newest().step == 24


def test_a_base_that_trains_on_does_not_change_what_was_begun(settings, classifier, trained):
    base = classifier.run.path / BASE
    assert base.read_bytes() == (trained.newest().path / "model.safetensors").read_bytes()
    trunk = starting_trunk(classifier.run.config, classifier.run.path)
    for name, tensor in trained.newest().model().items():
        assert torch.equal(trunk.state_dict()[name], tensor)


def test_layer_decay_slows_the_lower_blocks(settings, recorder, tmp_path, trained):
    done = finetune(settings("classification", layer_decay=0.1, epochs=1), tmp_path / "run", recorder)
    after, before = done.run.newest().model(), trained.newest().model()
    moved = [
        float((after[f"trunk.{n}"] - before[n]).abs().mean())
        for n in (f"blocks.{b}.attention.value.weight" for b in (0, 1))
    ]
    assert moved[0] < 0.3 * moved[1]


def test_a_run_with_a_head_writes_no_text_and_a_plain_run_answers_nothing(classifier, trained):
    with pytest.raises(UserError, match="is fine-tuned for classification and writes no text: kindling predict"):
        classifier.run.load_model(CPU)
    with pytest.raises(UserError, match="answers no task: kindling finetune"):
        open_predictor(trained.path, CPU)
    result = CliRunner().invoke(main, ["sample", str(classifier.run.path), "--prompt", "a"])
    assert (result.exit_code, "kindling predict asks it" in result.stderr) == (2, True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": ""}, "name the examples to learn from: --train FILE"),
        ({"task": "none"}, "name a task: --task classification"),
        ({"train": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"label_column": "answer"}, "there is no column"),
        ({"judged_by": "pearson"}, "judged_by pearson is for a regression"),
    ],
)
def test_what_is_wrong_with_a_task_is_told_before_anything_is_written(changes, words, settings, recorder, tmp_path):
    with pytest.raises(UserError, match=words):
        finetune(settings("classification", **changes), tmp_path / "run", recorder)
    assert not (tmp_path / "run").exists()


def test_labels_that_were_not_trained_are_told_with_file_and_line(settings, recorder, tmp_path):
    validation = write(tmp_path / "v.jsonl", [{"text": "a", "label": "place"}, {"text": "b", "label": "thing"}])
    with pytest.raises(UserError, match=r'v\.jsonl, line 2: the label "thing" does not occur in the training examples'):
        finetune(settings("classification", validation=validation), tmp_path / "run", recorder)


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


def test_the_help_explains_every_setting_of_a_fine_tuning():
    told = CliRunner().invoke(main, ["finetune", "--help"]).stdout
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
