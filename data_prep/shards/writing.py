"""How the shards of a part are named, finished and resumed, be they of tokens or of images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

Record_co = TypeVar("Record_co", covariant=True)
Record = TypeVar("Record")


class OpenShard(Protocol[Record_co]):
    """A shard that is being written; ``stack`` holds its open files."""

    stack: ExitStack

    def finish(self) -> Record_co:
        """Complete its files and describe them."""


Shard = TypeVar("Shard", bound=OpenShard[object])


class PartWriter(Generic[Record, Shard]):
    """A context manager that writes a part as shards, one after another; leaving it finishes the last one.

    ``finished`` lists the shards that an interrupted call already wrote; writing continues after them. ``on_finished``
    is called with the record of each new shard once all of its files are on disk.
    """

    def __init__(self, stem: str, finished: Sequence[Record], on_finished: Callable[[Record], None]) -> None:
        self.records = list(finished)
        self._stem, self._on_finished = stem, on_finished
        self._open: Shard | None = None

    def _shard(self, *, full: bool, begin: Callable[[str], Shard]) -> Shard:
        """The shard to write to: the open one, unless it is ``full``, or a new one that ``begin`` makes of its name."""
        if full:
            self._finish_shard()
        if self._open is None:
            self._open = begin(f"{self._stem}_{len(self.records):02d}" if self.records else self._stem)
        return self._open

    def _finish_shard(self) -> None:
        assert self._open is not None
        record: Record = self._open.finish()  # type: ignore[assignment]
        self._open = None
        self.records.append(record)
        self._on_finished(record)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._open is None:
            return
        if kind is None:
            self._finish_shard()
        else:
            self._open.stack.__exit__(kind, error, traceback)
