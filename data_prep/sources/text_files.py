"""Cut text files into documents as bytes, so that each document is decoded once.

Several processes may read different ranges of one file. Each range finds the start of its first document from the bytes
around its own boundaries, so every byte is in exactly one document however the ranges are distributed.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterable, Iterator
from typing import IO

# The order matters: the UTF-32 mark starts with the UTF-16 mark.
BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
UTF8_MARK = codecs.BOM_UTF8
READ_BYTES = 1 << 20  # at once
LONE_RETURN = re.compile(rb"\r(?!\n)")
BLANK_LINE = re.compile(rb"\n\r?\n")
# One or more lines of nothing but spaces and tabs, and the newline before them. Each newline is taken whole.
BLANK_LINES = re.compile(rb"(?>\r\n|\n|\r)(?:[ \t]*(?>\r\n|\n|\r))+")
PRINTED = re.compile(rb"[ \t]*[^ \t]")
NEWLINE = re.compile(rb"[\r\n]")
LEADING_LINES = re.compile(rb"(?:[ \t]*(?>\r\n|\n|\r))*")


def wide_encoding(first_block: bytes) -> str | None:
    """Return "UTF-16" or "UTF-32" if the bytes begin with its byte-order mark, or None."""
    return next((name for mark, name in BYTE_ORDER_MARKS if first_block.startswith(mark)), None)


def decode(data: bytes, errors: str) -> tuple[str | None, int]:
    """Return the text and the position of the first invalid byte, or -1.

    The text of invalid data is None or, if ``errors`` is "replace", contains U+FFFD.
    """
    try:
        return data.decode("utf-8"), -1
    except UnicodeDecodeError as error:
        return (data.decode("utf-8", "replace") if errors == "replace" else None), error.start


def normalize_newlines(text: bytes) -> bytes:
    """Convert Windows and classic Mac OS newlines to ``\\n``."""
    if b"\r" not in text:
        return text
    if LONE_RETURN.search(text):
        return text.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return text.replace(b"\r", b"")  # several times as fast


def boundary_at(file: IO[bytes], nominal: int, max_bytes: int) -> int:
    """Return where the text that nominally starts at an offset actually starts, judging only by the bytes from there.

    That is after the first blank line within ``max_bytes``, else after the first newline, else at the next character.
    The result never decreases with ``nominal``, so adjacent ranges meet.
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


def paragraph_at(file: IO[bytes], nominal: int, max_bytes: int) -> int:
    """Return where the first paragraph after an offset starts, or the end of the file.

    In a paragraph longer than ``max_bytes``, that is where ``boundary_at`` would cut it.
    """
    file.seek(nominal)
    window = read_fully(file, max_bytes)
    if blank := BLANK_LINES.search(window):
        return nominal + blank.end()
    return nominal + len(window) if len(window) < max_bytes else boundary_at(file, nominal, max_bytes)


def read_fully(file: IO[bytes], size: int) -> bytes:
    """Read ``size`` bytes, fewer only at the end of the file; one read of a raw file may return less."""
    found: list[bytes] = []
    while size > 0 and (block := file.read(min(size, READ_BYTES))):
        found.append(block)
        size -= len(block)
    return b"".join(found)


def limited(blocks: Iterable[bytes], size: int) -> Iterator[bytes]:
    """Yield the first ``size`` bytes of the blocks."""
    for block in blocks:
        if len(block) >= size:
            yield block[:size]
            return
        size -= len(block)
        yield block


def cut_by_size(blocks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Cut bytes into pieces of at most ``max_bytes``, and yield each with its offset.

    A piece ends after the last blank line that fits, else after the last line, else after the last character, and never
    inside ``\\r\\n``. The pieces concatenate to the input. Holds one piece and one block in memory.
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


def cut_at_blank_lines(blocks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of each paragraph, without the blank lines around it.

    A paragraph longer than ``max_bytes`` is cut as in ``cut_by_size``. Holds one paragraph and one block in memory.
    """
    held, offset, scanned = b"", 0, 0
    begun = False
    for block in blocks:
        held = held + block if held else block
        at = 0
        while True:
            if not begun:  # the blank lines before a paragraph
                at = LEADING_LINES.match(held, at).end()  # type: ignore[union-attr]
                begun = PRINTED.match(held, at) is not None
            blank = BLANK_LINES.search(held, max(at, scanned)) if begun else None
            if blank is None:
                break
            yield from _pieces(held, offset, at, blank.start(), max_bytes)
            at, begun = blank.end(), False
        scanned = at + len(held[at:].rstrip(b" \t\r\n"))  # no blank line begins before
        while scanned - at > max_bytes:
            cut = _cut_position(held, at, at + max_bytes)
            yield offset + at, held[at:cut]
            at = cut
        held, offset, scanned = held[at:], offset + at, scanned - at
    end = len(held.rstrip(b" \t\r\n"))
    newline = NEWLINE.search(held, end)
    if end:
        yield from _pieces(held, offset, 0, newline.start() if newline else len(held), max_bytes)


def cut_at_separators(
    blocks: Iterable[bytes], separator: bytes, max_bytes: int, *, start: int = 0, stop: int = -1
) -> Iterator[tuple[int, bytes]]:
    """Yield offset and bytes of the documents between separators that begin in ``[start, stop)``.

    ``blocks`` begin ``separator_reach`` bytes before ``start`` (or at the start of the file), so that they include the
    separator before a document at ``start``. A newline in the separator also matches ``\\r\\n``. A document longer than
    ``max_bytes`` is cut as in ``cut_by_size``.
    """
    reach = separator_reach(separator)
    find = re.compile(re.escape(separator).replace(b"\\\n", b"\r?\n"))
    offset = max(0, start - reach)
    held, at, scanned = (
        b"",
        0,
        0,
    )  # bytes, where the document begins, and the end of the part known to contain no separator
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
        scanned = max(at, len(held) - reach)  # a separator may begin in the rest
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
    """Return the maximum bytes a separator occupies in a file, where each newline may take two bytes."""
    return len(separator) + separator.count(b"\n")


def is_local(separator: bytes) -> bool:
    """Return whether occurrences of a separator cannot overlap: no suffix of it is also a prefix."""
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
    """Return the best position to cut after ``start`` and up to ``limit``; ``text`` continues beyond ``limit``."""
    found = -1
    if text.find(b"\r", start, limit) >= 0:
        found = _end_of_last(b"\n\r\n", text, start, limit)
    found = max(found, _end_of_last(b"\n\n", text, max(start, found - 1), limit))
    if found < 0:
        found = _end_of_last(b"\n", text, start, limit)
    for newline in (b"\r\r", b"\r"):  # classic Mac OS, without \n; one right at the limit may be half of \r\n
        if found < 0:
            found = _end_of_last(newline, text, start, limit - 1)
    if found >= 0:
        return found
    for end in range(limit, limit - 4, -1):
        if text[end] & 0xC0 != 0x80:  # a character begins here
            return end - 1 if text[end - 1 : end + 1] == b"\r\n" else end
    return limit


def _end_of_last(newline: bytes, text: bytes, start: int, limit: int) -> int:
    found = text.rfind(newline, start, limit)
    return found + len(newline) if found >= 0 else -1
