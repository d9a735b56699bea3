"""What the outputs of a task's head mean: one class for each kind of task with a head (``head_task.HEADS``)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data_prep.errors import UserError
from data_prep.files import read_json, write_atomically
from lm.data.examples import Example, Labels, numbers_of
from lm.finetuning.metrics import classification_metrics, regression_metrics
from lm.runs.directory import ANSWERS

Answer = dict[str, Any]


@dataclass(frozen=True)
class Answers:
    """How a head is trained, measured and read: here one class for each text or pair; other tasks are subclasses.

    The values are kept in the run directory (``answers.json``): ``labels`` are the names of the classes, if any; a
    regression's outputs are distances from ``mean`` in units of ``deviation``; ``texts`` is 1 for a task on single
    texts, 2 for one on pairs, 0 for others.
    """

    labels: tuple[str, ...] = ()
    texts: int = 0
    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        """From training examples. UserError if they all have the same answer."""
        return cls(Labels.of(examples).names, len(examples[0].texts))

    def uncentered(self) -> Self:
        """The same, for a head without a bias: a regression's numbers are scaled only."""
        return replace(self, mean=0.0, deviation=math.hypot(self.mean, self.deviation))

    @property
    def outputs(self) -> int:
        """How many numbers the head gives per item."""
        return len(self.labels) or 1

    def targets(self, example: Example) -> list[Any]:
        """The targets of an example as ``losses`` takes them. UserError if the training examples lack its class."""
        return Labels(self.labels).indices(example)

    def losses(self, outputs: Tensor, targets: Tensor, items: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """The loss of each target, (targets,): cross-entropy in nats.

        ``outputs`` (items, outputs) are of a forward pass; ``targets``, one per item or per example, are int64 if
        ``self.targets`` gives integers, else float32; ``items`` (examples,) is how many items each example has;
        ``label_smoothing``, for classes only, is the share of the probability that is spread over all classes.
        """
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=label_smoothing)

    def metrics(self, outputs: Tensor, targets: Tensor, items: Tensor) -> dict[str, float]:
        """Metrics of outputs, arguments as of ``losses``; higher is better."""
        return classification_metrics(targets.numpy(), outputs.argmax(1).numpy(), len(self.labels))

    def answer(self, outputs: Tensor) -> Answer:
        """The outputs for one example (its items, outputs) as ``kindling predict`` writes them."""
        chances = outputs[0].double().softmax(0).tolist()
        best = self.labels[int(np.argmax(chances))]
        return {"label": best, "probabilities": dict(zip(self.labels, chances, strict=True))}

    def save(self, path: Path) -> None:
        write_atomically(path / ANSWERS, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what ``save`` wrote. UserError if it cannot be read."""
        try:
            saved = read_json(path / ANSWERS)
            return cls(tuple(saved["labels"]), int(saved["texts"]), float(saved["mean"]), float(saved["deviation"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path / ANSWERS} cannot be read: {error}") from None


def labels_of(path: Path) -> tuple[str, ...]:
    """The labels of the run directory ``path``, as spelled when its fine-tuning began; none if it is new."""
    return Answers.load(path).labels if (path / ANSWERS).is_file() else ()


class TagAnswers(Answers):
    """One class for each word; metrics count words."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        return cls(Labels.of(examples).names)

    def answer(self, outputs: Tensor) -> Answer:
        chances = outputs.double().softmax(1).numpy()
        labels = [self.labels[number] for number in chances.argmax(1).tolist()]
        return {"labels": labels, "probabilities": chances.max(1).tolist()}


class NumberAnswers(Answers):
    """One number for each text or pair, by squared distance."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        numbers = np.array(numbers_of(examples))
        return cls((), len(examples[0].texts), float(numbers.mean()), float(numbers.std()))

    def targets(self, example: Example) -> list[float]:
        return [(example.label - self.mean) / self.deviation]

    def losses(self, outputs: Tensor, targets: Tensor, items: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return (outputs[:, 0] - targets) ** 2

    def metrics(self, outputs: Tensor, targets: Tensor, items: Tensor) -> dict[str, float]:
        return regression_metrics(targets.double().numpy(), outputs[:, 0].double().numpy())

    def answer(self, outputs: Tensor) -> Answer:
        return {"value": float(outputs[0, 0].double()) * self.deviation + self.mean}


class ChoiceAnswers(Answers):
    """One of several choices, each an item with one score: softmax over an example's choices, cross-entropy in nats."""

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Self:
        return cls()

    def targets(self, example: Example) -> list[int]:
        return [example.label]

    def losses(self, outputs: Tensor, targets: Tensor, items: Tensor, label_smoothing: float = 0.0) -> Tensor:
        return F.cross_entropy(by_example(outputs[:, 0], items), targets, reduction="none")

    def metrics(self, outputs: Tensor, targets: Tensor, items: Tensor) -> dict[str, float]:
        chosen = by_example(outputs[:, 0], items).argmax(1)
        return {"accuracy": float((chosen == targets).numpy().mean())}

    def answer(self, outputs: Tensor) -> Answer:
        chances = outputs[:, 0].double().softmax(0).tolist()
        return {"choice": int(np.argmax(chances)), "probabilities": chances}


def by_example(scores: Tensor, items: Tensor) -> Tensor:
    """Scores of items (items,) as one row per example, (examples, most items), -inf where an example has no more."""
    return pad_sequence(scores.split(items.tolist()), batch_first=True, padding_value=-np.inf)
