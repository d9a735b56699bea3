"""Checkpoints: a folder that is either complete and checked or not there.

``checkpoints/step_00002000/`` holds ``model.safetensors``, ``optimizer.safetensors`` and ``state.json``, which has the
SHA-256 of the other two and of its own content. It is written under another name, flushed to the disk, and renamed;
nothing in it can carry code.

A checkpoint is *scheduled* if the settings asked for it. One that only a stop signal asked for is good to go on from,
but an undisturbed run has none such, so nothing else may depend on it: it counts for nothing, and goes when a newer one
comes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import read_json, sha256_of_file, sync_directory

FORMAT = 2
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
UNFINISHED = (".tmp", ".old")  # endings of folders that are being written and being removed


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. ``state`` is what was given to ``save``; tensors are read when asked for, on the CPU."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def best_step(self) -> int:
        """The step of the best validation up to this one; 0: there was none."""
        return int(self.state["best_step"])

    def model(self) -> dict[str, Tensor]:
        return load_file(self.path / MODEL)

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.path / OPTIMIZER)


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept, beside the newest and those of the best validation.

    The ``newest`` scheduled ones, and for good each scheduled one whose step is a multiple of ``every`` (0: none is).
    """

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
) -> Path:
    """Write the checkpoint of ``step`` into ``folder``; no other is touched.

    Args:
        model: tensors on the CPU, contiguous, none sharing its memory (``checkpoint_writer.snapshot`` makes them so).
        optimizer: likewise.
        state: whatever JSON can hold.
        scheduled: False: only a stop asked for it.
        best_step: of the best validation so far; 0: there was none.

    Raises:
        OSError: it could not be written (the disk is full, say); what was there before is as it was.
    """
    final = folder / _folder_name(step)
    beside = final.with_suffix(".tmp")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _clear(folder)
        beside.mkdir()
        checksums = {}
        for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
            _write_tensors(beside / name, tensors)
            checksums[name] = sha256_of_file(beside / name)
        content = {
            "format": FORMAT,
            "step": step,
            "scheduled": scheduled,
            "best_step": best_step,
            "sha256": checksums,
            **state,
        }
        sealed = {**content, "state_sha256": _seal(content)}
        (beside / STATE).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
        _sync_file(beside / STATE)
        sync_directory(beside)
        if final.exists():
            _remove(final)  # a damaged one that this run has caught up with
        beside.rename(final)
        sync_directory(folder)
    except (OSError, safetensors.SafetensorError) as error:
        number, reason = _reason(error)
        raise OSError(
            number,
            f"the checkpoint of step {step:,} could not be written ({reason}); finished ones are as they were, and the "
            "same command goes on from the newest",
            str(folder),
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return final


def tidy(folder: Path, step: int, keep: Retention) -> None:
    """Remove the checkpoints that need not be kept, now that the one of ``step`` is there."""
    paths = [path for path in _folders(folder) if _step(path) <= step]
    claims = {path: _claims(path) for path in paths}
    scheduled = [path for path in paths if claims[path].scheduled]
    recent = {*paths[:1], *scheduled[: keep.newest]}
    kept = {_step(path) for path in recent} | {claims[path].best_step for path in recent}
    kept |= {_step(path) for path in scheduled if keep.every and _step(path) % keep.every == 0}
    for path in paths:
        if _step(path) not in kept:
            _remove(path)


def steps(folder: Path) -> list[int]:
    """The steps of the finished checkpoints, newest first."""
    return [_step(path) for path in _folders(folder)]


def of_step(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step; UserError if it is damaged or not there."""
    return read(folder / _folder_name(step))


def latest(folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold; each damaged one before it is named to ``warn``. None: there is none.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    return _first_good(_folders(folder), folder, warn)


def to_go_back_to(folder: Path, warn: Callable[[str], None], before: int | None = None) -> Checkpoint | None:
    """As ``latest``, of the scheduled ones, and of those before the step ``before`` if there are any."""
    scheduled = [path for path in _folders(folder) if _claims(path).scheduled]
    earlier = [path for path in scheduled if before is None or _step(path) < before]
    return _first_good(earlier or scheduled[-1:], folder, warn)


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps than ``step``."""
    for path in _folders(folder):
        if _step(path) > step:
            _remove(path)


def read(path: Path) -> Checkpoint:
    """Open one checkpoint and verify it; UserError says which file is damaged.

    Files that have not changed since this process last read them are not read again.
    """
    try:
        state = read_json(path / STATE)
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {path} has format {state['format']}; this Kindling reads {FORMAT}")
        if state.pop("state_sha256") != _seal(state) or path.name != _folder_name(state["step"]):
            raise UserError(f"damaged checkpoint {path}: {STATE} does not match its checksum")
        for name in (MODEL, OPTIMIZER):
            if _sha256(path / name, _stamp(path / name)) != state["sha256"][name]:
                raise UserError(f"damaged checkpoint {path}: {name} does not match its checksum")
        return Checkpoint(path, state["step"], state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"damaged checkpoint {path}: {error}") from None


@dataclass(frozen=True)
class _Claims:
    """What a checkpoint says of itself, not verified. A state that cannot be read claims nothing."""

    scheduled: bool = False
    best_step: int = 0


def _claims(path: Path) -> _Claims:
    try:
        state = read_json(path / STATE)
        return _Claims(state["scheduled"], state["best_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return _Claims()


def _first_good(paths: Iterable[Path], folder: Path, warn: Callable[[str], None]) -> Checkpoint | None:
    damaged = False
    for path in paths:
        try:
            return read(path)
        except UserError as damage:
            warn(str(damage))
            damaged = True
    if damaged:
        raise UserError(f"every checkpoint in {folder} is damaged: nothing to go on from")
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
    """Remove a checkpoint; whenever that ends, there is all of it or nothing."""
    dying = path.with_suffix(".old")
    shutil.rmtree(dying, ignore_errors=True)
    path.rename(dying)
    shutil.rmtree(dying, ignore_errors=True)


def _clear(folder: Path) -> None:
    """Remove what a killed process was writing or removing."""
    for path in folder.glob("step_*"):
        if path.suffix in UNFINISHED:
            shutil.rmtree(path, ignore_errors=True)


def _seal(state: Mapping[str, Any]) -> str:
    """SHA-256 of a state's content, however it is laid out in the file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    """What changes when a file does."""
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(maxsize=64)
def _sha256(path: Path, stamp: tuple[int, int, int]) -> str:
    return sha256_of_file(path)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), path)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
    _sync_file(path)


def _reason(error: Exception) -> tuple[int | None, str]:
    """The system's number and words for a failure; safetensors hides them in its own."""
    number = error.errno if isinstance(error, OSError) else None
    if hidden := re.search(r"os error (\d+)", str(error)):
        number = int(hidden[1])
    return number, os.strerror(number) if number else str(error)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
