"""How far a long command is: bars on a terminal, a line at each stage's end elsewhere. Everything goes to stderr."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress


class Reporter(Protocol):
    """What a long function needs to tell how far it is."""

    def stage(self, name: str, total_bytes: int | None) -> AbstractContextManager[Callable[[int], None]]:
        """Begin a stage of about ``total_bytes``; call what it gives with the bytes done since the last call."""

    def note(self, message: str) -> None:
        """Tell something on a line of its own."""


class SilentReporter:
    """Tells nothing."""

    @contextmanager
    def stage(self, name: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        yield lambda size: None

    def note(self, message: str) -> None:
        pass


class ConsoleReporter:
    """Tells a person: a bar with speed and time left on a terminal, plain lines in a log file."""

    @contextmanager
    def stage(self, name: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        started = time.monotonic()
        done = 0
        with _bar() if sys.stderr.isatty() else nullcontext() as bar:
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


def _bar() -> Progress:
    from rich.console import Console  # a third of the time in which a small command is done
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
