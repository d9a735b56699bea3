"""Files that are either whole or not there: written beside, flushed to the disk, renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError


def sync_directory(directory: Path) -> None:
    """Make the names inside ``directory`` (a rename, a new file) survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path, *, sync_name: bool = True) -> Iterator[IO[bytes]]:
    """Open ``path`` for writing; it appears, complete and on the disk, only when the block ends without an error.

    Without ``sync_name`` its name survives a power cut only after another file of its directory has been written.
    """
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
        if sync_name:
            sync_directory(path.parent)
    except BaseException:  # of whatever kind, it goes on up
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def only_writer_of(directory: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on a directory; the system frees it when this process ends, however it ends.

    Raises:
        UserError: another process holds it; ``refusal`` is the sentence.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(refusal) from None
        yield
    finally:
        os.close(descriptor)


def empty_directory(directory: Path) -> None:
    """Remove everything in a directory, but not itself."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a whole small file (text as UTF-8) so that a reader sees the old content or the new, never a part."""
    with atomic_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def read_json(path: Path) -> Any:
    """What a JSON file holds; OSError if it cannot be read, ValueError if it is no JSON or is meant to do harm."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says; ValueError if it is none, or nested more deeply than Python follows."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256_of_file(path: Path) -> str:
    """SHA-256 of the file's bytes, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``out`` when it is complete; nothing stays of one that is not."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} is there already and not empty: choose another --out")
    beside = out.with_name(out.name + ".tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
        if out.exists():
            out.rmdir()
        beside.rename(out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
