"""A lesson's batches and gradients: the same for every micro-batch, weighted as the settings say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from lm.data.examples import Example
from lm.finetuning.answers import Answers
from lm.finetuning.finetune import Finetuning, settle_steps
from lm.finetuning.head_task import HeadTask, settle_reading
from lm.finetuning.layer_decay import learning_rates
from lm.runs.base_weights import BASE, keep_base, starting_trunk
from lm.training.distributed import Ranks


@pytest.fixture
def lesson(task_settings, trained):
    def made(kind, **changes) -> HeadTask:
        return HeadTask(settle_reading(task_settings(kind, **changes)), trained.tokenizer)

    return made


def gradient_of(lesson: HeadTask, path: Path) -> tuple[float, dict[str, torch.Tensor]]:
    model = lesson.model(starting_trunk(lesson.config, path))
    losses, shares = lesson.gradients(model, lesson.batch(np.arange(24)), 0)
    assert shares == {lesson.kind: 1.0}
    return float(losses[lesson.kind]), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["classification", "regression", "tokens", "choice"])
def test_micro_batches_give_the_gradient_of_the_whole_batch(kind, lesson, trained, tmp_path):
    keep_base(trained.newest().path / "model.safetensors", tmp_path)
    whole, small = (gradient_of(lesson(kind, micro_batch_tokens=most), tmp_path) for most in (4096, 40))
    assert whole[0] == pytest.approx(small[0], rel=1e-5)
    for name, gradient in whole[1].items():
        torch.testing.assert_close(small[1][name], gradient, rtol=1e-4, atol=1e-6)


def test_balanced_classes_count_alike_in_the_loss(lesson, write_rows, tmp_path):
    rows = [{"text": "a fox", "label": int(n % 8 == 0)} for n in range(32)]
    path = write_rows(tmp_path / "skewed.jsonl", rows)
    for how, share in (("none", 1 / 8), ("balanced", 1 / 2)):
        (part,) = lesson("classification", train=path, validation="", class_weights=how).batch(np.arange(32))
        assert float(part.weights.sum()) == pytest.approx(1)
        assert float(part.weights[part.labels == 1].sum()) == pytest.approx(share)


def test_an_epoch_has_every_example_once_in_an_order_of_its_own(task_settings, trained, tmp_path):
    config = settle_reading(task_settings("classification", epochs=2))
    lesson = HeadTask(config, trained.tokenizer)
    seen: list[int] = []
    lesson.batch = lambda numbers: seen.extend(numbers.tolist())
    work = Finetuning(settle_steps(config, 192), tmp_path, Ranks(), lesson, trained.tokenizer, trained.plain_weights())
    for step in range(work.config.training.steps):
        work.batch(step)
    first, second = seen[:192], seen[192:]
    assert sorted(first) == sorted(second) == list(range(192))
    assert first != second
    assert first != sorted(first)


def test_reading_follows_what_the_base_has_learnt(task_settings):
    config = task_settings("classification")
    for objective, reads, pooling in (("hybrid", "bidirectional", "mean"), ("next_token", "causal", "last")):
        task = settle_reading(config.replace(objective=objective)).finetune
        assert (task.reads, task.pooling, task.judged_by) == (reads, pooling, "accuracy")
    assert settle_reading(config.replace(reads="causal", pooling="mean")).finetune.pooling == "mean"
    assert settle_reading(config.replace(task="regression")).finetune.judged_by == "spearman"


def test_answers_are_kept_and_read_again(tmp_path):
    examples = [Example(("a", "b"), value, "") for value in (1.0, 2.0, 6.0)]
    answers = Answers.of("regression", examples)
    assert (answers.texts, answers.outputs, answers.mean) == (2, 1, 3.0)
    assert [answers.numbers("regression", e)[0] for e in examples] == pytest.approx(
        [(value - 3) / np.std([1, 2, 6]) for value in (1, 2, 6)]
    )
    answers.save(tmp_path)
    assert Answers.load(tmp_path) == answers
    (tmp_path / "answers.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        Answers.load(tmp_path)


def test_a_metric_that_is_not_measured_is_told(lesson, trained, tmp_path):
    keep_base(trained.newest().path / "model.safetensors", tmp_path)
    choice = lesson("choice", judged_by="macro_f1")
    with pytest.raises(UserError, match="judged_by macro_f1 is not measured here: choose one of loss, accuracy"):
        choice.validate(choice.model(starting_trunk(choice.config, tmp_path)))


def test_layers_below_learn_more_slowly(task_settings):
    names = ["trunk.embedding.weight", "trunk.blocks.0.x", "trunk.blocks.1.x", "trunk.norm.weight", "head.weight"]
    assert learning_rates(task_settings("classification"), names) == {}
    found = learning_rates(task_settings("classification", layer_decay=0.5), names)
    assert found == {names[0]: 0.125, names[1]: 0.25, names[2]: 0.5}


def test_a_base_that_is_damaged_or_missing_is_told(task_settings, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        starting_trunk(task_settings("classification"), tmp_path)
    (tmp_path / BASE).write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        starting_trunk(task_settings("classification"), tmp_path)
