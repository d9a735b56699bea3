"""A folder of blocks of bytes, each named by its SHA-256, that never holds more than it may.

A block is checked whenever it is read, so neither a process that was killed while it wrote nor a damaged disk can do
harm, and any number of processes may use the folder: a lost race costs a download, or for a moment the room of one
block. The folder is divided into ``SETS``; each holds its share of the size, and gives up what was not read for
longest.
"""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import suppress
from pathlib import Path

from data_prep.files import rename

SETS = 256  # at most; a block belongs to one by its first byte


class BlockCache:
    """The blocks in ``folder``, of at most ``most_bytes`` in all."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes // SETS
        self._full: set[str] = set()  # sets that had no room for another block
        self._lock = threading.Lock()  # or threads would find the same room

    def get(self, digest: bytes) -> bytes | None:
        """The block of this SHA-256, or None. Raises OSError if the disk fails."""
        path = self._path(digest)
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(content).digest() != digest:
            path.unlink(missing_ok=True)
            return None
        with suppress(OSError):  # another process has just removed it, or may write here and this one may not
            os.utime(path)
        return content

    def put(self, digest: bytes, content: bytes, *, evict: bool = True) -> None:
        """Keep a block; without ``evict`` only where there is room. Raises OSError if it cannot be written."""
        path = self._path(digest)
        if not evict and path.parent.name in self._full:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            if not self._has_room(path.parent, len(content), evict=evict):
                self._full.add(path.parent.name)
                return
            temporary = path.with_name(f"{path.name}.{os.getpid()}")
            try:
                temporary.write_bytes(content)
                with suppress(FileNotFoundError):  # another process needed the room
                    rename(temporary, path)
            except BaseException:  # Ctrl-C too: clean up, and raise it again
                temporary.unlink(missing_ok=True)
                raise

    def _path(self, digest: bytes) -> Path:
        return self._folder / f"{digest[0] % SETS:02x}" / digest.hex()

    def _has_room(self, folder: Path, size: int, *, evict: bool) -> bool:
        """Whether a set can take ``size`` more bytes, after its oldest files made room if ``evict``."""
        files = []
        with os.scandir(folder) as entries:
            for entry in entries:
                with suppress(FileNotFoundError):
                    status = entry.stat()
                    files.append((status.st_mtime_ns, status.st_size, entry.path))
        used = sum(each for _, each, _ in files) + size
        if used > self._most_bytes and evict:
            for _, each, path in sorted(files):
                Path(path).unlink(missing_ok=True)
                used -= each
                if used <= self._most_bytes:
                    break
        return used <= self._most_bytes
