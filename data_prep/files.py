"""Files that are either complete or absent: written under a temporary name, flushed to disk, renamed.

What differs between operating systems on disk is here: locks, flushing, renaming what another program has open, and the
folder for caches. A location with "://" in it is no path but a URL.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError

URL = "://"
LOCK = ".lock"  # in a directory that has one writer at a time
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}  # what a file system says that has none
FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
WINDOWS = os.name == "nt"
SHARING_SECONDS = 2.0


def is_remote(location: str | Path) -> bool:
    """Return whether a location is a URL."""
    return isinstance(location, str) and URL in location


def problem_of_url(url: str) -> str:
    """What is wrong with a URL as the name of a folder, in one sentence that repeats no secret; "" if nothing is."""
    scheme, _, rest = url.partition(URL)
    server = rest.partition("/")[0]
    if "@" in server:
        return (
            f'"{scheme}://…@{server.rpartition("@")[2]}" has a user name or password in it, which the run directory '
            "would show: leave it out, and set the credentials in the environment"
        )
    if "?" in rest or "#" in rest:
        return f'"{scheme}://{server}/…" must name a folder: leave out what follows "?" or "#"'
    return ""


def user_cache() -> Path:
    """The folder of this user for what can be downloaded again."""
    if WINDOWS:
        usual = os.environ.get("LOCALAPPDATA") or "~/AppData/Local"
    else:
        usual = "~/Library/Caches" if sys.platform == "darwin" else os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(os.path.expanduser(usual)) / "kindling"  # noqa: PTH111 (Path.expanduser fails without a home)


def sync_file(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("r+b") as file:  # Windows flushes only files that are open for writing
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make new and renamed files in ``directory`` survive a power failure; on Windows, the system sees to that."""
    if WINDOWS:  # which cannot open a directory
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(path: Path, target: Path) -> None:
    """Rename a file, also over another one, or a folder.

    Windows refuses while a program has either open, as a virus scanner has a new file: try for ``SHARING_SECONDS``.
    """
    until = time.monotonic() + SHARING_SECONDS
    while True:
        try:
            path.replace(target)
            return
        except PermissionError:
            if not WINDOWS or time.monotonic() > until:
                raise
        time.sleep(0.02)


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
        rename(temporary, path)
        if sync_name:
            sync_directory(path.parent)
    except BaseException:  # Ctrl-C too: clean up, and raise it again
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def only_writer_of(lock: Path, refusal: str) -> Iterator[None]:
    """Hold the lock file ``lock``; the system releases it when this process ends, even if it is killed.

    The file is gone afterwards, except after a kill, and then does not matter. A folder in which nothing can be written
    has no writer and needs no lock.

    Raises:
        UserError: another process holds the lock, and ``refusal`` is the message; or the file system has no locks.
    """
    from filelock import FileLock, Timeout  # here, because --help should be quick

    held = FileLock(lock, blocking=False, thread_local=False, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        raise UserError(refusal) from None
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            raise UserError(
                f'the file system of "{lock.parent}" has no locks: choose a folder on a local disk'
            ) from None
        if error.errno not in FORBIDDEN or (lock.exists() and os.access(lock.parent, os.W_OK)):
            raise
    try:
        yield
    finally:
        if held.is_locked:
            with suppress(OSError):  # before the release, or it might be another's; Windows removes it by itself
                lock.unlink()
            held.release()


@contextmanager
def in_turn(lock: Path) -> Iterator[None]:
    """Hold the lock file ``lock``, after waiting for other threads and processes; no lock where there can be none."""
    from filelock import FileLock  # here, because --help should be quick

    held = FileLock(lock, thread_local=False, fallback_to_soft=False)
    with suppress(OSError):
        held.acquire()
    try:
        yield
    finally:
        held.release()


def names_in(directory: Path) -> set[str]:
    """The names of everything in a directory but its lock."""
    return {path.name for path in directory.iterdir()} - {LOCK}


def empty_directory(directory: Path) -> None:
    """Remove everything in a directory, but neither the directory nor its lock."""
    for path in (directory / name for name in names_in(directory)):
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
    if out.exists() and (not out.is_dir() or names_in(out)):
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
    partial, lock = (name.parent / f".{name.name}.{ending}" for ending in ("partial", "lock"))
    with only_writer_of(lock, f'another process is writing to "{out}": wait for it, or choose another --out'):
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        try:
            partial.mkdir()
            yield partial
            for directory in [path for path in partial.rglob("*") if path.is_dir()]:
                sync_directory(directory)
            sync_directory(partial)
            if name.exists():  # and empty; Windows renames no folder to another
                (name / LOCK).unlink(missing_ok=True)
                name.rmdir()
            rename(partial, name)
            sync_directory(name.parent)
        except BaseException:  # Ctrl-C too: clean up, and raise it again
            shutil.rmtree(partial, ignore_errors=True)
            raise
