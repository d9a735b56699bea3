"""Text out of files, a block at a time: UTF-8 checked, newlines made equal, long texts cut into documents."""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

BLOCK_BYTES = 1 << 16


class NotTextError(ValueError):
    """A file that cannot be read as text; its message goes after the file's name, and ``mend`` says what to do."""

    def __init__(self, message: str, mend: str = "convert it to UTF-8 text, or leave it out") -> None:
        super().__init__(message)
        self.mend = mend


def open_binary(path: Path) -> IO[bytes]:
    """The file's bytes, unpacked if its name ends with ``.gz``."""
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.open(path, "rb"))
    return path.open("rb")


def read_blocks(file: IO[bytes]) -> Iterator[bytes]:
    """The bytes of an open file in blocks. Raises ``NotTextError`` for packed data that is damaged or cut off."""
    try:
        while block := file.read(BLOCK_BYTES):
            yield block
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise NotTextError(f"is damaged ({error})", "get a whole copy, or leave it out") from None


def checked(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Pass the blocks on; raise ``NotTextError`` at the first byte that is no UTF-8, or is NUL, as in binary files."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    offset = 0
    for block in blocks:
        nul = block.find(b"\x00")
        if nul >= 0:
            raise NotTextError(f"is not UTF-8 text (byte 0x00 at offset {offset + nul})")
        _decode(decoder, block, offset)
        offset += len(block)
        yield block
    _decode(decoder, b"", offset, final=True)


def _decode(decoder: codecs.IncrementalDecoder, block: bytes, offset: int, final: bool = False) -> None:
    waiting = len(decoder.getstate()[0])  # bytes of a character that the block before began
    try:
        decoder.decode(block, final)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise NotTextError(
            f"is not UTF-8 text (byte 0x{byte:02x} at offset {offset - waiting + error.start})"
        ) from None


def check_text_file(path: Path) -> None:
    """Read the whole file once; raise ``NotTextError`` if it is not UTF-8 text."""
    with open_binary(path) as file:
        for _ in checked(read_blocks(file)):
            pass


def read_text_blocks(path: Path) -> Iterator[str]:
    """The text of a checked file in blocks, every kind of newline as ``\\n``, without a byte-order mark."""
    with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline=None) as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def read_lines(path: Path) -> Iterator[str]:
    """The lines of a checked file, which end at ``\\n`` only, without a byte-order mark."""
    with io.TextIOWrapper(open_binary(path), encoding="utf-8-sig", newline="\n") as file:
        yield from file


def with_equal_newlines(text: str) -> str:
    """Windows' and old Macintosh's newlines as ``\\n``."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def cut_text(blocks: Iterable[str], max_bytes: int) -> Iterator[str]:
    """Join blocks of text and cut the whole into pieces of at most ``max_bytes`` bytes of UTF-8.

    A piece ends after the last blank line that fits, else after the last line, else after the last character. The
    pieces joined are the text again. Holds one piece and one block in memory.
    """
    held = b""
    for block in blocks:
        held += block.encode("utf-8")
        start = 0
        while len(held) - start > max_bytes:
            end = _cut_position(held, start, start + max_bytes)
            yield held[start:end].decode("utf-8")
            start = end
        held = held[start:]
    if held:
        yield held.decode("utf-8")


def _cut_position(text: bytes, start: int, limit: int) -> int:
    for boundary in (b"\n\n", b"\n"):
        found = text.rfind(boundary, start, limit)
        if found >= 0:
            return found + len(boundary)
    while text[limit] & 0xC0 == 0x80:  # inside a character
        limit -= 1
    return limit
