"""Losses, metrics and answers of each kind of head against plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from lm.config.finetune_settings import HEAD_TASKS, TASKS
from lm.data.examples import Example
from lm.finetuning import finetune, head_task
from lm.finetuning.answers import Answers, ChoiceAnswers, NumberAnswers, TagAnswers, by_example


def test_every_task_of_the_settings_has_its_class():
    assert tuple(head_task.HEADS) == HEAD_TASKS
    assert tuple(finetune.TASKS) == TASKS


def test_answers_are_kept_and_read_again(tmp_path):
    examples = [Example(("a", "b"), value, "") for value in (1.0, 2.0, 6.0)]
    answers = NumberAnswers.of(examples)
    assert (answers.texts, answers.outputs, answers.mean) == (2, 1, 3.0)
    assert [answers.targets(e)[0] for e in examples] == pytest.approx(
        [(value - 3) / np.std([1, 2, 6]) for value in (1, 2, 6)]
    )
    answers.save(tmp_path)
    assert NumberAnswers.load(tmp_path) == answers
    (tmp_path / "answers.json").write_text("[")
    with pytest.raises(UserError, match="cannot be read"):
        NumberAnswers.load(tmp_path)


def test_losses_are_those_of_the_plain_formulas():
    outputs = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    labels, items = torch.tensor([0, 2, 1, 1, 0, 2]), torch.ones(6, dtype=torch.int64)
    wanted = [-math.log(float(row.softmax(0)[label])) for row, label in zip(outputs, labels, strict=True)]
    assert Answers().losses(outputs, labels, items).tolist() == pytest.approx(wanted, rel=1e-5)
    smooth = TagAnswers().losses(outputs, labels, items, 0.3)
    everywhere = -outputs.log_softmax(1).mean(1)
    assert smooth.tolist() == pytest.approx((0.7 * torch.tensor(wanted) + 0.3 * everywhere).tolist(), rel=1e-5)
    numbers = torch.tensor([1.0, 0.0, -1.0, 2.0, 0.5, 0.0])
    assert NumberAnswers().losses(outputs[:, :1], numbers, items).tolist() == pytest.approx(
        ((outputs[:, 0] - numbers) ** 2).tolist()
    )


def test_a_choice_is_among_as_many_as_the_example_has():
    scores, items = torch.tensor([[1.0], [2.0], [0.5], [3.0], [1.0]]), torch.tensor([2, 3])
    found = ChoiceAnswers().losses(scores, torch.tensor([1, 0]), items)
    wanted = [math.log(1 + math.exp(-1)), math.log(1 + math.exp(2.5) + math.exp(0.5))]
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)
    assert by_example(scores[:, 0], items).tolist() == [[1.0, 2.0, -math.inf], [0.5, 3.0, 1.0]]
    assert ChoiceAnswers().metrics(scores, torch.tensor([1, 2]), items) == {"accuracy": 0.5}
    answer = ChoiceAnswers().answer(scores[2:])
    assert answer == {"choice": 1, "probabilities": pytest.approx(scores[2:, 0].double().softmax(0).tolist())}
