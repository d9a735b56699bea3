"""List, open and decompress files: on local disks and, through fsspec, anywhere else."""

from __future__ import annotations

import bz2
import fnmatch
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError
from data_prep.files import URL, is_remote
from data_prep.sources.documents import one_line
from data_prep.sources.formats import FIRST_BLOCK_BYTES, packing_of

BLOCK_BYTES = 1 << 20
ZSTD_INPUT_BYTES = 1 << 12  # expands to at most 128 MiB
MAGIC = ("*", "?", "[")


class UnreadableError(Exception):
    """A file that cannot be opened; the message follows the file's name."""


def is_glob(location: str) -> bool:
    """Return whether a location is a pattern. A "?" in a URL does not count, nor does the name of an existing file."""
    if is_remote(location):
        return "*" in location
    return any(character in location for character in MAGIC) and not os.path.lexists(location)


def root_of_glob(pattern: str) -> str:
    """Return the folder above the first pattern in a path: ``data`` for ``data/*/a.txt``, or "" if there is none."""
    magic = ("*",) if is_remote(pattern) else MAGIC
    fixed = pattern[: min(pattern.find(character) for character in magic if character in pattern)].replace(os.sep, "/")
    folder = fixed[: fixed.rfind("/") + 1]
    whole = folder in ("", "/") or folder.endswith((URL, ":/"))  # ":/": a drive of Windows
    return folder if whole else folder.rstrip("/")


def last_name(location: str) -> str:
    """Return the name of a file or folder, even if the path does not end with it, as in ``.`` and ``..``."""
    name = location.rstrip("/").rpartition("/")[2] if is_remote(location) else Path(location).name
    return name if name not in ("", "..") or is_remote(location) else Path(location).resolve().name


# Listing


def list_folder(folder: str) -> list[tuple[str, int]]:
    """Return path and size of all files below a folder, sorted by path; hidden files and linked folders are skipped."""
    if is_remote(folder):
        return _list_remote(folder, lambda filesystem, path: filesystem.find(path, detail=True))
    paths = sorted(_walk(folder), key=lambda path: Path(path).parts)
    return [(path, Path(path).stat().st_size) for path in paths]


def list_glob(pattern: str) -> list[tuple[str, int]]:
    """Return path and size of the files that match a pattern; ``**`` stands for any number of folders."""
    if is_remote(pattern):
        return _list_remote(pattern, lambda filesystem, path: filesystem.glob(path, detail=True))
    root = root_of_glob(pattern)
    parts = Path(pattern).relative_to(root).parts
    depth = None if "**" in parts else len(parts)
    paths = [path for path in _walk(root, depth) if _matches(Path(path).relative_to(root).parts, parts)]
    return [(path, Path(path).stat().st_size) for path in sorted(paths, key=lambda path: Path(path).parts)]


def size_of(path: str) -> int | None:
    """Return a file's size in bytes, or None if its server does not say. Raises ``UserError`` if it is missing."""
    if not is_remote(path):
        return Path(path).stat().st_size
    with read_errors(path):
        filesystem, inner = filesystem_of(path)
        size = filesystem.size(inner)
        return None if size is None else int(size)


def is_folder(location: str) -> bool:
    """Return whether a location is a folder."""
    if not is_remote(location):
        return Path(location).is_dir()
    with read_errors(location):
        filesystem, path = filesystem_of(location)
        return bool(filesystem.isdir(path))


def _walk(folder: str, depth: int | None = None) -> Iterator[str]:
    """Yield the files below a folder, at most ``depth`` levels deep. Linked folders are skipped: they may be loops."""
    for parent, folders, names in os.walk(folder or ".", onerror=_refuse_folder):
        level = len(Path(parent).relative_to(folder).parts) + 1
        folders[:] = [] if level == depth else [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(parent) / name
            if not name.startswith(".") and path.is_file():
                yield str(path)


def linked_folders(folder: str) -> list[str]:
    """Return the links to folders below a local folder, which are not followed."""
    found = []
    for parent, folders, _ in [] if is_remote(folder) else os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [str(Path(parent) / name) for name in folders if (Path(parent) / name).is_symlink()]
    return sorted(found)


def broken_links(folder: str) -> list[str]:
    """Return the links below a local folder that lead to no file or folder, or in a circle."""
    found = []
    for parent, folders, names in [] if is_remote(folder) else os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = (Path(parent) / name for name in names if not name.startswith("."))
        found += [str(path) for path in links if path.is_symlink() and not path.exists()]
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    raise UserError(f'cannot list the folder "{one_line(str(error.filename))}": {error.strerror}') from None


def _matches(names: tuple[str, ...], pattern: tuple[str, ...]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**" and _matches(names, pattern[1:]):
        return True
    if not names:
        return False
    rest = pattern if pattern[0] == "**" else pattern[1:]
    return (pattern[0] == "**" or fnmatch.fnmatchcase(names[0], pattern[0])) and _matches(names[1:], rest)


def _list_remote(location: str, find: Callable[[Any, str], dict[str, dict[str, Any]]]) -> list[tuple[str, int]]:
    root = root_of_glob(location) if is_glob(location) else location.rstrip("/")
    with read_errors(location):
        filesystem, path = filesystem_of(location)
        above = len(filesystem._strip_protocol(root).rstrip("/")) + 1
        sizes = {
            name[above:]: entry["size"] for name, entry in find(filesystem, path).items() if entry["type"] == "file"
        }
    names = sorted(tuple(name.split("/")) for name in sizes)
    shown = ["/".join(parts) for parts in names if not any(part.startswith(".") for part in parts)]
    return [(root + ("" if root.endswith("/") else "/") + name, sizes[name] or 0) for name in shown]


def filesystem_of(location: str) -> tuple[Any, str]:
    import fsspec  # rarely needed

    return fsspec.core.url_to_fs(location)


@contextmanager
def read_errors(location: str) -> Iterator[None]:
    """Raise ``UserError`` if the disk or network fails while a location is read."""
    try:
        yield
    except FileNotFoundError:
        raise UserError(f'there is no file or folder "{one_line(location)}"') from None
    except (UserError, UnreadableError):
        raise
    except Exception as error:  # every remote system has its own errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'cannot read "{one_line(location)}": {reason}') from error


# Reading


@dataclass
class Stream:
    """The decompressed bytes of an open file, block by block. ``damage`` says why they ended early, if they did."""

    file: Any
    name: str
    damage: str = field(default="", init=False)
    waiting: bytes = field(default=b"", init=False)

    def peek(self) -> bytes:
        """Return the first ``FIRST_BLOCK_BYTES`` (fewer if the file ends or breaks earlier) without consuming them."""
        found = b""
        for block in self.blocks(FIRST_BLOCK_BYTES):
            found += block
            if len(found) >= FIRST_BLOCK_BYTES:
                break
        self.waiting = found
        return found

    def seek(self, position: int) -> None:
        """Continue reading from an offset; only for files that are not compressed."""
        self.waiting = b""
        self.file.seek(position)

    def blocks(self, size: int = BLOCK_BYTES) -> Iterator[bytes]:
        """Yield the rest of the file. Raises ``UserError`` if the disk or network fails: nothing is silently lost."""
        if self.waiting:
            block, self.waiting = self.waiting, b""
            yield block
        if self.damage:
            return
        read = getattr(
            self.file, "read1", self.file.read
        )  # read1 returns the intact bytes before damage, read does not
        while True:
            try:
                block = read(size)
            except (EOFError, zlib.error, lzma.LZMAError) as error:
                self.damage = str(error)
                return
            except OSError as error:
                if error.errno is not None:
                    raise UserError(f'cannot read all of "{one_line(self.name)}": {error.strerror}') from error
                self.damage = str(error)  # raised by gzip and bz2 for invalid data
                return
            except Exception as error:  # every remote system has its own errors
                if not is_remote(self.name):
                    raise
                raise UserError(f'cannot read all of "{one_line(self.name)}": {error}') from error
            if not block:
                return
            yield block


@contextmanager
def open_stream(path: str) -> Iterator[Stream]:
    """Open a file, decompressed according to its suffix. Raises ``UnreadableError`` if it cannot be opened."""
    with open_raw(path) as file, _decompressed(file, packing_of(path)) as decompressed:
        yield Stream(decompressed, path)


@contextmanager
def open_raw(path: str) -> Iterator[IO[bytes]]:
    """Open a file without decompression, seekable if possible. Raises ``UnreadableError`` if it cannot be opened."""
    if is_remote(path):
        with read_errors(path):
            filesystem, inner = filesystem_of(path)
            try:
                remote = filesystem.open(inner, "rb")
            except PermissionError as error:
                raise UnreadableError(f"cannot be opened ({error.strerror or error})") from None
        with remote:
            yield remote
        return
    try:
        file = io.FileIO(path)
    except OSError as error:
        raise UnreadableError(f"cannot be opened ({error.strerror})") from None
    with file:
        yield file


def _decompressed(file: IO[bytes], suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix == ".bz2":
        return bz2.BZ2File(file)
    if suffix == ".xz":
        return lzma.LZMAFile(file)
    return _ZstdFile(file) if suffix == ".zst" else file


class _ZstdFile(io.RawIOBase):
    """Decompress consecutive Zstandard frames, and raise ``EOFError`` if the last one is truncated.

    The reader in ``zstandard`` accepts a truncated frame as complete.
    """

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard  # rarely needed

        self._error = zstandard.ZstdError
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._file = file
        self._frame: Any = None
        self._compressed = b""
        self._decompressed = b""
        self._used = 0

    def read(self, size: int = -1) -> bytes:
        """Return at most ``size`` bytes, and at least one unless the file has ended."""
        while self._used == len(self._decompressed):
            if not self._compressed:
                self._compressed = self._file.read(ZSTD_INPUT_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the last Zstandard frame is truncated")
                return b""
            self._decompressed, self._used = self._decompress(), 0
        start, stop = self._used, min(self._used + size, len(self._decompressed))
        self._used = stop
        return self._decompressed[start:stop]

    def _decompress(self) -> bytes:
        self._frame = self._frame or self._new_frame()
        try:
            decompressed = self._frame.decompress(self._compressed)
        except self._error as error:
            raise EOFError(str(error)) from None
        self._compressed = b""
        if self._frame.eof:
            self._compressed, self._frame = self._frame.unused_data, None
        return decompressed
