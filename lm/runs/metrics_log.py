"""``metrics.jsonl``: the log of a run, one JSON object per line, in the order of its steps.

A line has ``step`` and either ``loss`` with other means over the steps since the last such line, ``validation`` (the
losses of each readout, and on how many ``rows`` of how many), ``metrics`` (of the task in fine-tuning) or ``event`` (a
skipped step, a lower learning rate, a rollback). ``average`` has the ``validation`` or ``metrics`` of the mean of the
weights, if there is one.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self, TextIO

from data_prep.files import parse_json, write_atomically


@dataclass
class Interval:
    """Sums since the last line with a loss; saved in checkpoints, so that a resumed run logs the same.

    ``losses`` are weighted by ``weights``, the share of each objective in the steps' rows.
    """

    steps: int = 0
    losses: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    gradient_norm: float = 0.0
    skipped: int = 0

    def add(self, losses: Mapping[str, float], weights: Mapping[str, float], gradient_norm: float) -> None:
        self.steps += 1
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0.0) + loss
            self.weights[name] = self.weights.get(name, 0.0) + weights[name]
        self.gradient_norm += gradient_norm

    def means(self) -> dict[str, float]:
        """Mean loss, mean loss of each objective, mean gradient norm, and the number of skipped steps, if any."""
        line = {"loss": sum(self.losses.values()) / self.steps}
        if len(self.losses) > 1:
            line |= {f"loss_{name}": loss / self.weights[name] for name, loss in self.losses.items()}
        line["gradient_norm"] = self.gradient_norm / self.steps
        return line | ({"skipped": self.skipped} if self.skipped else {})


class Follower(Protocol):
    """Receives each line of the file (``lm.training.trackers``)."""

    def write(self, line: dict[str, Any]) -> None: ...
    def go_back(self, step: int) -> None: ...
    def close(self) -> None: ...


class MetricsLog:
    """The file, open for writing after step ``step``: lines of later steps, which will be repeated, are dropped.

    The ``followers`` receive each line after it is written, and are closed with the file. Without a path nothing is
    written, since another process writes the file.
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
        """Flush every line so far to the disk."""
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
        return self.path.open("a", encoding="utf-8", newline="\n")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        for follower in self.followers:
            follower.close()


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a metrics.jsonl, if it exists, up to a line that a crash has truncated."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as lines:
        for text in lines:
            try:
                line = parse_json(text)
            except ValueError:
                return
            if not isinstance(line, dict) or "step" not in line:
                return
            yield line


def series(lines: Iterable[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    """(step, value) of the lines that have ``name``."""
    return [(line["step"], line[name]) for line in lines if line.get(name) is not None]


def of_tokens(validation: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """The groups of a validation that are losses per token, without those of objectives that compare views."""
    return {name: found for name, found in validation.items() if "nats_per_token" in found}


def loss_of_readouts(line: dict[str, Any]) -> float | None:
    """The score of a validation line: the mean of its groups' first numbers; None: there are none.

    For text these are nats per token, and groups without them do not count if others have them.
    """
    groups = of_tokens(line["validation"]) or line["validation"]
    losses = [next(iter(group.values())) for group in groups.values()]
    return sum(losses) / len(losses) if losses else None


def best_validation(lines: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The first validation line with the lowest mean loss over the readouts; None if there is none to compare."""
    validated = [line for line in lines if line.get("validation") and line.get("comparable", True)]
    return min(validated, key=lambda line: loss_of_readouts(line) or 0.0, default=None)


def rows_validated(line: dict[str, Any]) -> str:
    """How much of the split a validation line covers, in words; "" if unknown (older runs)."""
    if "rows" not in line:
        return ""
    taken, there = line["rows"]["taken"], line["rows"]["of"]
    return "whole split" if taken == there else f"{taken:,} of {there:,} rows"


def summary(lines: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The progress and speed of a run; empty if it has logged no interval yet.

    Speed and share of peak are medians over the intervals, memory is their maximum; the last two are missing if unknown
    (older runs).
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
    """A sentence if the model is overfitting; "" if not."""
    validated = [line for line in lines if line.get("validation")]
    best = best_validation(validated)
    since = len(validated) - validated.index(best) - 1 if best else 0
    if best is None or since < OVERFITTING:
        return ""
    return (
        f"The validation loss was lowest at step {best['step']:,} and has not improved in {since} validations since: "
        "the model is overfitting."
    )


def metrics_at(lines: Iterable[dict[str, Any]], step: int, *, averaged: bool = False) -> dict[str, Any]:
    """The metrics of a fine-tuning at a step, of the mean of the weights if ``averaged``; empty if it has none."""
    found: dict[str, Any] = {}
    for line in lines:
        if line["step"] == step:
            part = line.get("average", {}) if averaged else line
            found = part.get("metrics") or part.get("validation", {}).get("response") or found
    return found


OVERFITTING = 3  # validations in a row worse than the best, after which it is reported


@dataclass
class Best:
    """The best validation so far, and how many since then were worse.

    Attributes:
        loss: its score; lower is better.
        tie_loss: its loss, which decides between equal scores, such as accuracies.
        breaks_ties: whether it does; runs that were begun by earlier versions keep the first of equal ones.
        averaged: whether it is that of the mean of the weights over the last steps.
    """

    step: int = 0
    loss: float | None = None
    worse: int = 0
    tie_loss: float | None = None
    breaks_ties: bool = False
    averaged: bool = False

    def add(self, step: int, loss: float, tie_loss: float | None = None, *, averaged: bool = False) -> bool:
        """Record a validation; return True if it is the best so far."""
        is_best = self.loss is None or loss < self.loss
        if self.breaks_ties and loss == self.loss and tie_loss is not None and self.tie_loss is not None:
            is_best = tie_loss < self.tie_loss
        if math.isfinite(loss) and is_best:
            self.step, self.loss, self.worse, self.tie_loss, self.averaged = step, loss, 0, tie_loss, averaged
            return True
        self.worse += 1
        return False
