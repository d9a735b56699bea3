"""Where a dataset is: a folder on this machine, or one at a URL (``remote.py``), with one way to read its files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from data_prep.errors import UserError
from data_prep.files import sha256_of_file

PART_BYTES = 1 << 22  # read at a time, a multiple of any token's size
READING = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # Windows changes line ends without it
OTHER_TOKENIZER = "is missing or not the tokenizer that produced these tokens: build the dataset again"


class StoredFile(NamedTuple):
    """A file of a dataset, as its manifest describes it."""

    name: str
    size: int
    sha256: str


class Numbers(Protocol):
    """The content of a file as an array of which slices are read."""

    def __getitem__(self, span: slice, /) -> np.ndarray: ...


class Folder(Protocol):
    """The files of one dataset; ``str`` of it is the path or URL that messages show."""

    is_remote: bool

    def check_sizes(self, files: Iterable[StoredFile]) -> None:
        """Raise UserError at a file that is missing or has another size. Reads next to nothing."""

    def check_header(self, name: str, header: bytes) -> None:
        """Raise UserError if a file begins with something else; may leave that to ``parts``."""

    def copy_of(self, name: str, sha256: str) -> Path:
        """A file of this checksum on this machine. Raises UserError if there is none."""

    def parts(self, file: StoredFile) -> Iterator[bytes]:
        """All bytes of a file, read again. At the end, raises UserError if their checksum is another one."""

    def open(self, file: StoredFile, dtype: np.dtype[Any]) -> Numbers:
        """The numbers in a file."""

    def announce(self, file: StoredFile, start: int, stop: int) -> None:
        """Say that these bytes are going to be read, in case it helps to begin now."""

    def is_verified(self, fingerprint: str) -> bool:
        """Whether a dataset of this fingerprint was verified, so that all reads are checked against it."""

    def set_verified(self, fingerprint: str) -> None:
        """Remember that a dataset of this fingerprint was verified."""


class LocalFolder:
    """A folder on this machine, whose files are mapped into memory."""

    is_remote = False

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def check_sizes(self, files: Iterable[StoredFile]) -> None:
        with os.scandir(self.path) as entries:
            sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        for name, expected, _ in files:
            path = f"{self.path}/{name}"
            if name not in sizes:
                raise UserError(f'"{path}" is missing: copy or build the whole dataset again')
            if sizes[name] != expected:
                raise UserError(f'"{path}" has {sizes[name]:,} bytes instead of {expected:,}: copy or build it again')

    def check_header(self, name: str, header: bytes) -> None:
        path = f"{self.path}/{name}"
        descriptor = os.open(path, READING)  # a Path and a file object take three times as long
        found = os.read(descriptor, len(header))
        os.close(descriptor)
        if found != header:
            raise UserError(f'"{path}" does not match the manifest: build the dataset again')

    def copy_of(self, name: str, sha256: str) -> Path:
        path = self.path / name
        if not path.is_file() or sha256_of_file(path) != sha256:
            raise UserError(f'"{path}" {OTHER_TOKENIZER}')
        return path

    def parts(self, file: StoredFile) -> Iterator[bytes]:
        path, whole = self.path / file.name, hashlib.sha256()
        with path.open("rb") as opened:
            while part := opened.read(PART_BYTES):
                whole.update(part)
                yield part
        require_checksum(str(path), whole.hexdigest(), file)

    def open(self, file: StoredFile, dtype: np.dtype[Any]) -> Numbers:
        # A plain array around the map: slicing np.memmap itself takes microseconds each time.
        return np.asarray(np.memmap(self.path / file.name, dtype=dtype, mode="r"))

    def announce(self, file: StoredFile, start: int, stop: int) -> None:
        pass

    def is_verified(self, fingerprint: str) -> bool:
        return False  # any program may have changed it since

    def set_verified(self, fingerprint: str) -> None:
        pass


def require_checksum(path: str, found: str, file: StoredFile) -> None:
    """Raise UserError unless a file has the checksum of the manifest."""
    if found != file.sha256:
        raise UserError(f'"{path}" is damaged: its checksum differs from the one in manifest.json')
