"""What the outputs of a task's head mean."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_prep.errors import UserError
from data_prep.files import read_json, write_atomically
from lm.data.examples import Example, Labels, numbers_of

ANSWERS = "answers.json"


@dataclass(frozen=True)
class Answers:
    """What a head's numbers mean, kept in the run directory (``answers.json``).

    ``labels`` are the names of the classes, none where there are no classes; a regression's outputs are distances from
    ``mean`` in units of ``deviation``. ``texts`` is 1 for a task on single texts, 2 for one on pairs, 0 for others.
    """

    labels: tuple[str, ...] = ()
    texts: int = 0
    mean: float = 0.0
    deviation: float = 1.0

    @classmethod
    def of(cls, kind: str, examples: Sequence[Example]) -> Answers:
        """From training examples. UserError if they all have the same answer."""
        texts = len(examples[0].texts) if kind in ("classification", "regression") else 0
        if kind in ("classification", "tokens"):
            return cls(Labels.of(examples).names, texts)
        if kind == "regression":
            numbers = np.array(numbers_of(examples))
            return cls((), texts, float(numbers.mean()), float(numbers.std()))
        return cls()

    @property
    def outputs(self) -> int:
        """How many numbers the head gives for an item."""
        return len(self.labels) or 1

    def numbers(self, kind: str, example: Example) -> list[float]:
        """The labels of an example as ``heads.losses`` takes them. UserError if its class was not trained."""
        if kind == "classification":
            return [Labels(self.labels).index(example)]
        if kind == "tokens":
            return list(Labels(self.labels).indices(example))
        return [(example.label - self.mean) / self.deviation if kind == "regression" else example.label]

    def save(self, path: Path) -> None:
        write_atomically(path / ANSWERS, json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Answers:
        try:
            content = read_json(path / ANSWERS)
            return cls(
                tuple(content["labels"]), int(content["texts"]), float(content["mean"]), float(content["deviation"])
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path / ANSWERS} cannot be read: {error}") from None
