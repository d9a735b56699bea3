"""Texts put aside in a temporary file, to be read more than once without being held in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

SEPARATOR = b"\xff"  # a byte that UTF-8 never uses

CHUNK_BYTES = 1 << 20


class TextSpool:
    """A file of texts with ``SEPARATOR`` after each; it is gone when the ``with`` block ends.

    Attributes:
        path: the file.
        size: its bytes.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._file = tempfile.NamedTemporaryFile(suffix=".texts")  # noqa: SIM115, closed by __exit__
        self.path = Path(self._file.name)
        self.size = 0
        try:
            for text in texts:
                self.size += self._file.write(text.encode("utf-8") + SEPARATOR)
            self._file.flush()
        except BaseException:  # of whatever kind, it goes on up
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def texts(self) -> Iterator[str]:
        """The texts in their order."""
        parts: list[bytes] = []
        with self.path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                first, *others = chunk.split(SEPARATOR)
                parts.append(first)
                for other in others:
                    yield b"".join(parts).decode("utf-8")
                    parts = [other]
