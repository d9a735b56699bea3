"""Read the rows of .csv and .tsv files, for every command that reads them.

.csv follows RFC 4180: a field in double quotes may contain the delimiter, newlines, and quotes written twice. If the
first line has no comma, columns are separated by semicolons or tabs. In .tsv files a quote is a character like any
other, except in a field that begins and ends with one, which is read as in .csv files. Lines end in any of ``\\n``,
``\\r\\n`` and ``\\r``.
"""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import NamedTuple

from data_prep.sources.documents import BROKEN_RECORD, RECORD_TOO_LONG
from data_prep.sources.formats import CSV, TABLES, TSV
from data_prep.sources.storage import Stream
from data_prep.sources.text_files import UTF8_MARK

MAX_LINE_BYTES = 64 * 2**20
MAX_FIELD_CHARACTERS = 16 * 2**20  # the csv module uses four bytes for each
MOST_LINES_OF_FIELD = 1000  # in a .tsv file
_NEWLINE = re.compile(rb"\r\n|\r|\n")
_QUOTED = re.compile(r'"((?:[^"]|"")*)"', re.DOTALL)


class BadRow(NamedTuple):
    """Why there is no row at a line."""

    reason: str
    why: str


Row = tuple[int, list[str] | BadRow]
Line = tuple[int, str | None]


def rows_of_table(stream: Stream, kind: str) -> Iterator[Row]:
    """Yield the header, then each row, as the number of its first line (from 1) and its fields, or why it has none.

    Rows have as many fields as the header. Bytes that are not UTF-8 arrive as lone surrogates (``surrogateescape``).
    Blank lines are skipped. Nothing follows a header that cannot be used.
    """
    columns = 0
    for line, row in fields_of_table(stream, kind):
        if isinstance(row, BadRow):
            yield line, row
        elif not columns:
            if problem := _header_problem(row):
                yield line, BadRow(BROKEN_RECORD, problem)
                return
            columns = len(row)
            yield line, row
        elif len(row) != columns:
            yield line, BadRow(BROKEN_RECORD, f"the row has {len(row)} columns, the header {columns}")
        else:
            yield line, row


def fields_of_table(stream: Stream, kind: str) -> Iterator[Row]:
    """Yield rows like ``rows_of_table``, but of any length, and with no header."""
    lines = lines_of_text(stream)
    return _rows_of_csv(lines) if kind == CSV else _rows_of_tsv(lines)


def _header_problem(header: list[str]) -> str:
    if not any(name.strip() for name in header):
        return "the header has no names: the first line must name the columns"
    name, times = Counter(name for name in header if name).most_common(1)[0]
    return f'the header has {times} columns named "{name}": rename them' if times > 1 else ""


def lines_of_text(stream: Stream) -> Iterator[Line]:
    """Yield the number (from 1) and text of each line with its newline, or None for one longer than ``MAX_LINE_BYTES``.

    A byte-order mark at the start is dropped; invalid bytes become lone surrogates.
    """
    for number, run in _runs_of_lines(stream):
        if run is None:
            yield number, None
            continue
        data = run.removeprefix(UTF8_MARK) if number == 1 else run
        yield from enumerate(io.StringIO(data.decode("utf-8", "surrogateescape"), newline=""), number)


def _runs_of_lines(stream: Stream) -> Iterator[tuple[int, bytes | None]]:
    """Yield whole lines, many at a time, with the number of the first one."""
    held: list[bytes] = []  # of the unfinished line
    length, number, waiting = 0, 1, b""
    for block in chain(stream.blocks(), [b""]):
        data = waiting + block
        waiting = b"\r" if block and data.endswith(b"\r") else b""  # it may be half of \r\n
        data = data[: len(data) - len(waiting)]
        end = max(data.rfind(b"\n"), data.rfind(b"\r")) + 1
        if end:
            newline = _NEWLINE.search(data)
            assert newline is not None
            begin = 0
            if length + newline.end() > MAX_LINE_BYTES:
                yield number, None
                number, held, begin = number + 1, [], newline.end()
            if begin < end:
                run = b"".join((*held, data[begin:end]))
                yield number, run
                number += run.count(b"\n") if b"\r" not in run else len(_NEWLINE.findall(run))
            held, length = [], 0
        length += len(data) - end
        held = [*held, data[end:]] if length <= MAX_LINE_BYTES else []
    if length and not stream.damage:
        yield number, b"".join(held) if length <= MAX_LINE_BYTES else None


def _rows_of_csv(lines: Iterator[Line]) -> Iterator[Row]:
    too_long: list[int] = []

    def texts(lines: Iterable[Line]) -> Iterator[str]:
        for number, text in lines:
            if text is None:
                too_long.append(number)
            else:
                yield text

    first = next(lines, None)
    if first is None:
        return
    delimiter = next((each for each in ",;\t" if each in (first[1] or "")), ",")
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    rows = csv.reader(texts(chain([first], lines)), delimiter=delimiter, strict=True)
    while True:
        line = rows.line_num + len(too_long) + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            yield line, BadRow(RECORD_TOO_LONG if "field larger" in str(error) else BROKEN_RECORD, str(error))
            continue
        if row:
            yield line, row
    yield from ((number, _too_long()) for number in too_long)


def _too_long() -> BadRow:
    return BadRow(RECORD_TOO_LONG, f"the line is longer than {MAX_LINE_BYTES // 2**20} MiB")


def _rows_of_tsv(lines: Iterator[Line]) -> Iterator[Row]:
    columns, waiting = 0, list[Line]()  # waiting: lines that were looked at and belong to later rows, last one first
    while (current := waiting.pop() if waiting else next(lines, None)) is not None:
        number, text = current
        if text is None:
            yield number, _too_long()
            continue
        if not (text := text.rstrip("\r\n")):
            continue
        row = text.split("\t")
        if '"' in text:
            if any(cell.startswith('"') and not _QUOTED.fullmatch(cell) for cell in row) or len(row) < columns:
                row = _row_with_quotes(current[1] or "", row, columns, lines, waiting)
            else:
                row = [_without_quotes(cell) for cell in row]
        columns = columns or len(row)
        if len(text) > MAX_FIELD_CHARACTERS and max(map(len, row)) > MAX_FIELD_CHARACTERS:
            yield number, BadRow(RECORD_TOO_LONG, f"field larger than field limit ({MAX_FIELD_CHARACTERS})")
        else:
            yield number, row


def _without_quotes(cell: str) -> str:
    quoted = _QUOTED.fullmatch(cell)
    return quoted[1].replace('""', '"') if quoted else cell


def _row_with_quotes(
    text: str, plain: list[str], columns: int, lines: Iterator[Line], waiting: list[Line]
) -> list[str]:
    """Return the row that begins with a line in which a quote opens at the start of a field and does not close.

    It may close after tabs or, in a later line, after newlines. A line that is a row by itself, followed by another
    such line, has a quote that is only a character.
    """
    wanted, looked_at = columns or len(plain), list[Line]()
    while True:
        if row := _closed_row(text, wanted if columns else 0):
            return row
        following = waiting.pop() if waiting else next(lines, None)
        if following is not None:
            looked_at.append(following)
        own_rows = len(plain) == wanted and (following is None or (following[1] or "").count("\t") + 1 == wanted)
        if following is None or following[1] is None or own_rows or len(looked_at) > MOST_LINES_OF_FIELD:
            waiting.extend(reversed(looked_at))
            return [_without_quotes(cell) for cell in plain]
        text += following[1]


def _closed_row(text: str, columns: int) -> list[str]:
    """Return the fields of a text that is one row by RFC 4180, of so many columns unless 0, or an empty list."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    try:
        rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=TABLES[TSV], strict=True))
    except csv.Error:
        return []
    return rows[0] if len(rows) == 1 and columns in (0, len(rows[0])) else []
