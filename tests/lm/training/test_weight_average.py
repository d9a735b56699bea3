"""The mean of the last weights, against a mean in float64 of the weights in the checkpoints of every step."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.data.datasets import open_training_data
from lm.finetuning.finetune import finetune
from lm.model.transformer import Transformer
from lm.runs import checkpoint
from lm.runs.base_weights import BASE
from lm.runs.checkpoint import load_tensors
from lm.runs.directory import open_run
from lm.training.memory_estimate import step_memory
from lm.training.pretraining import train
from lm.training.validation import validate_readouts
from lm.training.weight_average import WeightAverage, is_averaged
from tests.conftest import StopAt
from tests.lm.training.test_torchrun import torchrun

EVERY_STEP = {"checkpoint_every": 1, "keep_every": 1, "validate_every": 3, "log_every": 1}


def mean_of(run, first: int, last: int) -> dict[str, torch.Tensor]:
    saved = [checkpoint.of_step(run.path / "checkpoints", step).model() for step in range(first, last + 1)]
    return {name: torch.stack([each[name].double() for each in saved]).mean(0) for name in saved[0]}


def assert_near(found, expected) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float32
        torch.testing.assert_close(found[name].double(), tensor, rtol=1e-6, atol=1e-7)


@pytest.fixture(scope="module")
def averaged(small, quietly, tmp_path_factory):
    """Ten steps, with a mean over the last four of them."""
    config = small.replace(steps=10, average_last=0.4, learning_rate=0.02, **EVERY_STEP)
    return quietly(config, tmp_path_factory.mktemp("averaged") / "run")


def test_the_average_is_the_mean_of_the_weights_after_the_last_steps(averaged):
    assert_near(averaged.checkpoint("average").model(), mean_of(averaged, 7, 10))
    eighth = checkpoint.of_step(averaged.path / "checkpoints", 8)
    assert_near(eighth.average().model(), mean_of(averaged, 7, 8))
    assert eighth.state["training"]["averaged"] == 2
    assert not checkpoint.of_step(averaged.path / "checkpoints", 6).has_average
    last, mean = averaged.checkpoint("newest"), averaged.checkpoint("average")
    assert mean.weights_sha256 != last.weights_sha256
    assert any(not torch.equal(mean.model()[name], tensor) for name, tensor in last.model().items())


def test_averaging_does_not_change_what_is_learned(averaged, quietly, tmp_path):
    plain = quietly(averaged.config.replace(average_last=0.0), tmp_path / "plain")
    for name, tensor in plain.newest().model().items():
        assert torch.equal(tensor, averaged.newest().model()[name]), name
    assert not plain.newest().has_average
    with pytest.raises(UserError, match=r"has no average of its weights at step 10: average_last"):
        plain.checkpoint("average")


def test_a_validation_judges_both_and_best_is_the_better_one(averaged):
    lines = {line["step"]: line for line in averaged.metrics() if "validation" in line}
    assert [step for step, line in lines.items() if "average" in line] == [9, 10]
    model = averaged.load_model(torch.device("cpu"), averaged.checkpoint("average"))
    data = open_training_data(averaged.config.data.data)
    assert lines[10]["average"]["validation"] == validate_readouts(model, data, averaged.config)

    def score(line):
        return sum(loss["nats_per_token"] for loss in line["validation"].values())

    scores = {(step, False): score(line) for step, line in lines.items()}
    scores |= {(step, True): score(line["average"]) for step, line in lines.items() if "average" in line}
    step, is_average = min(scores, key=lambda at: scores[at])
    best = averaged.checkpoint("best")
    assert (best.step, best.is_average) == (step, is_average)


def test_a_mean_that_is_better_is_the_best_checkpoint(small, quietly, tmp_path):
    """At a high rate that never falls, the mean of the last weights is the better model."""
    fast = {"learning_rate": 0.05, "muon_learning_rate": 0.1, "decay_fraction": 0.0}
    run = quietly(small.replace(steps=60, average_last=0.5, validate_every=60, **fast), tmp_path / "run")
    best = run.checkpoint("best")
    assert best.is_average
    assert best.weights_sha256 == run.checkpoint("average").weights_sha256 != run.newest().weights_sha256
    assert torch.equal(best.model()["norm.weight"], run.checkpoint("average").model()["norm.weight"])


def test_a_run_that_was_cut_off_in_the_middle_of_the_mean_ends_with_the_same_one(averaged, quietly, tmp_path):
    config = averaged.config.replace(checkpoint_every=3, keep_every=0)
    for stop in (5, 8):
        with pytest.raises(InterruptedError):
            train(config, tmp_path / "run", StopAt(stop))
    resumed = quietly(config, tmp_path / "run")
    for name, tensor in averaged.checkpoint("average").model().items():
        assert torch.equal(tensor, resumed.checkpoint("average").model()[name]), name
    assert resumed.newest().state["training"] == averaged.newest().state["training"]


def test_a_longer_run_averages_its_own_last_steps(averaged, quietly, tmp_path):
    config = averaged.config.replace(steps=4)  # averages steps 3 and 4
    quietly(config, tmp_path / "run")
    run = quietly(config.replace(steps=10), tmp_path / "run")
    assert_near(run.checkpoint("average").model(), mean_of(run, 7, 10))


@pytest.mark.parametrize(
    ("steps", "share", "first"), [(10, 0.4, 7), (1000, 0.2, 801), (3, 0.01, 3), (7, 1.0, 1), (10, 0.25, 9)]
)
def test_the_last_steps_are_counted(steps, share, first):
    assert [is_averaged(step, steps, share) for step in range(1, steps + 1)] == [
        step >= first for step in range(1, steps + 1)
    ]
    assert not is_averaged(steps, steps, 0.0)


def test_the_mean_takes_the_place_of_the_weights_and_gives_it_back_even_after_an_error(small):
    model = Transformer(small.replace(vocab_size=50).model).initialize(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    average = WeightAverage(model)
    average.add(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    after = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyError), average.swapped():
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        raise KeyError
    assert all(torch.equal(tensor, after[name]) for name, tensor in model.state_dict().items())
    assert all(torch.equal(mean, before[name]) for name, mean in average.means.items())


def test_the_commands_take_the_average(averaged, tmp_path):
    for arguments in (
        ["sample", averaged.path, "--prompt", "The", "--max-new-tokens", 3, "--checkpoint", "average"],
        ["evaluate", averaged.path, "--checkpoint", "average", "--json"],
        ["export", averaged.path, "--to", "hf", "--out", tmp_path / "out", "--checkpoint", "average"],
    ):
        result = CliRunner().invoke(main, list(map(str, arguments)))
        assert result.exit_code == 0, result.output
    exported = load_tensors(tmp_path / "out" / "model.safetensors")
    expected = averaged.checkpoint("average").model()["norm.weight"]
    assert torch.equal(exported["model.norm.weight"], expected)
    assert "mean of those after each of the last 4 steps" in (tmp_path / "out" / "README.md").read_text()


def test_fine_tuning_starts_from_the_average_and_keeps_one_of_its_own(averaged, task_settings, recorder, tmp_path):
    config = task_settings("classification", checkpoint="average", average_last=0.5, epochs=2, **EVERY_STEP)
    config = config.replace(base=str(averaged.path), validations_per_epoch=4)
    done = finetune(config, tmp_path / "run", recorder)
    kept, expected = load_tensors(done.path / BASE), averaged.checkpoint("average").model()
    assert all(torch.equal(kept[name], tensor) for name, tensor in expected.items())
    assert_near(done.checkpoint("average").model(), mean_of(done, done.config.training.steps // 2 + 1, 24))
    metrics = [line for line in done.metrics() if "metrics" in line]
    found = metrics[-1]["average"]["metrics"]
    assert found.keys() == metrics[-1]["metrics"].keys()
    best = done.checkpoint("best")
    line = next(line for line in metrics if line["step"] == best.step)
    assert done.scores == (line["average"] if best.is_average else line)["metrics"]


def test_a_table_of_tasks_takes_the_average_in_all_rows(averaged, task_files, tmp_path):
    train, test = task_files["classification"]
    command = ["tasks", averaged.path, "--task", "classification", "--train", train, "--test", test, "--seeds", 0]
    command += ["--rows", "probe,full", "--epochs", 0.2, "--device", "cpu", "--keep-runs", "--out"]
    for which in ("average", "newest"):
        result = CliRunner().invoke(main, [str(word) for word in (*command, tmp_path / which, "--checkpoint", which)])
        assert result.exit_code == 0, result.output
        (base,) = (tmp_path / which).glob(f"runs/*/*/run/{BASE}")
        expected = averaged.checkpoint(which).model()
        assert all(torch.equal(load_tensors(base)[name], tensor) for name, tensor in expected.items())
    probes = [(tmp_path / which / "cells").rglob("probe-0.json") for which in ("average", "newest")]
    assert next(probes[0]).read_text() != next(probes[1]).read_text()


def test_a_run_of_slices_averages_its_slices(small, tmp_path):
    config = small.replace(steps=6, average_last=0.5, parallel="fsdp", sharded_checkpoints="always", **EVERY_STEP)
    launcher = torchrun(config, tmp_path / "run", tmp_path)
    told = launcher.communicate(timeout=240)[1]
    assert launcher.returncode == 0, told
    run = open_run(tmp_path / "run")
    assert run.newest().state["slices"] == 2
    assert_near(dict(run.checkpoint("average").model()), mean_of(run, 4, 6))
    model = run.load_model(torch.device("cpu"), run.checkpoint("average"))
    (line,) = [line for line in run.metrics() if line["step"] == 6 and "validation" in line]
    expected = validate_readouts(model, open_training_data(run.config.data.data), run.config)
    for readout, loss in expected.items():
        assert line["average"]["validation"][readout] == pytest.approx(loss, abs=1e-5)


def test_the_memory_of_the_average_is_counted(small):
    config = small.replace(vocab_size=300)
    plain, more = (step_memory(each, 8, torch.device("cpu")) for each in (config, config.replace(average_last=0.2)))
    weights = 4 * sum(p.numel() for p in Transformer(config.model).parameters())
    assert (plain.average, more.average) == (0, weights)
    assert more.total == plain.total + weights
