"""One thread that owns the model. Requests reach it through a queue, and concurrent texts are generated in one batch.

Each iteration the thread accepts new requests, drops abandoned ones, lets the generator produce one token for every
active text, and does one piece of other work (filling, probabilities), so that neither kind of work delays the other by
more than a forward pass.
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
from dataclasses import dataclass, field
from typing import Any, TypeVar

from data_prep.errors import UserError
from lm.inference.generator import Event, Generator
from lm.inference.sampling import Sampling

Piece = TypeVar("Piece")


class BusyError(Exception):
    """The engine is at capacity and accepts no request now."""


class StoppedError(Exception):
    """The server is shutting down."""


class FailedError(Exception):
    """The model failed on this request; the traceback has been written to stderr."""


@dataclass(frozen=True)
class TextRequest:
    """One text to generate: the token ids of its prompt, how to sample its continuation, and tokens that end it."""

    prompt: Sequence[int]
    sampling: Sampling
    ends: Sequence[int] = ()


@dataclass(eq=False)
class _Job:
    """A text to generate or an iterator to exhaust. ``inbox`` receives (``number``, result): each event of the text,
    or the list of all the iterator's ``pieces``, or the exception that ended the job."""

    work: TextRequest | Iterator[Any]
    number: int
    inbox: asyncio.Queue[tuple[int, Any]]
    abandoned: bool = False
    pieces: list[Any] = field(default_factory=list)


class Engine:
    """Generate texts, and do other work with the model, for coroutines of one event loop.

    Args:
        make_writer: makes the generator; called in the thread, and again if the generator fails. It returns None if
            no texts will be generated.
        capacity: the most texts and other jobs that may be active or waiting at a time.
    """

    def __init__(self, make_writer: Callable[[], Generator | None], capacity: int) -> None:
        self.capacity = capacity
        self.in_use = 0
        self._make_writer = make_writer
        self._arriving: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="engine", daemon=True)
        self._texts: dict[int, _Job] = {}
        self._others: deque[_Job] = deque()
        self._closed = False

    def start(self) -> None:
        """Start the thread. Call this from the event loop that will submit requests."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """Refuse new requests, cancel all others and notify their callers with ``StoppedError``."""
        self._closed = True
        self._arriving.put(None)

    async def close(self) -> None:
        """Stop, and wait until the thread has ended."""
        self.stop()
        await asyncio.to_thread(self._thread.join)

    @asynccontextmanager
    async def write(self, requests: Sequence[TextRequest]) -> AsyncIterator[AsyncIterator[tuple[int, Event]]]:
        """Generate texts; yields (index in ``requests``, event) in the order of the events until all are finished.

        Leaving the context earlier cancels the remaining texts.

        Raises:
            BusyError: there is no room for all of them; none was started.
            StoppedError, FailedError, UserError: from the iterator.
        """
        with self._submitted(requests) as inbox:
            yield _until_all_finished(inbox, len(requests))

    async def compute(self, pieces: Iterator[Piece]) -> list[Piece]:
        """Run an iterator in the thread, piece by piece, and return its items. Raises as ``write`` does."""
        with self._submitted([pieces]) as inbox:
            _, collected = await _receive(inbox)
            return collected

    @contextmanager
    def _submitted(self, work: Sequence[TextRequest | Iterator[Any]]) -> Iterator[asyncio.Queue[tuple[int, Any]]]:
        if self._closed:
            raise StoppedError
        if self.in_use + len(work) > self.capacity:
            raise BusyError
        self.in_use += len(work)
        inbox: asyncio.Queue[tuple[int, Any]] = asyncio.Queue()
        jobs = [_Job(each, number, inbox) for number, each in enumerate(work)]
        try:
            for job in jobs:
                self._arriving.put(job)
            yield inbox
        finally:
            self.in_use -= len(work)
            for job in jobs:
                job.abandoned = True

    def _work(self) -> None:
        writer = self._make_writer()
        while self._accept(writer):
            self._drop_abandoned(writer)
            try:
                self._write(writer)
            except Exception as error:
                self._notify([(job, _failure(error)) for job in self._texts.values()])
                self._texts.clear()
                writer = self._make_writer()
            self._do_one_piece()
        self._notify([(job, StoppedError()) for job in [*self._texts.values(), *self._others]])

    def _accept(self, writer: Generator | None) -> bool:
        """Start new requests, waiting for one if there is nothing to do. Return False when the engine stops."""
        idle = not self._texts and not self._others
        while idle or not self._arriving.empty():
            job = self._arriving.get()
            if job is None:
                return False
            idle = False
            if job.abandoned:
                continue
            try:
                if isinstance(job.work, TextRequest):
                    assert writer
                    self._texts[writer.add(job.work.prompt, job.work.sampling, job.work.ends)] = job
                else:
                    self._others.append(job)
            except Exception as error:
                self._notify([(job, _failure(error))])
        return True

    def _drop_abandoned(self, writer: Generator | None) -> None:
        for handle in [handle for handle, job in self._texts.items() if job.abandoned]:
            assert writer
            writer.cancel(handle)
            del self._texts[handle]
        self._others = deque(job for job in self._others if not job.abandoned)

    def _write(self, writer: Generator | None) -> None:
        events = writer.step() if writer and self._texts else []
        self._notify([(self._texts[event.handle], event) for event in events])
        for event in events:
            if event.finish_reason is not None:
                del self._texts[event.handle]

    def _do_one_piece(self) -> None:
        if not self._others:
            return
        job = self._others.popleft()
        assert not isinstance(job.work, TextRequest)
        try:
            job.pieces.append(next(job.work))
            self._others.append(job)
        except StopIteration:
            self._notify([(job, job.pieces)])
        except Exception as error:
            self._notify([(job, _failure(error))])

    def _notify(self, results: list[tuple[_Job, Any]]) -> None:
        """Put results into the inboxes of their jobs, all in one iteration of the event loop."""
        if results and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_deliver, results)


def _deliver(results: list[tuple[_Job, Any]]) -> None:
    for job, item in results:
        job.inbox.put_nowait((job.number, item))


async def _receive(inbox: asyncio.Queue[tuple[int, Any]]) -> tuple[int, Any]:
    number, item = await inbox.get()
    if isinstance(item, Exception):
        raise item
    return number, item


async def _until_all_finished(inbox: asyncio.Queue[tuple[int, Any]], running: int) -> AsyncIterator[tuple[int, Event]]:
    while running:
        number, event = await _receive(inbox)
        running -= event.finish_reason is not None
        yield number, event


def _failure(error: Exception) -> Exception:
    """The exception for the caller: a UserError itself; for any other, which is printed here, a FailedError."""
    if isinstance(error, UserError):
        return error
    traceback.print_exception(error, file=sys.stderr)
    return FailedError()
