"""Files that are either complete or absent: written under a temporary name, flushed to disk, renamed."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError


def sync_directory(directory: Path) -> None:
    """Make new and renamed files in ``directory`` survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path, *, sync_name: bool = True) -> Iterator[IO[bytes]]:
    """Open ``path`` for writing; it appears, complete and on disk, only if the block ends without an error.

    Without ``sync_name``, its name survives a power failure only after another file in its directory has been written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        if sync_name:
            sync_directory(path.parent)
    except BaseException:  # Ctrl-C too: clean up, and raise it again
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def only_writer_of(directory: Path, refusal: str) -> Iterator[None]:
    """Hold a lock on a directory; the system releases it when this process ends, even if it is killed.

    Raises:
        UserError: another process holds the lock; ``refusal`` is the message.
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
    """Remove everything in a directory, but not the directory."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file (text as UTF-8) so that readers see either the old content or the new one."""
    with atomic_file(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def output_ending(output: str | Path, endings: Sequence[str]) -> str:
    """Return the ending of an output file in lower case; for ``-``, standard output, the first of ``endings``.

    Raises ``UserError`` for any other ending.
    """
    ending = endings[0] if str(output) == "-" else Path(output).suffix.lower()
    if ending not in endings:
        raise UserError(f"cannot write to {output}: name a file that ends in {' or '.join(endings)}, or - for stdout")
    return ending


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold a string: it has no half of a surrogate pair, and no byte that became one."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises OSError if it cannot be read, ValueError if it is not JSON or too deeply nested."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str | bytes) -> Any:
    """Parse JSON text. Raises ValueError if it is invalid or nested too deeply for Python."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256_of_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_new_folder(out: Path, option: str = "--out") -> None:
    """Raise UserError if there is something at ``out``, the value of ``option``, other than an empty folder."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f'"{out}" already exists and is not an empty folder: choose another {option}')


def require_new_file(output: Path) -> None:
    """Raise UserError if a file cannot be written: its folder is missing or read-only, or ``output`` is a folder."""
    if output.is_dir():
        raise UserError(f"cannot write to {output}: it is a folder")
    if not output.parent.is_dir():
        raise UserError(f"cannot write to {output}: there is no folder {output.parent}")
    if not os.access(output.parent, os.W_OK):
        raise UserError(f"cannot write to {output}: you may not write to the folder {output.parent}")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Open a folder to write to; if the block ends without an error, it becomes ``out``."""
    require_new_folder(out)
    name = out.resolve()
    name.parent.mkdir(parents=True, exist_ok=True)
    partial = name.parent / f".{name.name}.partial"
    partial.mkdir(exist_ok=True)
    with only_writer_of(partial, f'another process is writing to "{out}": wait for it, or choose another --out'):
        empty_directory(partial)  # left by a process that was killed
        try:
            yield partial
            for directory in [path for path in partial.rglob("*") if path.is_dir()]:
                sync_directory(directory)
            sync_directory(partial)
            partial.replace(name)
            sync_directory(name.parent)
        except BaseException:  # Ctrl-C too: clean up, and raise it again
            shutil.rmtree(partial, ignore_errors=True)
            raise
