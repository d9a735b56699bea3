"""``metrics.jsonl``: what a run tells about itself, one JSON object a line, in the order of its steps.

A line has ``step`` and either ``loss`` and what belongs to it (means over the steps since the last such line),
``validation`` (the losses of each readout) or ``event`` (a step skipped, a rate lowered, a run taken back).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self, TextIO

from torch import Tensor

from data_prep.files import write_atomically


@dataclass
class Interval:
    """Sums since the last line with a loss; saved with a checkpoint, so that a continued run logs the same.

    ``losses`` are weighted by ``weights``, the share of each objective in the steps' rows.
    """

    steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0
    skipped: int = 0

    def add(self, losses: dict[str, Tensor], weights: dict[str, float], gradient_norm: Tensor) -> None:
        self.steps += 1
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + float(loss)
            self.weights[name] = self.weights.get(name, 0.0) + weights[name]
        self.gradient_norm += float(gradient_norm)

    def means(self) -> dict[str, float]:
        """Mean loss, mean of each objective, mean norm of the gradient, and the steps that were skipped, if any."""
        line = {"loss": sum(self.losses.values()) / self.steps}
        if len(self.losses) > 1:
            line |= {f"loss_{name}": loss / self.weights[name] for name, loss in self.losses.items()}
        line["gradient_norm"] = self.gradient_norm / self.steps
        return line | ({"skipped": self.skipped} if self.skipped else {})


class MetricsLog:
    """The file, open for writing from step ``step`` on: lines of later steps, which will be done again, are dropped.

    Without a path nothing is kept: another process writes the file.
    """

    def __init__(self, path: Path | None, step: int) -> None:
        self.path = path
        self._file = self._opened(step)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Have every line so far on the disk."""
        os.fsync(self._file.fileno())

    def go_back(self, step: int) -> None:
        """Drop the lines after ``step``."""
        self._file.close()
        self._file = self._opened(step)

    def _opened(self, step: int) -> TextIO:
        if self.path is None:
            return Path(os.devnull).open("a", encoding="utf-8")
        if self.path.exists():
            kept = [json.dumps(line) + "\n" for line in read(self.path) if line["step"] <= step]
            write_atomically(self.path, "".join(kept))
        return self.path.open("a", encoding="utf-8")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl, none if there is no file; it ends before a line that a crash has cut off."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for text in lines:
            try:
                line = json.loads(text)
                whole = isinstance(line, dict) and "step" in line
            except ValueError:
                whole = False
            if not whole:
                return
            yield line
