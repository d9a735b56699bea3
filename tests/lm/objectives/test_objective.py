"""An objective with a memory of its own: saved with each checkpoint, restored with it, moved once a step."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from lm.config.objective_settings import IMAGE_OBJECTIVES, OBJECTIVES
from lm.config.settings import Config
from lm.data.batch import Batch, Vocabulary
from lm.objectives import batches
from lm.objectives.objective import open_objective
from lm.objectives.text import TextObjective
from lm.training.pretraining import train
from tests.conftest import Recorder


class WithTeacher(TextObjective):
    """Next-token prediction, pulled toward the mean of the student's embeddings over time."""

    def __init__(self, config: Config, vocabulary: Vocabulary) -> None:
        super().__init__(config, vocabulary)
        self.steps: list[int] = []

    def loss(self, model: nn.Module, batch: Batch) -> dict[str, Tensor]:
        apart = (model.embedding.weight - self.memory.weight).square().sum() * (len(batch) / 8)
        return {**super().loss(model, batch), "apart": 1e-3 * apart}

    def begin(self, model: nn.Module) -> None:
        teacher = model.embedding.weight.detach().clone()
        self.memory = nn.Embedding.from_pretrained(teacher, freeze=True)

    def after_step(self, model: nn.Module, step: int) -> None:
        self.steps.append(step)
        self.memory.weight.lerp_(model.embedding.weight.detach(), 0.1)


@pytest.fixture
def opened(monkeypatch):
    """The objectives that runs open."""
    made: list[WithTeacher] = []

    def make(config, vocabulary):
        made.append(WithTeacher(config, vocabulary))
        return made[-1]

    monkeypatch.setattr(batches, "open_objective", make)
    return made


def weights(run) -> dict[str, Tensor]:
    return run.newest().model() | {"objective": run.newest().objective()["weight"]}


def test_every_objective_of_the_table_opens_and_has_its_readouts():
    for name, (_, readouts) in OBJECTIVES.items():
        config = Config().replace(objective=name, vocab_size=50)
        if name in IMAGE_OBJECTIVES:
            config = config.replace(patch_size=4, image_size=8, image_channels=3, batch_images=4, context_length=4)
            config = config.replace(visual_codes=8)
        objective = open_objective(config)
        assert getattr(objective, "readouts", ()) == readouts
        model, batch = objective.new_model().initialize(0), objective.example(4)
        objective.begin(model)
        assert all(torch.isfinite(loss) for loss in objective.loss(model, batch).values())
        assert objective.flops_per_token(model, config.data.context_length) > 0


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_learns_from_a_residual_stream_in_bfloat16(name):
    config = Config().replace(objective=name, vocab_size=50, context_length=64, batch_tokens=256, view_tokens=16)
    if name in IMAGE_OBJECTIVES:
        config = config.replace(patch_size=4, image_size=8, image_channels=3, batch_images=4, visual_codes=8)
    losses = []
    for precision in ("float32", "bfloat16"):
        objective = open_objective(config.replace(residual_precision=precision, output_init=1.0))
        model, batch = objective.new_model().initialize(0, output_init=1.0), objective.example(4)
        objective.begin(model)
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(sum(objective.loss(model, batch).values()))
        losses[-1].backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=0.02)


def test_a_memory_is_saved_and_a_stopped_run_ends_with_the_same_bits(small, opened, quietly, tmp_path):
    config = small.replace(objective="next_token", steps=8, checkpoint_every=4, micro_batch_rows=4)
    run = quietly(config.replace(log_every=1), tmp_path / "whole")
    whole = weights(run)
    assert all(line["loss_apart"] > 0 for line in run.metrics() if "loss" in line and line["step"] > 1)
    assert opened[0].steps == list(range(8))
    assert not torch.equal(whole["objective"], whole["embedding.weight"])

    class Stop(Recorder):
        def step(self, step: int) -> None:
            if step == 5:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        train(config, tmp_path / "killed", Stop())
    again = weights(quietly(config, tmp_path / "killed"))
    assert opened[2].steps == [4, 5, 6, 7]
    for name, tensor in whole.items():
        assert torch.equal(again[name], tensor), name


def test_objectives_without_a_memory_write_no_file(small, quietly, tmp_path):
    run = quietly(small.replace(steps=2), tmp_path / "run")
    files = {path.name for path in run.newest().path.iterdir()}
    assert "objective.safetensors" not in files
    assert "objective.safetensors" not in json.dumps(run.newest().state)
    assert run.newest().objective() == {}
