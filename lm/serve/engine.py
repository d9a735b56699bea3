"""One thread that owns the model. Requests reach it by a queue, and whatever is there together is computed together.

The thread goes round: it takes in what has arrived, lets go of what nobody waits for any more, lets the generator make
one token for every text being written, and does one piece of other work (filling, probabilities), so that neither kind
holds up the other for longer than a forward pass.
"""

from __future__ import annotations

import asyncio
import queue
import sys
import threading
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from data_prep.errors import UserError
from lm.inference.generator import Event
from lm.inference.sampling import Sampling

Piece = TypeVar("Piece")


class BusyError(Exception):
    """There is no place for another request now."""


class StoppedError(Exception):
    """The server is going down."""


class FailedError(Exception):
    """The model failed at this request; the traceback has been written to stderr."""


class Writer(Protocol):
    """What the engine needs of ``lm.inference.generator.Generator``."""

    def add(self, prompt: Sequence[int], sampling: Sampling) -> int: ...
    def step(self) -> list[Event]: ...
    def cancel(self, handle: int) -> None: ...


@dataclass(frozen=True)
class Asked:
    """One text to write: the tokens of its prompt, and how to go on."""

    prompt: Sequence[int]
    sampling: Sampling


@dataclass(eq=False)
class _Job:
    """What the thread is given, a text to write or an iterator to exhaust; its ``inbox`` gets (number, what comes)."""

    work: Asked | Iterator[Any]
    number: int
    inbox: asyncio.Queue[tuple[int, Any]]
    unwanted: bool = False


class _Finished:
    """Put into the inbox after the last piece of an iterator."""


class Engine:
    """Write texts, and do other work with the model, for coroutines of one event loop.

    Args:
        make_writer: makes the generator; called in the thread, and again if the generator fails.
        places: texts and other work that may be under way or waiting, all together.
    """

    def __init__(self, make_writer: Callable[[], Writer], places: int) -> None:
        self.places = places
        self.taken = 0
        self._make_writer = make_writer
        self._arriving: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._texts: dict[int, _Job] = {}
        self._others: deque[_Job] = deque()
        self._closed = False

    def start(self) -> None:
        """Begin; called from the event loop that will ask."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Take nothing more, and let go of everything: who waits is told so."""
        self._closed = True
        self._arriving.put(None)

    async def close(self) -> None:
        """``stop``, and wait until the thread has ended."""
        self.stop()
        await asyncio.to_thread(self._thread.join)

    @asynccontextmanager
    async def write(self, asked: Sequence[Asked]) -> AsyncIterator[AsyncIterator[tuple[int, Event]]]:
        """Texts as they are written: (place in ``asked``, event) in the order of the events, until all are finished.

        Whoever leaves the context before that lets go of the rest.

        Raises:
            BusyError: there are not as many places free; nothing was begun.
            StoppedError, FailedError, UserError: from the iterator.
        """
        with self._begun(asked) as inbox:
            yield _until_all_finished(inbox, len(asked))

    async def compute(self, pieces: Iterator[Piece]) -> list[Piece]:
        """All that an iterator yields; it runs in the thread, piece by piece. Raises as ``write`` does."""
        collected: list[Piece] = []
        with self._begun([pieces]) as inbox:
            while True:
                _, item = await inbox.get()
                if isinstance(item, Exception):
                    raise item
                if isinstance(item, _Finished):
                    return collected
                collected.append(item)

    @contextmanager
    def _begun(self, work: Sequence[Asked | Iterator[Any]]) -> Iterator[asyncio.Queue[tuple[int, Any]]]:
        if self._closed:
            raise StoppedError
        if self.taken + len(work) > self.places:
            raise BusyError
        self.taken += len(work)
        inbox: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        jobs = [_Job(each, number, inbox) for number, each in enumerate(work)]
        try:
            for job in jobs:
                self._arriving.put(job)
            yield inbox
        finally:
            self.taken -= len(work)
            for job in jobs:
                job.unwanted = True

    def _work(self) -> None:
        writer = self._make_writer()
        while self._take_in(writer):
            self._let_go(writer)
            try:
                self._write(writer)
            except Exception as error:
                self._tell([(job, _failure(error)) for job in self._texts.values()])
                self._texts.clear()
                writer = self._make_writer()
            self._do_one_piece()
        self._tell([(job, StoppedError()) for job in [*self._texts.values(), *self._others]])

    def _take_in(self, writer: Writer) -> bool:
        """Begin what has arrived; with nothing to do, wait for it. False: it is time to end."""
        idle = not self._texts and not self._others
        while idle or not self._arriving.empty():
            job = self._arriving.get()
            if job is None:
                return False
            idle = False
            if job.unwanted:
                continue
            if not isinstance(job.work, Asked):
                self._others.append(job)
                continue
            try:
                self._texts[writer.add(job.work.prompt, job.work.sampling)] = job
            except Exception as error:
                self._tell([(job, _failure(error))])
        return True

    def _let_go(self, writer: Writer) -> None:
        for handle in [handle for handle, job in self._texts.items() if job.unwanted]:
            writer.cancel(handle)
            del self._texts[handle]
        self._others = deque(job for job in self._others if not job.unwanted)

    def _write(self, writer: Writer) -> None:
        if not self._texts:
            return
        events = writer.step()
        self._tell([(self._texts[event.handle], event) for event in events])
        for event in events:
            if event.finish_reason is not None:
                del self._texts[event.handle]

    def _do_one_piece(self) -> None:
        if not self._others:
            return
        job = self._others.popleft()
        assert not isinstance(job.work, Asked)
        try:
            piece = next(job.work, _Finished())
        except Exception as error:
            piece = _failure(error)
        if not isinstance(piece, (Exception, _Finished)):
            self._others.append(job)
        self._tell([(job, piece)])

    def _tell(self, news: list[tuple[_Job, Any]]) -> None:
        """Put news into the inboxes, all in one turn of the event loop."""
        if news and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, news)


def _deliver(news: list[tuple[_Job, Any]]) -> None:
    for job, item in news:
        job.inbox.put_nowait((job.number, item))


async def _until_all_finished(inbox: asyncio.Queue[tuple[int, Any]], running: int) -> AsyncIterator[tuple[int, Event]]:
    while running:
        number, item = await inbox.get()
        if isinstance(item, Exception):
            raise item
        running -= item.finish_reason is not None
        yield number, item


def _failure(error: Exception) -> Exception:
    """What the asker is told: a mistake of the user's as it is, of anything else only that it happened."""
    if isinstance(error, UserError):
        return error
    traceback.print_exception(error, file=sys.stderr)
    return FailedError()
