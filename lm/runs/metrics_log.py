"""``metrics.jsonl``: what a run tells about itself, one JSON object a line, in the order of its steps.

A line has ``step`` and either ``loss`` and what belongs to it (means over the steps since the last such line),
``validation`` (the losses of each readout, and on how many ``rows`` of how many), ``metrics`` (of a task that is
fine-tuned on) or ``event`` (a step skipped, a rate lowered, a run taken back).
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

from torch import Tensor

from data_prep.files import parse_json, write_atomically


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


class Follower(Protocol):
    """Who is given what goes into the file (``lm.training.trackers``)."""

    def write(self, line: dict[str, Any]) -> None: ...
    def go_back(self, step: int) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """The file, open for writing from step ``step`` on: lines of later steps, which will be done again, are dropped.

    The ``followers`` are given each line after the file has it, and are closed with it. Without a path nothing is kept:
    another process writes the file.
    """

    def __init__(self, path: Path | None, step: int, followers: Sequence[Follower] = ()) -> None:
        self.path, self.followers = path, followers
        self._file = self._opened(step)

    def write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        for follower in self.followers:
            follower.write(line)

    def sync(self) -> None:
        """Have every line so far on the disk."""
        os.fsync(self._file.fileno())

    def go_back(self, step: int) -> None:
        """Drop the lines after ``step``."""
        self._file.close()
        self._file = self._opened(step)
        for follower in self.followers:
            follower.go_back(step)

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
        for follower in self.followers:
            follower.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics.jsonl, none if there is no file; it ends before a line that a crash has cut off."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for text in lines:
            try:
                line = parse_json(text)
                whole = isinstance(line, dict) and "step" in line
            except ValueError:
                whole = False
            if not whole:
                return
            yield line


def series(lines: Iterable[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have ``name``."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def loss_of_readouts(line: dict[str, Any]) -> float | None:
    """Mean over the readouts of a validation line, in nats per token: what a run's best is judged by. None: no text."""
    losses = [loss["nats_per_token"] for loss in line["validation"].values()]
    return sum(losses) / len(losses) if losses else None


def best_validation(lines: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The validation line with the lowest mean over the readouts, the first of equals; None if there is none."""
    validated = [line for line in lines if line.get("validation")]
    return min(validated, key=lambda line: loss_of_readouts(line) or 0.0, default=None)


def rows_validated(line: dict[str, Any]) -> str:
    """What part of the split a validation line is about, in words; "" where the line does not say (older runs)."""
    if "rows" not in line:
        return ""
    taken, there = line["rows"]["taken"], line["rows"]["of"]
    return "whole split" if taken == there else f"{taken:,} of {there:,} rows"


def summary(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Where a run stands and how it went there; empty if it has logged no interval yet.

    Speed and share of peak are medians over the intervals, memory is the most of any; the last two are left out where
    the lines do not say (older runs).
    """
    intervals = [line for line in lines if "loss" in line]
    if not intervals:
        return {}
    last = intervals[-1]
    found = {name: last[name] for name in ("step", "tokens", "epoch")}
    found["tokens_per_second"] = statistics.median(line["tokens_per_second"] for line in intervals)
    for name, of in (("share_of_peak", statistics.median), ("memory_bytes", max)):
        if known := [line[name] for line in intervals if line.get(name)]:
            found[name] = of(known)
    return found


def overfitting(lines: Iterable[dict[str, Any]]) -> str:
    """A sentence if the validation loss has been rising; "" if not."""
    validated = [line for line in lines if line.get("validation")]
    best = best_validation(validated)
    if best is None or len(validated) - validated.index(best) <= OVERFITTING:
        return ""
    return (
        f"The validation loss was lowest at step {best['step']:,} and has not come back to it in "
        f"{len(validated) - validated.index(best) - 1} validations since: the model is learning its text by heart."
    )


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Spread the total cost of a text, in nats, over its UTF-8 bytes, in bits."""
    return nats / math.log(2) / text_bytes


@dataclass(frozen=True)
class ReadoutLoss:
    """``predicted`` tokens were predicted at a mean cost of ``nats_per_token``.

    ``bits_per_byte`` spreads that cost over the text's UTF-8 bytes, which makes tokenizers comparable.
    """

    nats_per_token: float
    bits_per_byte: float
    predicted: int

    @classmethod
    def of(cls, nats: float, predicted: int, text_bytes: int) -> ReadoutLoss:
        """Return the loss on a text whose ``predicted`` tokens cost ``nats`` in total."""
        return cls(nats / predicted, bits_per_byte(nats, text_bytes), predicted)

    def as_dict(self) -> dict[str, float]:
        return {"nats_per_token": self.nats_per_token, "bits_per_byte": self.bits_per_byte, "predicted": self.predicted}


OVERFITTING = 3  # validations in a row worse than the best, after which it is told


@dataclass
class Best:
    """The best validation so far, and how many since then were worse."""

    step: int = 0
    loss: float | None = None
    worse: int = 0

    def add(self, step: int, loss: float) -> bool:
        """Take in what a validation is judged by, the lower the better; is it the best?"""
        if math.isfinite(loss) and (self.loss is None or loss < self.loss):
            self.step, self.loss, self.worse = step, loss, 0
            return True
        self.worse += 1
        return False
