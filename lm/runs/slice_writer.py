"""Checkpoints that all processes of a run write, each its own slices, while training continues.

    every rank: copy its slices -> write them in the background -> rank 0, when all have: state.json, and the new name

No rank ever holds a whole tensor. All of them call the methods at the same steps.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from lm.runs import checkpoint
from lm.runs.checkpoint import MODEL, OPTIMIZER, Retention
from lm.runs.checkpoint_writer import CheckpointWriter, snapshot


class Peers(Protocol):
    """What the writer needs of the processes: ``lm.training.distributed.Ranks``."""

    rank: int
    world: int

    @property
    def is_main(self) -> bool: ...
    def on_main(self, work: Callable[[], Any]) -> Any: ...
    def exchanged(self, value: Any) -> list[Any]: ...


class SliceWriter(CheckpointWriter):
    """A ``CheckpointWriter`` whose methods every rank calls, with the slices that it holds.

    An error of one rank while writing is raised on all.
    """

    def __init__(self, folder: Path, keep: Retention, step: int, first: Callable[[], None], peers: Peers) -> None:
        super().__init__(folder if peers.is_main else None, keep, step, first)
        self._checkpoints, self._peers = folder, peers
        self._slices: Future[dict[str, str]] | None = None

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        optimizer: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        scheduled: bool,
        best_step: int,
        others: Mapping[str, Mapping[str, Tensor]] = {},
    ) -> None:
        """As of ``CheckpointWriter``; ``others`` has the same names on all ranks."""
        self.wait()
        folder, peers = self._checkpoints, self._peers
        kinds = {MODEL: model, OPTIMIZER: optimizer, **others}
        files = {checkpoint.file_names(n, peers.world)[peers.rank]: snapshot(part) for n, part in kinds.items()}
        marks = {"format": checkpoint.SLICED_FORMAT, "slices": peers.world, "step": step, "scheduled": scheduled}
        self._step, self._content = step, {**marks, "best_step": best_step, **state}

        def begin() -> None:
            with checkpoint.explained(folder, step):
                checkpoint.begin(folder, step)

        def write() -> dict[str, str]:
            with checkpoint.explained(folder, step):
                return checkpoint.write(checkpoint.temporary_folder(folder, step), files)

        peers.on_main(begin)
        self._slices = self._pool.submit(write)

    def wait(self) -> None:
        slices, self._slices = self._slices, None
        if slices is None:
            return
        found = self._peers.exchanged(_outcome(slices))
        self._peers.on_main(partial(self._finish, found))

    def check(self) -> None:
        if self._slices is not None and all(self._peers.exchanged(self._slices.done())):
            self.wait()

    def _finish(self, found: list[dict[str, str] | OSError]) -> None:
        """Make a checkpoint of the slices that all ranks have written; raise the error of the first that could not."""
        temporary = checkpoint.temporary_folder(self._checkpoints, self._step)
        try:
            hashes: dict[str, str] = {}
            for outcome in found:
                if isinstance(outcome, OSError):
                    raise outcome
                hashes |= outcome
            self._first()
            with checkpoint.explained(self._checkpoints, self._step):
                checkpoint.finish(temporary, {**self._content, "sha256": hashes})
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        checkpoint.tidy(self._checkpoints, self._step, self._keep)


def _outcome(writing: Future[dict[str, str]]) -> dict[str, str] | OSError:
    try:
        return writing.result()
    except OSError as error:
        return error
