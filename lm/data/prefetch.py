"""A background thread that prepares the next batches while the current one is used; results do not depend on it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, Self, TypeVar

Made = TypeVar("Made")


class Prefetch(Generic[Made]):
    """``make(number)`` for each of ``numbers``, in order, up to ``ahead`` results ready and one more in progress.

    A context manager and an iterator: the thread starts on entry and has always ended on exit. An error in ``make`` is
    raised in place of its result.
    """

    def __init__(self, make: Callable[[int], Made], numbers: Iterable[int], *, ahead: int = 2) -> None:
        self._make = make
        self._numbers = numbers
        self._ready: queue.Queue[tuple[Made] | BaseException] = queue.Queue(ahead)
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kindling-prefetch", daemon=True)

    def _run(self) -> None:
        try:
            for number in self._numbers:
                if self._leaving.is_set():
                    return
                self._hand_over((self._make(number),))
            self._hand_over(StopIteration())
        except BaseException as error:  # raised in the thread that waits for the result
            self._hand_over(error)

    def _hand_over(self, result: tuple[Made] | BaseException) -> None:
        if not self._leaving.is_set():
            self._ready.put(result)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leaving.set()
        # A blocked put now goes through, and is the thread's last.
        while not self._ready.empty():
            self._ready.get()
        self._thread.join()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Made:
        result = self._ready.get()
        if isinstance(result, BaseException):
            self._ready.put(result)  # so that the next call raises it too
            raise result
        return result[0]
