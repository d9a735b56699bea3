"""Write checkpoints while training continues.

Training pauses only while the tensors are copied; one background thread then writes the copy. There is never more than
one copy: a save waits for the previous one to finish.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from lm.runs import checkpoint
from lm.runs.checkpoint import Retention


def snapshot(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies on the CPU, which no later step changes."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model that require a gradient, by name, as views of the live ones."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load ``trained_tensors`` of a model into another one; RuntimeError if names or shapes are not the same."""
    wanted = trained_tensors(model)
    if unmatched := sorted(tensors.keys() ^ wanted.keys()):
        raise RuntimeError(f"{unmatched[0]} is only in one of them")
    with torch.no_grad():
        for name, tensor in wanted.items():
            saved = tensors[name]  # one at a time: slices are put together when they are asked for
            if saved.shape != tensor.shape:
                raise RuntimeError(f"{name} is {tuple(saved.shape)}, not {tuple(tensor.shape)}")
            tensor.copy_(saved)


class CheckpointWriter:
    """Writes a run's checkpoints into ``folder`` in the background, and removes those that ``keep`` does not cover.

    A context manager; leaving it waits for the last checkpoint. An error while writing is raised by the next method
    that is called, or on leaving.

    Args:
        folder: None: another process of this run writes the checkpoints, and nothing is done here.
        step: the checkpoint that the run was resumed from; 0: it is new.
        first: called in the background before each checkpoint is written, to bring to the disk what must precede it.
    """

    def __init__(self, folder: Path | None, keep: Retention, step: int, first: Callable[[], None]) -> None:
        self._folder, self._keep, self._first = folder, keep, first
        self._pool = ThreadPoolExecutor(1, "kindling-checkpoints")
        self._pending: Future[None] | None = None
        # A kill may have come between a checkpoint and the removal of older ones, which a rollback must not find.
        if folder is not None:
            checkpoint.tidy(folder, step, keep)

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
        """Copy the tensors and return; ``lm.runs.checkpoint.save`` writes them later. ``state`` must not change."""
        folder = self._folder
        if folder is None:
            return
        self.wait()
        weights, moments = snapshot(model), snapshot(optimizer)
        more = {name: snapshot(tensors) for name, tensors in others.items()}

        def write() -> None:
            self._first()
            checkpoint.save(
                folder, step, weights, moments, state, scheduled=scheduled, best_step=best_step, others=more
            )
            checkpoint.tidy(folder, step, self._keep)

        self._pending = self._pool.submit(write)

    def wait(self) -> None:
        """Return when the last checkpoint is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise the error of a save that has failed, without waiting."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:  # otherwise the run ends with that error
            self.wait()
