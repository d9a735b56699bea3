"""A task's batches and gradients: the same for every micro-batch, weighted as the settings say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from lm.finetuning.finetune import Finetuning, finetune, settle_reading
from lm.finetuning.head_task import HEADS, HeadTask
from lm.runs.base_weights import BASE, keep_base, starting_trunk
from lm.training.distributed import Ranks
from lm.training.learning_rates import lr_multipliers


@pytest.fixture
def task(task_settings, tmp_path):
    def made(kind, **changes) -> HeadTask:
        return Finetuning(task_settings(kind, **changes), tmp_path, Ranks()).task

    return made


def gradient_of(task: HeadTask, path: Path) -> tuple[float, dict[str, torch.Tensor]]:
    model = task.model(starting_trunk(task.config, path))
    losses, shares = task.gradients(model, task.batch(np.arange(24), np.zeros(24, int)), 0)
    assert shares == {task.kind: 1.0}
    return float(losses[task.kind]), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["classification", "regression", "tokens", "choice"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind, task, trained, tmp_path):
    keep_base(trained.newest().path / "model.safetensors", tmp_path)
    whole, small = (gradient_of(task(kind, micro_batch_tokens=most), tmp_path) for most in (4096, 40))
    assert whole[0] == pytest.approx(small[0], rel=1e-5)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(small[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_balanced_classes_count_alike_in_the_loss(task, write_rows, tmp_path):
    rows = [{"text": "a fox", "label": int(n % 8 == 0)} for n in range(32)]
    path = write_rows(tmp_path / "skewed.jsonl", rows)
    for how, share in (("none", 1 / 8), ("balanced", 1 / 2)):
        (part,) = task("classification", train=path, validation="", class_weights=how).batch(
            np.arange(32), np.zeros(32, int)
        )
        assert float(part.weights.sum()) == pytest.approx(1)
        assert float(part.weights[part.targets == 1].sum()) == pytest.approx(share)


def test_an_epoch_has_every_example_once_in_a_new_order(task_settings, tmp_path):
    module = Finetuning(task_settings("classification", epochs=2), tmp_path, Ranks())
    seen: list[int] = []
    module.task.batch = lambda numbers, epochs: seen.extend(numbers.tolist())
    for step in range(module.config.training.steps):
        module.batch(step)
    first, second = seen[:192], seen[192:]
    assert sorted(first) == sorted(second) == list(range(192))
    assert first != second
    assert first != sorted(first)


def test_reading_follows_what_the_base_has_learned(task_settings):
    config = task_settings("classification")
    for objective, reads, pooling in (("hybrid", "bidirectional", "mean"), ("next_token", "causal", "last")):
        task = settle_reading(config.replace(objective=objective)).finetune
        assert (task.reads, task.pooling, task.judged_by) == (reads, pooling, "accuracy")
    assert settle_reading(config.replace(reads="causal", pooling="mean")).finetune.pooling == "mean"
    assert settle_reading(config.replace(task="regression")).finetune.judged_by == "spearman"


def test_a_metric_that_is_not_measured_is_refused(task, trained, tmp_path):
    keep_base(trained.newest().path / "model.safetensors", tmp_path)
    choice = task("choice", judged_by="macro_f1")
    with pytest.raises(
        UserError, match="judged_by macro_f1 is not measured for this task: choose one of loss, accuracy"
    ):
        choice.validate(choice.model(starting_trunk(choice.config, tmp_path)))


def test_layers_below_learn_more_slowly(task_settings):
    names = ["trunk.embedding.weight", "trunk.blocks.0.x", "trunk.blocks.1.x", "trunk.norm.weight", "head.weight"]
    assert lr_multipliers(task_settings("classification"), names) == {}
    found = lr_multipliers(task_settings("classification", layer_decay=0.5), names)
    assert found == {names[0]: 0.125, names[1]: 0.25, names[2]: 0.5}


def test_a_base_that_is_damaged_or_missing_is_reported(task_settings, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        starting_trunk(task_settings("classification"), tmp_path)
    (tmp_path / BASE).write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        starting_trunk(task_settings("classification"), tmp_path)


def test_without_a_bias_a_regression_is_scaled_and_not_centered(task_settings, tmp_path, recorder):
    settings = task_settings("regression", epochs=0.1, reads="causal")
    assert settle_reading(settings).finetune.head_bias == "true"
    done = finetune(settings.replace(head_bias="false"), tmp_path / "run", recorder)
    answers = HEADS["regression"].load(done.path)
    assert answers.mean == 0
    values = [json.loads(line)["label"] for line in Path(settings.finetune.train).read_text().splitlines()]
    assert answers.deviation == pytest.approx(np.sqrt(np.mean(np.square(values))))
    assert "head.bias" not in done.newest().model()
