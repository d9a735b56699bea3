"""One background thread that makes the next things while the last one is used. It changes nothing but the time."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Generic, Self, TypeVar

Made = TypeVar("Made")


class Prefetch(Generic[Made]):
    """``make(number)`` for each of ``numbers``, in order, ``ahead`` of them ready and one more under way.

    A context manager and an iterator: the thread starts on entering and has ended on leaving, whatever the reason.
    An error in ``make`` is raised where its result would have come.
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
        except BaseException as error:  # carried over to whoever waits for it
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
        # A put that waits for room goes through now that there is some, and is the thread's last.
        while not self._ready.empty():
            self._ready.get()
        self._thread.join()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Made:
        result = self._ready.get()
        if isinstance(result, BaseException):
            self._ready.put(result)  # the thread's last word, however often it is asked
            raise result
        return result[0]
