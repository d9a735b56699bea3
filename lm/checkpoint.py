"""Checkpoints: a folder that is either complete and checked or not there.

``checkpoints/step_00002000/`` holds ``model.safetensors``, ``optimizer.safetensors`` and ``state.json``, which has the
SHA-256 of the other two and of its own content. It is written under another name, flushed to the disk, and renamed;
nothing in it can carry code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import sha256_of_file, sync_directory

FORMAT = 1
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. ``state`` is what was given to ``save``; tensors are read when asked for, on the CPU."""

    path: Path
    step: int
    state: dict[str, Any]

    def model(self) -> dict[str, Tensor]:
        return load_file(self.path / MODEL)

    def optimizer(self) -> dict[str, Tensor]:
        return load_file(self.path / OPTIMIZER)


def save(
    folder: Path,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of ``step`` into ``folder``, then remove all but the ``keep`` newest.

    Raises:
        OSError: it could not be written (the disk is full, say); what was there before is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / _folder_name(step)
    beside = final.with_suffix(".tmp")
    for leftover in folder.glob("step_*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        beside.mkdir()
        checksums = {}
        for name, tensors in ((MODEL, model), (OPTIMIZER, optimizer)):
            _write_tensors(beside / name, tensors)
            checksums[name] = sha256_of_file(beside / name)
        content = {"format": FORMAT, "step": step, "sha256": checksums, **state}
        sealed = {**content, "state_sha256": _seal(content)}
        (beside / STATE).write_text(json.dumps(sealed, indent=1), encoding="utf-8")
        _sync_file(beside / STATE)
        sync_directory(beside)
        if final.exists():
            shutil.rmtree(final)  # a damaged one that this run has caught up with
        beside.rename(final)
        sync_directory(folder)
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write the checkpoint of step {step}: {error}") from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    for old in _folders(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest(folder: Path, warn: Callable[[str], None], *, before: int | None = None) -> Checkpoint | None:
    """The newest checkpoint whose checksums hold; each damaged one before it is named to ``warn``. None: there is none.

    ``before``: of those before this step, if there are any.

    Raises:
        UserError: there are checkpoints, and all are damaged.
    """
    folders = _folders(folder)
    if before is not None:
        folders = [path for path in folders if path.name < _folder_name(before)] or folders[-1:]
    for path in folders:
        try:
            return read(path)
        except UserError as damage:
            warn(str(damage))
    if folders:
        raise UserError(f"every checkpoint in {folder} is damaged: nothing to go on from")
    return None


def remove_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps than ``step``."""
    for path in _folders(folder):
        if path.name > _folder_name(step):
            shutil.rmtree(path, ignore_errors=True)


def read(path: Path) -> Checkpoint:
    """Open one checkpoint and verify it; UserError says which file is damaged."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        if state["format"] != FORMAT:
            raise UserError(f"checkpoint {path} has format {state['format']}; this Kindling reads {FORMAT}")
        if state.pop("state_sha256") != _seal(state) or path.name != _folder_name(state["step"]):
            raise UserError(f"damaged checkpoint {path}: {STATE} does not match its checksum")
        for name in (MODEL, OPTIMIZER):
            if sha256_of_file(path / name) != state["sha256"][name]:
                raise UserError(f"damaged checkpoint {path}: {name} does not match its checksum")
        return Checkpoint(path, state["step"], state)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"damaged checkpoint {path}: {error}") from None


def _folder_name(step: int) -> str:
    return f"step_{step:08d}"


def _seal(state: Mapping[str, Any]) -> str:
    """SHA-256 of a state's content, however it is laid out in the file."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _folders(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted((p for p in folder.glob("step_*") if p.suffix != ".tmp"), reverse=True)


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, path)
    umask = os.umask(0)
    os.umask(umask)
    path.chmod(0o666 & ~umask)  # safetensors makes files that only their owner can read
    _sync_file(path)


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
