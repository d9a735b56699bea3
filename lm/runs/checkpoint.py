"""Checkpoints: folders that are either complete and verified, or absent.

``checkpoints/step_00002000/`` holds ``model.safetensors``, ``optimizer.safetensors``, ``objective.safetensors`` if the
objective has a state, ``average.safetensors`` if there is a mean of the weights over some steps, and ``state.json``,
which has the SHA-256 of the other files and of its own content. The folder is written under another name, flushed to
the disk, and renamed. None of the formats can contain code.

Where a model is too large for one process, each of n processes writes its slices: ``model-00001-of-00004.safetensors``
in the place of ``model.safetensors``, and so on (``lm.runs.slice_writer``). The rows of a tensor in these files, in
their order, are the tensor; what has no rows is in the first file.

A checkpoint is *scheduled* if the settings asked for it. One that only a stop signal asked for can be resumed from, but
an uninterrupted run would not have it, so nothing else may depend on it: it is ignored by retention and removed by the
next save.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load, load_file, save_file
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import WINDOWS, read_json, rename, sha256_of_file, sync_directory, sync_file

FORMAT, SLICED_FORMAT = 2, 3
MODEL, OPTIMIZER, OBJECTIVE = "model.safetensors", "optimizer.safetensors", "objective.safetensors"
AVERAGE = "average.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. ``state`` is what ``save`` received; the methods read tensors from the disk to the CPU.

    ``weights`` says which weights are meant, the last ones (``MODEL``) or their mean (``AVERAGE``).
    """

    path: Path
    step: int
    state: dict[str, Any]
    weights: str = MODEL

    @property
    def best_step(self) -> int:
        """The step of the best validation up to this checkpoint; 0: there was none."""
        return int(self.state["best_step"])

    @property
    def best_is_average(self) -> bool:
        """Whether that validation was of the mean of the weights (``lm.runs.metrics_log.Best``)."""
        return bool(self.state.get("training", {}).get("best", {}).get("averaged"))

    @property
    def weights_sha256(self) -> str:
        """What identifies the weights: the hash of their file, or that of the hashes of its slices."""
        hashes = [self.state["sha256"][name] for name in file_names(self.weights, self.state.get("slices", 0))]
        return str(hashes[0]) if "slices" not in self.state else hashlib.sha256(" ".join(hashes).encode()).hexdigest()

    @property
    def has_average(self) -> bool:
        return self._has(AVERAGE)

    @property
    def is_average(self) -> bool:
        return self.weights == AVERAGE

    def average(self) -> Checkpoint:
        """The same checkpoint with the mean of the weights over the last steps in the place of the weights."""
        return replace(self, weights=AVERAGE)

    def model(self) -> Mapping[str, Tensor]:
        return self._tensors(self.weights)

    def optimizer(self) -> Mapping[str, Tensor]:
        return self._tensors(OPTIMIZER)

    def objective(self) -> Mapping[str, Tensor]:
        """The objective's state; empty if it has none."""
        return self._tensors(OBJECTIVE) if self._has(OBJECTIVE) else {}

    def weights_file(self) -> Path:
        """One file with all weights, which slices are first put together in, each time that it is asked for."""
        whole = self.path / self.weights
        if "slices" in self.state:
            joined = whole.with_suffix(".tmp")
            save_tensors(self.model(), joined)
            sync_file(joined)
            rename(joined, whole)
        return whole

    def _has(self, name: str) -> bool:
        return file_names(name, self.state.get("slices", 0))[0] in self.state["sha256"]

    def _tensors(self, name: str) -> Mapping[str, Tensor]:
        if "slices" not in self.state:
            return load_tensors(self.path / name)
        return SlicedTensors([self.path / each for each in file_names(name, self.state["slices"])])


class SlicedTensors(Mapping[str, Tensor]):
    """The tensors of several files, each put together when it is asked for, so that few are in memory at once."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._files = [load_tensors(path) for path in paths]

    def __getitem__(self, name: str) -> Tensor:
        parts = [tensors[name] for tensors in self._files if name in tensors]
        if not parts:
            raise KeyError(name)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __contains__(self, name: object) -> bool:
        return name in self._files[0]

    def __iter__(self) -> Iterator[str]:
        return iter(self._files[0])

    def __len__(self) -> int:
        return len(self._files[0])


def file_names(name: str, slices: int) -> list[str]:
    """The files that hold what ``name`` stands for: its slices, or if there are none (0) itself."""
    stem, _, ending = name.partition(".")
    return [f"{stem}-{number:05d}-of-{slices:05d}.{ending}" for number in range(1, slices + 1)] or [name]


@dataclass(frozen=True)
class Retention:
    """Keep the ``newest`` scheduled checkpoints, the best, and permanently the multiples of ``every`` (0: none)."""

    newest: int
    every: int = 0


def save(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    scheduled: bool = True,
    best_step: int = 0,
    others: Mapping[str, Mapping[str, Tensor]] = {},
) -> Path:
    """Write the checkpoint of ``step`` into ``folder``, without touching any other.

    Args:
        model, optimizer: tensors on the CPU, contiguous and not sharing memory, as from ``checkpoint_writer.snapshot``.
        state: anything that JSON can hold.
        scheduled: False if only a stop signal asked for it.
        best_step: the step of the best validation so far; 0: there was none.
        others: tensors likewise, by the name of their file, ``OBJECTIVE`` or ``AVERAGE``; without tensors no file.

    Raises:
        OSError: it could not be written (for example, the disk is full); the earlier checkpoints are unchanged.
    """
    files = {MODEL: model, OPTIMIZER: optimizer, **{name: tensors for name, tensors in others.items() if tensors}}
    marks = {"format": FORMAT, "step": step, "scheduled": scheduled, "best_step": best_step}
    try:
        with explained(folder, step):
            temporary = begin(folder, step)
            return finish(temporary, {**marks, "sha256": write(temporary, files), **state})
    finally:
        shutil.rmtree(temporary_folder(folder, step), ignore_errors=True)


def temporary_folder(folder: Path, step: int) -> Path:
    """Where the checkpoint of ``step`` is written before it is renamed."""
    return folder / f"{_folder_name(step)}.tmp"


def begin(folder: Path, step: int) -> Path:
    """Make the temporary folder of a checkpoint, and remove what killed processes left."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in [*folder.glob("step_*.tmp"), *folder.glob("step_*.old")]:
        shutil.rmtree(left, ignore_errors=True)
    temporary = temporary_folder(folder, step)
    temporary.mkdir()
    return temporary


def write(temporary: Path, files: Mapping[str, Mapping[str, Tensor]]) -> dict[str, str]:
    """Write tensors, by the name of their file, into a temporary folder and to the disk; return each file's SHA-256."""
    for name, tensors in files.items():
        save_tensors(tensors, temporary / name)
        sync_file(temporary / name)
    return {name: sha256_of_file(temporary / name) for name in files}


def finish(temporary: Path, content: Mapping[str, Any]) -> Path:
    """Write the state file of a checkpoint whose other files are there, and rename its folder; return its path."""
    final = temporary.with_suffix("")
    sealed = {**content, "state_sha256": _seal(content)}
    (temporary / STATE).write_text(json.dumps(sealed, indent=1), encoding="utf-8", newline="\n")
    sync_file(temporary / STATE)
    sync_directory(temporary)
    if final.exists():
        _remove(final)  # a damaged one from before the run was resumed
    rename(temporary, final)
    sync_directory(final.parent)
    return final


@contextmanager
def explained(folder: Path, step: int) -> Iterator[None]:
    """Turn what can go wrong while a checkpoint is written into an OSError with one sentence."""
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        hidden = re.search(r"os error (\d+)", str(error))  # in the message of a SafetensorError
        number = int(hidden[1]) if hidden else getattr(error, "errno", None)
        raise OSError(
            number,
            f"the checkpoint of step {step:,} could not be written ({os.strerror(number) if number else error}); "
            "finished ones are unchanged, and the same command resumes from the newest",
            str(folder),
        ) from None


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file to the CPU. Raises OSError or SafetensorError.

    The tensors are maps of the file where that is allowed: Windows could not remove the file while they are used.
    """
    return load(path.read_bytes()) if WINDOWS else load_file(path)


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file with the permissions of any other new file; safetensors itself gives only 0600.

    Raises OSError or SafetensorError as safetensors does.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(dict(tensors), path, metadata)
    path.chmod(mode)


def tidy(folder: Path, step: int, keep: Retention) -> None:
    """Remove the checkpoints that ``keep`` does not cover, up to ``step``, the newest one."""
    paths = [path for path in _folders(folder) if _step(path) <= step]
    scheduled = [path for path in paths if _claims(path)[0]]
    recent = {*paths[:1], *scheduled[: keep.newest]}
    kept = {_step(path) for path in recent} | {_claims(path)[1] for path in recent}
    kept |= {_step(path) for path in scheduled if keep.every and _step(path) % keep.every == 0}
    for path in paths:
        if _step(path) not in kept:
            with suppress(PermissionError) if WINDOWS else nullcontext():  # a reader has it open: until the next time
                _remove(path)


def steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints, newest first."""
    return [_step(path) for path in _folders(folder)]


def of_step(folder: Path, step: int) -> Checkpoint:
    """Read the checkpoint of a step; UserError if it is damaged or missing."""
    return read(folder / _folder_name(step))


def latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """Read the newest intact checkpoint; ``warn`` of damaged ones. None: there is none; UserError: all are damaged."""
    return _first_good(_folders(folder), folder, warn)


def to_go_back_to(folder: Path, warn: Callable[[str], None], before: int | None = None) -> Checkpoint | None:
    """As ``latest``, among the scheduled checkpoints; among those before the step ``before``, if there are any."""
    scheduled = [path for path in _folders(folder) if _claims(path)[0]]
    earlier = [path for path in scheduled if before is None or _step(path) < before]
    return _first_good(earlier or scheduled[-1:], folder, warn)


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints after ``step``."""
    for path in _folders(folder):
        if _step(path) > step:
            _remove(path)


def read(path: Path) -> Checkpoint:
    """Open and verify a checkpoint, rereading only files that changed since; the UserError names a damaged file."""
    try:
        state = read_json(path / STATE)
        if state["format"] not in (FORMAT, SLICED_FORMAT):
            raise UserError(
                f"checkpoint {path} has format {state['format']}; this Kindling reads {FORMAT} and {SLICED_FORMAT}"
            )
        if state.pop("state_sha256") != _seal(state) or path.name != _folder_name(state["step"]):
            raise UserError(f"damaged checkpoint {path}: {STATE} does not match its checksum")
        parts, slices = state["sha256"], state["slices"] if state["format"] == SLICED_FORMAT else 0
        optional = [name for name in (OBJECTIVE, AVERAGE) if file_names(name, slices)[0] in parts]
        for name in [file for kind in (MODEL, OPTIMIZER, *optional) for file in file_names(kind, slices)]:
            status = (path / name).stat()
            stamp = status.st_ino, status.st_size, status.st_mtime_ns
            if _sha256(path / name, stamp) != parts[name]:
                raise UserError(f"damaged checkpoint {path}: {name} does not match its checksum")
        return Checkpoint(path, state["step"], state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"damaged checkpoint {path}: {error}") from None


def _claims(path: Path) -> tuple[bool, int]:
    """Whether a checkpoint was scheduled, and its best step, unverified; False and 0 if its state cannot be read."""
    try:
        state = read_json(path / STATE)
        return state["scheduled"], state["best_step"]
    except (OSError, ValueError, KeyError, TypeError):
        return False, 0


def _first_good(paths: Sequence[Path], folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    for path in paths:
        try:
            return read(path)
        except UserError as damage:
            warn(str(damage))
    if paths:
        raise UserError(f"every checkpoint in {folder} is damaged: there is nothing to resume from")
    return None


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step_"))


def _folders(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    found = (path for path in folder.glob("step_*") if re.fullmatch(r"step_\d{8,}", path.name))
    return sorted(found, key=_step, reverse=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint; if interrupted, it is either complete or gone."""
    doomed = path.with_suffix(".old")
    shutil.rmtree(doomed, ignore_errors=True)
    rename(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _seal(state: Mapping[str, Any]) -> str:
    """SHA-256 of a state's content, independent of its layout in the file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=64)
def _sha256(path: Path, stamp: tuple[int, int, int]) -> str:
    """The hash of a file; ``stamp`` has its inode, size and modification time, which change when the file does."""
    return sha256_of_file(path)
