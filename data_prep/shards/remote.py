"""Datasets at a URL, read while training: in blocks, each checked, kept in a cache on disk that has a limit.

Rows are shuffled over the whole corpus, so a cache of whole shards would be of no use. When a dataset is verified, each
file is read once from end to end; if its SHA-256 is that of the manifest, those of its blocks are kept in the cache.
From then on a block is accepted from the store, or from the cache, if it has its SHA-256. A file that was not verified
before is verified when it is first used. In the cache folder::

    blocks/ab/SHA256          blocks of bytes, named by their SHA-256; at most ``Access.cache_bytes``
    files/SHA256/65536.sha256 the SHA-256 of the blocks of a file (0.05 % of it), after that of these themselves
    files/SHA256/NAME         a small file, such as a tokenizer
    files/SHA256/verified     the dataset of this fingerprint was verified
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.files import in_turn, user_cache, write_atomically
from data_prep.shards.block_cache import BlockCache
from data_prep.shards.folder import OTHER_TOKENIZER, PART_BYTES, Numbers, StoredFile, require_checksum
from data_prep.sources.remote_files import RemoteFiles

BLOCK_BYTES = 1 << 16
HELD_BLOCKS = 1024  # in memory, of each dataset: enough for the rows of a large step
CONNECTIONS = 16
DIGEST_BYTES = 32
VERIFIED = "verified"
SHA256 = re.compile("[0-9a-f]{64}")

LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Access:
    """How datasets at a URL are read.

    Attributes:
        cache: folder of the cache, which datasets and processes share; "": that of the user.
        cache_bytes: the most that its blocks take.
        retries: attempts after a failed one.
        timeout_seconds: the longest that a request may take.
    """

    cache: str = ""
    cache_bytes: int = 10**10
    retries: int = 10
    timeout_seconds: float = 60.0


class RemoteFolder:
    """A folder at a URL. Reading is thread-safe.

    Raises:
        UserError: as of ``RemoteFiles``. Its methods raise ``StoreError`` if the store cannot be read.
    """

    is_remote = True

    def __init__(self, url: str, access: Access) -> None:
        self._files = RemoteFiles(url, retries=access.retries, timeout_seconds=access.timeout_seconds)
        self._cache_folder = Path(access.cache) if access.cache else user_cache() / "data"
        self._cache = BlockCache(self._cache_folder / "blocks", access.cache_bytes)
        self._pool = ThreadPoolExecutor(CONNECTIONS, "kindling-remote")
        self._held: OrderedDict[tuple[str, int], Future[bytes]] = OrderedDict()
        self._tables: dict[str, bytes] = {}
        self._lock, self._complained = Lock(), False

    def __str__(self) -> str:
        return self._files.url

    def manifest(self, name: str) -> bytes:
        """The bytes of the file that describes the others. Raises UserError if there is none."""
        try:
            return self._files.read(name)
        except FileNotFoundError:
            raise UserError(f'"{self}" is not a Kindling dataset, or not there: it has no {name}') from None

    def check_sizes(self, files: Iterable[StoredFile]) -> None:
        # The indices first: they are small, and a store without byte ranges sends whole files.
        ordered = sorted(files, key=lambda file: file.size)
        list(self._pool.map(self._check_size, ordered))

    def _check_size(self, file: StoredFile) -> None:
        """Two bytes are asked for, the last one and the one after it."""
        problem = f"it has not the {file.size:,} bytes of the manifest, or the store does not serve byte ranges"
        self._read(file, file.size - 1, file.size + 1, lambda last: "" if len(last) == 1 else problem)

    def check_header(self, name: str, header: bytes) -> None:
        pass  # the checksum covers it

    def copy_of(self, name: str, sha256: str) -> Path:
        if Path(name).name != name:  # or a manifest could have files written anywhere
            raise UserError(f'the manifest of "{self}" names a file "{name}", which is not in its folder')
        path, file = self._place(sha256) / name, StoredFile(name, 0, sha256)
        with in_turn(path.with_name("lock")):
            if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
                content = self._read(
                    file,
                    None,
                    None,
                    lambda found: "" if hashlib.sha256(found).hexdigest() == sha256 else OTHER_TOKENIZER,
                )
                with self._writing():
                    write_atomically(path, content)
        return path

    def parts(self, file: StoredFile) -> Iterator[bytes]:
        whole, digests = hashlib.sha256(), bytearray()
        for start in range(0, file.size, PART_BYTES):
            stop = min(start + PART_BYTES, file.size)
            part = self._read(file, start, stop, partial(_problem_of_length, expected=stop - start))
            whole.update(part)
            for first in range(0, len(part), BLOCK_BYTES):
                block = part[first : first + BLOCK_BYTES]
                digest = hashlib.sha256(block).digest()
                digests += digest
                self._keep(digest, block, evict=False)
            yield part
        require_checksum(f"{self}/{file.name}", whole.hexdigest(), file)
        table = self._table_path(file)
        with self._writing(), in_turn(table.with_name("writer")):
            write_atomically(table, hashlib.sha256(digests).digest() + bytes(digests))

    def open(self, file: StoredFile, dtype: np.dtype[Any]) -> Numbers:
        return _RemoteNumbers(self, file, dtype)

    def read(self, file: StoredFile, start: int, stop: int) -> bytes:
        """Return bytes ``[start, stop)`` of a file, all of them checked."""
        if start >= stop:
            return b""
        blocks = [self._block(file, number) for number in _blocks_of(start, stop)]
        within = start - start // BLOCK_BYTES * BLOCK_BYTES
        return b"".join(block.result() for block in blocks)[within : within + stop - start]

    def announce(self, file: StoredFile, start: int, stop: int) -> None:
        for number in _blocks_of(start, stop):
            self._block(file, number)

    def is_verified(self, fingerprint: str) -> bool:
        return (self._cache_folder / "files" / fingerprint / VERIFIED).is_file()

    def set_verified(self, fingerprint: str) -> None:
        with self._writing():
            (self._place(fingerprint) / VERIFIED).touch()

    def _block(self, file: StoredFile, number: int) -> Future[bytes]:
        """A block that is here, or on its way."""
        key = (file.name, number)
        with self._lock:
            held = self._held.get(key)
            if held is None or (held.done() and held.exception() is not None):
                held = self._held[key] = self._pool.submit(self._load, file, number)
            self._held.move_to_end(key)
            while len(self._held) > HELD_BLOCKS:
                self._held.popitem(last=False)
        return held

    def _load(self, file: StoredFile, number: int) -> bytes:
        table = self._table(file)
        digest = table[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
        try:
            cached = self._cache.get(digest)
        except OSError as error:
            cached = None
            self._complain(error)
        if cached is not None:
            return cached
        start, stop = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, file.size)

        def problem(found: bytes) -> str:
            changed = "its bytes have changed since it was verified"
            return _problem_of_length(found, stop - start) or (
                "" if hashlib.sha256(found).digest() == digest else changed
            )

        block = self._read(file, start, stop, problem)
        self._keep(digest, block, evict=True)
        return block

    def _table(self, file: StoredFile) -> bytes:
        """The SHA-256 of each block of a file, which is verified now unless it was before."""
        if file.sha256 not in self._tables:
            path = self._table_path(file)
            with in_turn(path.with_name("lock")):
                table = _read_table(path, file.size)
                if table is None:
                    for _ in self.parts(file):
                        pass
                    table = _read_table(path, file.size)
            assert table is not None, f"{path} is not what was just written"
            self._tables[file.sha256] = table
        return self._tables[file.sha256]

    def _read(self, file: StoredFile, start: int | None, stop: int | None, check: Callable[[bytes], str]) -> bytes:
        try:
            return self._files.read(file.name, start, stop, check=check)
        except FileNotFoundError:
            raise UserError(f'"{self}/{file.name}" is missing: copy or build the whole dataset again') from None

    def _keep(self, digest: bytes, block: bytes, *, evict: bool) -> None:
        """Put a block into the cache. If that fails, training continues without."""
        try:
            self._cache.put(digest, block, evict=evict)
        except OSError as error:
            self._complain(error)

    def _complain(self, error: OSError) -> None:
        with self._lock:
            first, self._complained = not self._complained, True
        if first:
            reason = error.strerror or error
            LOG.warning(
                'the cache "%s" cannot be used (%s): blocks are read from the store each time',
                self._cache_folder,
                reason,
            )

    def _place(self, sha256: str) -> Path:
        """The folder in the cache for what belongs to a file."""
        if not SHA256.fullmatch(sha256):
            raise UserError(f'the manifest of "{self}" has a checksum that is none: "{sha256}"')
        place = self._cache_folder / "files" / sha256
        with self._writing():
            place.mkdir(parents=True, exist_ok=True)
        return place

    def _table_path(self, file: StoredFile) -> Path:
        return self._place(file.sha256) / f"{BLOCK_BYTES}.sha256"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn an error of the disk into one sentence."""
        try:
            yield
        except OSError as error:
            raise UserError(
                f'cannot write to the cache "{self._cache_folder}" ({error.strerror or error}): make room, or name '
                "another folder with --data-cache"
            ) from None


class _RemoteNumbers:
    """The numbers in a remote file."""

    def __init__(self, folder: RemoteFolder, file: StoredFile, dtype: np.dtype[Any]) -> None:
        self._folder, self._file, self._dtype = folder, file, dtype

    def __getitem__(self, span: slice, /) -> np.ndarray:
        size = self._dtype.itemsize
        start, stop, _ = span.indices(self._file.size // size)
        return np.frombuffer(self._folder.read(self._file, start * size, stop * size), self._dtype)


def _blocks_of(start: int, stop: int) -> range:
    return range(start // BLOCK_BYTES, -(-stop // BLOCK_BYTES))


def _problem_of_length(found: bytes, expected: int) -> str:
    return "" if len(found) == expected else f"the store sent {len(found):,} bytes instead of {expected:,}"


def _read_table(path: Path, size: int) -> bytes | None:
    """The SHA-256 of a file's blocks, or None if there are none or they are damaged."""
    if not path.is_file():
        return None
    content = path.read_bytes()
    own, table = content[:DIGEST_BYTES], content[DIGEST_BYTES:]
    whole = len(table) == DIGEST_BYTES * len(_blocks_of(0, size)) and hashlib.sha256(table).digest() == own
    return table if whole else None
