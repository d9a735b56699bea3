"""A background thread that prepares the next batches while the current one is used; results do not depend on it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Made = TypeVar("Made")


@contextmanager
def prefetch(make: Callable[[int], Made], numbers: Iterable[int], *, ahead: int = 2) -> Iterator[Iterator[Made]]:
    """Call ``make(number)`` for each of ``numbers``, in order, up to ``ahead`` results ready and one more in progress.

    The context is an iterator over the results; its thread has always ended on exit. An error in ``make`` is raised in
    place of its result.
    """
    remaining = iter(numbers)
    pool = ThreadPoolExecutor(1, "kindling-prefetch")
    started = deque(pool.submit(make, number) for number in islice(remaining, ahead + 1))

    def results() -> Iterator[Made]:
        while started:
            made = started.popleft().result()
            started.extend(pool.submit(make, number) for number in islice(remaining, 1))
            yield made

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
