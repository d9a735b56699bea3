"""Continued pretraining: a run that begins with the weights of another."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.config.settings import Config
from lm.runs.base_weights import BASE
from lm.runs.directory import open_run
from lm.training import pretraining
from lm.training.distributed import Ranks
from lm.training.learning_rates import lr_multipliers
from lm.training.pretraining import Pretraining, train
from tests.conftest import StopAt


def test_a_run_begins_with_the_weights_of_another_and_learns_from_new_data(trained, other_dataset, tmp_path):
    arguments = ["--init-from", trained.path, "--data", other_dataset.directory, "--run", tmp_path / "run"]
    more = ["--steps", 4, "--log-every", 1, "--learning-rate", 0.001, "--muon-learning-rate", 0.001]
    result = CliRunner().invoke(main, ["train", *map(str, (*arguments, *more))])
    assert result.exit_code == 0, result.output
    run = open_run(tmp_path / "run")
    assert run.config.model == trained.config.model
    first = next(line["loss"] for line in run.metrics() if "loss" in line)
    begun = next(line["loss"] for line in trained.metrics() if "loss" in line)
    assert first < 0.7 * begun
    assert (run.path / BASE).read_bytes() == (trained.newest().path / "model.safetensors").read_bytes()


def test_it_goes_on_as_if_undisturbed_whatever_becomes_of_the_other(trained, small, quietly, tmp_path, monkeypatch):
    config = small.replace(steps=6, init_from=str(trained.path), dropout=0.1, checkpoint_every=2)
    whole = quietly(config, tmp_path / "whole")

    with pytest.raises(InterruptedError):
        train(config, tmp_path / "run", StopAt(4))
    monkeypatch.setattr(pretraining, "open_run", lambda path: pytest.fail("the other run was asked again"))
    run = quietly(config, tmp_path / "run")
    for name, tensor in whole.newest().model().items():
        assert torch.equal(run.newest().model()[name], tensor)


def test_a_run_of_another_shape_or_tokenizer_is_refused(trained, small, byte_dataset, quietly, tmp_path):
    with pytest.raises(UserError, match="has a model of another shape: without a recipe"):
        quietly(small.replace(init_from=str(trained.path), hidden_size=64), tmp_path / "run")
    with pytest.raises(UserError, match="was made with another tokenizer than"):
        other = small.replace(init_from=str(trained.path), data=(str(byte_dataset.directory),), vocab_size=400)
        quietly(other, tmp_path / "run")
    with pytest.raises(UserError, match="there is no run directory"):
        quietly(small.replace(init_from=str(tmp_path / "nowhere")), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_fine_tuning_is_not_trained_further_as_pretraining(classifier):
    result = CliRunner().invoke(main, ["train", "--run", str(classifier.path), "--resume"])
    assert (result.exit_code, "is a fine-tuning run: kindling finetune resumes it" in result.stderr) == (2, True)


def test_a_compiled_run_learns_what_a_plain_one_learns(small, quietly, tmp_path):
    config = small.replace(num_layers=1, steps=4, log_every=1)
    losses = [
        [
            line["loss"]
            for line in quietly(config.replace(compile=setting), tmp_path / str(setting)).metrics()
            if "loss" in line
        ]
        for setting in (False, True)
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != losses[1]  # it was another program that computed them


@pytest.mark.parametrize("objective", ["hybrid", "next_token:0.5,simclr:0.5"])
def test_a_compiled_run_that_was_cut_off_ends_with_the_same_bits(objective, small, quietly, tmp_path):
    """The views of a text have other shapes in each step, more than the compiler would make programs for."""
    config = small.replace(num_layers=1, steps=24, checkpoint_every=8, dropout=0.1, compile=True, view_tokens=16)
    config = config.replace(objective=objective)
    through = quietly(config, tmp_path / "through")
    torch._dynamo.reset()  # as in a new process
    with pytest.raises(InterruptedError):
        train(config, tmp_path / "run", StopAt(12))
    torch._dynamo.reset()
    resumed = quietly(config, tmp_path / "run")
    for name, tensor in through.newest().model().items():
        assert torch.equal(tensor, resumed.newest().model()[name]), name


def test_where_there_is_no_compiler_one_sentence_says_so(small, quietly, tmp_path, monkeypatch):
    def broken(*_: object) -> None:
        raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no C++ compiler"), None)

    monkeypatch.setattr(pretraining, "step_gradients", broken)
    with pytest.raises(UserError, match=r"could not be compiled: .*; --compile false trains without"):
        quietly(small.replace(compile=True), tmp_path / "run")


def test_several_processes_are_not_compiled(small, tmp_path):
    ranks = Ranks()
    ranks.world = 2
    with pytest.raises(UserError, match="leave out --compile"):
        Pretraining.open(small.replace(compile=True), tmp_path / "run", ranks)


def test_embedding_head_and_lower_blocks_may_learn_at_rates_of_their_own():
    config = Config().replace(stem_learning_rate=0.5, head_learning_rate=3.0, layer_decay=0.5, num_layers=2)
    names = ["embedding.weight", "blocks.0.x", "blocks.1.x", "norm.weight", "projector.first.weight", "head.blocks.0.x"]
    found = lr_multipliers(config, names)
    assert found == {names[0]: 0.0625, names[1]: 0.25, names[2]: 0.5, names[4]: 3.0, names[5]: 3.0}
    assert lr_multipliers(Config(), names) == {}
