"""Store texts in a temporary file, to read them more than once without holding them in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

SEPARATOR = b"\xff"  # a byte that never occurs in UTF-8
CHUNK_BYTES = 1 << 20


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """Yield whole texts until they have at least ``limit`` bytes of UTF-8; the text after them is not read."""
    for text in texts:
        yield text
        limit -= len(text.encode("utf-8"))
        if limit <= 0:
            return


class TextSpool:
    """A file at ``path`` of texts with ``SEPARATOR`` after each, deleted when the ``with`` block ends."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name, "texts")
        try:
            with self.path.open("wb") as file:
                file.writelines(text.encode("utf-8") + SEPARATOR for text in texts)
        except BaseException:  # Ctrl-C too: remove the file, and raise it again
            self._folder.cleanup()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def texts(self) -> Iterator[str]:
        """Yield the texts in order."""
        parts: list[bytes] = []
        with self.path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                first, *others = chunk.split(SEPARATOR)
                parts.append(first)
                for other in others:
                    yield b"".join(parts).decode("utf-8")
                    parts = [other]
