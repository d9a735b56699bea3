"""Progress of long commands, on stderr: bars in a terminal or notebook, elsewhere a line at the end of each stage."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


class Reporter:
    """Where long functions report their progress."""

    @contextmanager
    def stage(self, name: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        """Start a stage of about ``total_bytes``; yields a function to call with the bytes done since its last call."""
        yield lambda size: None

    def note(self, message: str) -> None:
        """Print a message on its own line."""


class SilentReporter(Reporter):
    """Reports nothing."""


class ConsoleReporter(Reporter):
    """Reports to a person: bars with speed and remaining time in a terminal or notebook, plain lines in a log file."""

    @contextmanager
    def stage(self, name: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        started = time.monotonic()
        done = 0
        with _bar() if can_show_bars() else nullcontext() as bar:
            task = bar.add_task(name, total=total_bytes) if bar else None

            def advance(size: int) -> None:
                nonlocal done
                done += size
                if bar is not None and task is not None:
                    bar.advance(task, size)

            yield advance
        seconds = time.monotonic() - started
        speed = done / 1e6 / max(seconds, 1e-9)
        self.note(f"{name}: {done / 1e6:,.1f} MB in {seconds:,.1f} s ({speed:,.1f} MB/s)")

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


def can_show_bars() -> bool:
    """Whether stderr is a terminal, or a notebook that can draw bars."""
    in_notebook = "ipykernel" in sys.modules and importlib.util.find_spec("ipywidgets") is not None
    return sys.stderr.isatty() or in_notebook


def _bar() -> Progress:
    from rich.console import Console  # a third of the time of a small command
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    return Progress(
        TextColumn("{task.description:24}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False),
        transient=True,
    )
