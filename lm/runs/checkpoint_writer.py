"""Checkpoints written while training goes on.

What is to be saved is copied first, and that copy is the only pause; one background thread then writes it. There is
never more than one copy: a save that comes too soon waits for the one before it.
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
    """Copies on the CPU, contiguous, that no later step changes."""
    return {
        name: tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes of a model, by name: the weights that require a gradient; views of the live ones."""
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def load_trained(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put the tensors of ``trained_tensors`` back into a model; what requires no gradient stays as it is.

    Raises:
        RuntimeError: they are not all of the model's, or others, or of another shape.
    """
    wanted = trained_tensors(model)
    if apart := sorted(tensors.keys() ^ wanted.keys()):
        raise RuntimeError(f"{apart[0]} is only in one of them")
    for name, tensor in wanted.items():
        if tensors[name].shape != tensor.shape:
            raise RuntimeError(f"{name} is {tuple(tensors[name].shape)}, not {tuple(tensor.shape)}")
    model.load_state_dict(dict(tensors), strict=False)


class Saver:
    """Writes the checkpoints of a run into ``folder`` and removes those that ``keep`` lets go.

    A context manager; leaving it waits for what is being written. An error while writing is raised by whichever method
    is called next, or on leaving.

    Args:
        folder: None: another process of this run writes them, and nothing is done here.
        step: the checkpoint that the run goes on from; 0: it begins.
        first: called before each checkpoint is written, in the background: what must be on the disk before it is.
    """

    def __init__(self, folder: Path | None, keep: Retention, step: int, first: Callable[[], None]) -> None:
        self._folder, self._keep, self._first = folder, keep, first
        self._pool = ThreadPoolExecutor(1, "kindling-saver")
        self._pending: Future[None] | None = None
        # A kill may have come between a checkpoint and the removal of older ones, which must not be gone back to.
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
    ) -> None:
        """Copy everything and return; it is written by ``lm.runs.checkpoint.save``. ``state`` must not change later."""
        if self._folder is None:
            return
        self.wait()
        arguments = (step, snapshot(model), snapshot(optimizer), state)
        marks = {"scheduled": scheduled, "best_step": best_step}
        self._pending = self._pool.submit(self._write, self._folder, *arguments, **marks)

    def wait(self) -> None:
        """Return when all that was saved is on the disk."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def check(self) -> None:
        """Raise the error of a save that has failed; do not wait."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def _write(self, folder: Path, step: int, *content: Any, **marks: Any) -> None:
        self._first()
        checkpoint.save(folder, step, *content, **marks)
        checkpoint.tidy(folder, step, self._keep)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown()
        if error is None:  # otherwise that is what the run ends with
            self.wait()
