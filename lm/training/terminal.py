"""The progress of a run: a bar with the loss in a terminal or a notebook, plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from data_prep.progress import can_show_bars
from lm.runs.metrics_log import rows_validated

SECONDS_BETWEEN_LINES = 10.0


class TerminalProgress:
    """A ``Reporter`` that writes to stderr."""

    def __init__(self) -> None:
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=16),
            TextColumn("{task.fields[state]}", table_column=Column()),  # wraps on a narrow screen
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=self.console,
        )
        self.total, self.began, self.began_at, self.last_line = 0, 0.0, 0, 0.0

    @property
    def has_bar(self) -> bool:
        return self.console.is_terminal or (self.console.is_jupyter and can_show_bars())

    def note(self, text: str) -> None:
        self.console.print(text, markup=False)

    def begin(self, done: int, total: int) -> None:
        self.total, self.began, self.began_at = total, time.monotonic(), done
        if self.has_bar:
            self.bar.start()
            self.task = self.bar.add_task("", total=total, completed=done, state="")

    def step(self, step: int) -> None:
        if self.has_bar:
            self.bar.update(self.task, completed=step)

    def metrics(self, line: dict[str, Any]) -> None:
        if "validation" in line or "metrics" in line:
            self.note(_validation(line))
            if "average" in line:
                self.note(_validation({**line, **line["average"]}, "validation of the average"))
        elif self.has_bar:
            self.bar.update(self.task, completed=line["step"], state=" · ".join(_state(line)))
        elif time.monotonic() - self.last_line >= SECONDS_BETWEEN_LINES or line["step"] == self.total:
            self.last_line = time.monotonic()
            words = [*_state(line), f"learning rate {line['learning_rate']:.3g}", f"{self._left(line['step'])} left"]
            self.note(f"step {line['step']:>6}/{self.total}  {'  '.join(words)}")

    def end(self) -> None:
        if self.has_bar:
            self.bar.stop()

    def _left(self, step: int) -> str:
        seconds = (time.monotonic() - self.began) / (step - self.began_at) * (self.total - step)
        minutes, seconds = divmod(round(seconds), 60)
        return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _state(line: dict[str, Any]) -> list[str]:
    """The metrics of an interval to show."""
    unit = "images" if "images_per_second" in line else "tokens"
    speed = f"{line[f'{unit}_per_second']:,.0f} {unit}/s"
    words = [f"loss {line['loss']:.3f}", f"epoch {line['epoch']:.2f}", speed]
    return words + ([f"{line['share_of_peak']:.0%} of peak"] if line.get("share_of_peak") else [])


def _validation(line: dict[str, Any], what: str = "validation") -> str:
    """The line of a validation, called ``what``, with the part of the split it covers, or the metrics of a task."""
    if "metrics" in line:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in line["metrics"].items())
        return f"step {line['step']:>6}  {what}: {metrics or 'there are no validation examples'}"
    results = ", ".join(_measured(name, found) for name, found in line["validation"].items())
    part = f", {rows_validated(line)}" if rows_validated(line) else ""
    return f"step {line['step']:>6}  {what}{part}: {results or 'the data has no validation split'}"


def _measured(name: str, found: dict[str, float]) -> str:
    """What a validation found, for a readout or an objective on images or views."""
    if "nats_per_token" in found:
        bits = f" ({found['bits_per_byte']:.3f} bits/byte)" if "bits_per_byte" in found else ""
        return f"{name} {found['nats_per_token']:.3f} nats/token{bits}"
    words = [f"{key.replace('_', ' ')} {value:.3f}" for key, value in found.items() if key not in ("images", "pieces")]
    return f"{name} {', '.join(words)}"
