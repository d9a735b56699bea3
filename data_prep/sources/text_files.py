"""Documents out of text files: bytes cut at the best places, each document decoded once.

A file may be read in several spans by several processes. Each span finds where its first document begins from the bytes
around its own borders, so that every byte is in exactly one document whoever reads what.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import IO

#: In this order: the first two bytes of UTF-32's mark are those of UTF-16's.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
LONE_RETURN = re.compile(rb"\r(?!\n)")
BLANK_LINE = re.compile(rb"\n\r?\n")


def wide_encoding(first_block: bytes) -> str | None:
    """UTF-16 or UTF-32 if the bytes begin with its byte-order mark."""
    return next((name for mark, name in BYTE_ORDER_MARKS if first_block.startswith(mark)), None)


def decode(data: bytes, errors: str) -> tuple[str | None, int]:
    """The text, and the position of the first byte that is no UTF-8, or -1.

    The text of such data is ``None``, or holds U+FFFD if ``errors`` is "replace".
    """
    try:
        return data.decode("utf-8"), -1
    except UnicodeDecodeError as error:
        return (data.decode("utf-8", "replace") if errors == "replace" else None), error.start


def with_equal_newlines(text: bytes) -> bytes:
    """Windows' and old Macintosh's newlines as ``\\n``."""
    if b"\r" not in text:
        return text
    if LONE_RETURN.search(text):
        return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return text.replace(b"\r", b"")  # several times as fast


def border_at(file: IO[bytes], nominal: int, max_bytes: int) -> int:
    """Where the run of text that nominally starts at an offset really starts, by the bytes from there on alone.

    It is after the first blank line within ``max_bytes``, else after the first newline, else at the next character.
    Never decreases with ``nominal``, so that neighbours meet.
    """
    file.seek(nominal)
    window = read_fully(file, max_bytes)
    blank = BLANK_LINE.search(window)
    if blank:
        return nominal + blank.end()
    newline = window.find(b"\n")
    if newline >= 0:
        return nominal + newline + 1
    skipped = 0
    while skipped < min(3, len(window)) and window[skipped] & 0xC0 == 0x80:  # inside a character
        skipped += 1
    return nominal + skipped


def read_fully(file: IO[bytes], size: int) -> bytes:
    """``size`` bytes, fewer only at the end of the file; a raw file may give less at a time."""
    found = b""
    while len(found) < size and (block := file.read(size - len(found))):
        found += block
    return found


def limited(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """The first ``size`` bytes of the blocks."""
    for block in blocks:
        if len(block) >= size:
            yield block[:size]
            return
        size -= len(block)
        yield block


def cut_by_size(blocks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Cut bytes into pieces of at most ``max_bytes``, with the offset of each.

    A piece ends after the last blank line that fits, else after the last line, else after the last character; never
    inside ``\\r\\n``. The pieces joined are the bytes again. Holds one piece and one block in memory.
    """
    held, offset = b"", 0
    for block in blocks:
        held = held + block if held else block
        start = 0
        while len(held) - start > max_bytes:
            end = _cut_position(held, start, start + max_bytes)
            yield offset + start, held[start:end]
            start = end
        held, offset = held[start:], offset + start
    if held:
        yield offset, held


def cut_at_separators(
    blocks: Iterable[bytes], separator: bytes, max_bytes: int, *, start: int = 0, stop: int = -1
) -> Iterator[tuple[int, bytes]]:
    """The pieces of the documents between separators that begin at an offset from ``start`` up to ``stop``.

    ``blocks`` begin ``separator_reach`` bytes before ``start`` (or at the file's start), where a document that begins
    at ``start`` shows by its separator. A newline of the separator matches ``\\r\\n`` too. A document above
    ``max_bytes`` is cut as in ``cut_by_size``. Yields the offset of each piece, and its bytes.
    """
    reach = separator_reach(separator)
    find = re.compile(re.escape(separator).replace(b"\\\n", b"\r?\n"))
    offset = max(0, start - reach)
    held, at, scanned = b"", 0, 0  # bytes, where the document begins in them, up to where they hold no separator
    inside = start == 0
    for block in blocks:
        held = held + block if held else block
        has_returns = b"\n" in separator and b"\r" in held
        while True:
            begin, end = _find(held, max(at, scanned), separator, find if has_returns else None)
            if begin < 0:
                break
            if inside:
                yield from _pieces(held, offset, at, begin, max_bytes)
            at = scanned = end
            if 0 <= stop <= offset + at:
                return
            inside = offset + at >= start
        scanned = max(at, len(held) - reach)  # a separator may have begun in what is after
        while inside and len(held) - at > max_bytes + reach:
            cut = _cut_position(held, at, at + max_bytes)
            yield offset + at, held[at:cut]
            at = cut
        if not inside:
            at = scanned
        held, offset, scanned, at = held[at:], offset + at, max(0, scanned - at), 0
        if 0 <= stop <= offset and not inside:
            return
    if inside and held:
        yield from _pieces(held, offset, 0, len(held), max_bytes)


def separator_reach(separator: bytes) -> int:
    """The most bytes that a separator takes in a file: each of its newlines may be two bytes there."""
    return len(separator) + separator.count(b"\n")


def is_local(separator: bytes) -> bool:
    """Whether every occurrence of a separator is seen without knowing the others: no end of it is also its start."""
    return not any(separator.startswith(separator[-size:]) for size in range(1, len(separator)))


def _find(held: bytes, start: int, separator: bytes, pattern: re.Pattern[bytes] | None) -> tuple[int, int]:
    if pattern is None:
        begin = held.find(separator, start)
        return begin, begin + len(separator)
    match = pattern.search(held, start)
    return match.span() if match else (-1, -1)


def _pieces(held: bytes, offset: int, start: int, stop: int, max_bytes: int) -> Iterator[tuple[int, bytes]]:
    if start == stop:
        yield offset + start, b""
    while start < stop:
        end = _cut_position(held, start, start + max_bytes) if stop - start > max_bytes else stop
        yield offset + start, held[start:end]
        start = end


def _cut_position(text: bytes, start: int, limit: int) -> int:
    """The best place to cut after ``start``, ``limit`` at most; ``text`` goes on at ``limit``."""
    found = -1
    if text.find(b"\r", start, limit) >= 0:
        found = _end_of_last(b"\n\r\n", text, start, limit)
    found = max(found, _end_of_last(b"\n\n", text, max(start, found - 1), limit))
    if found < 0:
        found = _end_of_last(b"\n", text, start, limit)
    for newline in (b"\r\r", b"\r"):  # old Macintosh's, where no \n is; one right at the limit may be half of \r\n
        if found < 0:
            found = _end_of_last(newline, text, start, limit - 1)
    if found >= 0:
        return found
    for end in range(limit, limit - 4, -1):
        if text[end] & 0xC0 != 0x80:  # where a character begins
            return end - 1 if text[end - 1 : end + 1] == b"\r\n" else end
    return limit


def _end_of_last(newline: bytes, text: bytes, start: int, limit: int) -> int:
    found = text.rfind(newline, start, limit)
    return found + len(newline) if found >= 0 else -1
