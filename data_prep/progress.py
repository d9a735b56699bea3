"""How far a long command is: bars on a terminal, a line at each stage's end elsewhere. Everything goes to stderr."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn


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

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)

    @contextmanager
    def stage(self, name: str, total_bytes: int | None) -> Iterator[Callable[[int], None]]:
        started = time.monotonic()
        done = 0
        bar = Progress(
            TextColumn("{task.description:24}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._console.is_terminal,
        )
        with bar:
            task = bar.add_task(name, total=total_bytes)

            def advance(size: int) -> None:
                nonlocal done
                done += size
                bar.advance(task, size)

            yield advance
        seconds = time.monotonic() - started
        speed = done / 1e6 / max(seconds, 1e-9)
        self.note(f"{name}: {done / 1e6:,.1f} MB in {seconds:,.1f} s ({speed:,.1f} MB/s)")

    def note(self, message: str) -> None:
        self._console.print(message, markup=False, soft_wrap=True)
