"""The rows of small files such as task examples and prompts, each with its place in the file for error messages.

The kinds of files are those of data_prep (``data_prep.sources.formats``), compressed or not; ``-`` for JSON lines on
standard input; and Hugging Face datasets as ``hf:NAME[:SPLIT]``. The readers of pretraining text skip damaged records;
this one stops at the first error, because a score over part of a file is not a score of the file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.sources.documents import one_line
from data_prep.sources.formats import JSON, JSON_LINES, PARQUET, ROWS, TABLES, TEXT, kind_of, what_it_is
from data_prep.sources.json_values import rows_of_json
from data_prep.sources.records import (
    HALF,
    HUGGING_FACE,
    MAX_RECORD_BYTES,
    first_line,
    not_utf8,
    owned_lines,
    parse_hugging_face,
    rows_of_dataset,
)
from data_prep.sources.storage import Stream, UnreadableError, open_raw, open_stream
from data_prep.sources.tables import BadRow, lines_of_text, rows_of_table
from data_prep.sources.text_files import UTF8_MARK, wide_encoding

STDIN = "-"
CONVERT = "convert the file to UTF-8"
ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
Row = tuple[str, dict[str, Any]]
Lines = Iterable[tuple[int, bytes | None]]  # with their numbers, from 1; None for one that is too long


def holds_rows(path: str | Path) -> bool:
    """Return whether a file's name ends like one with columns."""
    return kind_of(str(path)) not in ("", TEXT)


def rows_of(source: str | Path, lines_as: str = "") -> Iterator[Row]:
    """Stream the rows of a file or dataset as (place, values by column).

    A place is like ``reviews.jsonl, line 12``, to begin an error message. Empty lines are skipped. Values of .csv and
    .tsv files are text; others have the types of the JSON or of the file's columns.

    Args:
        lines_as: if given, each line of a .txt file is a row with the line in this column.

    Raises:
        UserError: the source is missing or of an unknown kind, or a row cannot be read; the message has its place.
    """
    location = str(source)
    if location.startswith(HUGGING_FACE):
        dataset, split = parse_hugging_face(location)
        for number, row in enumerate(rows_of_dataset(dataset, split), 1):
            yield f"{HUGGING_FACE}{dataset}:{split}, row {number}", row
        return
    if location == STDIN:
        yield from _rows_of_json_lines("standard input", enumerate(sys.stdin.buffer, 1))
        return
    name, path = one_line(location), Path(location)
    kind = kind_of(location)
    if not kind or (kind == TEXT and not lines_as):
        raise UserError(f"cannot read {name}: the file must end in one of {', '.join(ROWS)}")
    if not path.is_file():
        raise UserError(f"there is no file {name}")
    try:
        if kind == PARQUET:
            yield from _rows_of_parquet(location, name)
            return
        with open_stream(location) as stream:
            _refuse_other_content(name, kind, stream)
            yield from _rows_of_stream(name, kind, stream, lines_as)
            if stream.damage:
                raise UserError(f"{name} is damaged ({stream.damage}): get a complete copy")
    except UnreadableError as error:
        raise UserError(f"{name} {error}: make it readable") from None


def _refuse_other_content(name: str, kind: str, stream: Stream) -> None:
    first = stream.peek()
    if wide := wide_encoding(first):
        raise UserError(f"{name} is {wide}, not UTF-8: {CONVERT}")
    if other := what_it_is(kind, first):
        raise UserError(f"{name} {other}")


def _rows_of_stream(name: str, kind: str, stream: Stream, lines_as: str) -> Iterator[Row]:
    if kind == JSON_LINES:
        yield from _rows_of_json_lines(name, enumerate((line for _, line in owned_lines(stream, 0, -1)), 1))
    elif kind == JSON:
        for number, found in rows_of_json(stream):
            place = f"{name}, record {number}"
            yield place, _checked(place, found)
    elif kind in TABLES:
        header: list[str] = []
        for number, cells in rows_of_table(stream, kind):
            place = f"{name}, line {number}"
            if header:
                named = cells if isinstance(cells, BadRow) else dict(zip(header, map(_newlines, cells), strict=True))
                yield place, _checked(place, named)
            else:
                _checked(place, cells if isinstance(cells, BadRow) else dict.fromkeys(cells))
                header = list(cells)
    else:
        for number, text in lines_of_text(stream):
            place = f"{name}, line {number}"
            yield place, _checked(place, _too_long() if text is None else {lines_as: text.rstrip("\r\n")})


def _checked(place: str, found: dict[str, Any] | BadRow) -> dict[str, Any]:
    """Return the row found at a place, if there is one and all of it is UTF-8."""
    problem = found.why if isinstance(found, BadRow) else _not_text(found)
    if problem:
        raise UserError(f"{place}: {problem}")
    assert isinstance(found, dict)
    return found


def _not_text(row: dict[str, Any]) -> str:
    """Return why a row cannot be written as UTF-8: it holds half of a surrogate pair, or a byte that became one."""
    shown = json.dumps(row, ensure_ascii=False, default=str)
    try:
        shown.encode("utf-8")
    except UnicodeEncodeError as error:
        found = ord(shown[error.start])
        if 0xDC80 <= found <= 0xDCFF:
            return f"{not_utf8(found & 0xFF)}: {CONVERT}"
        columns = [name for name in row if len(row) == 1 or _not_text({name: row[name]})]
        return f'"{one_line(columns[0])}" contains {HALF} (\\u{found:04x}): write the whole pair, or remove it'
    return ""


def _newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _too_long() -> BadRow:
    return BadRow("", f"longer than {MAX_RECORD_BYTES // 2**20} MiB")


def json_lines(name: str, lines: Lines) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The place and the object of each line of JSON in the file ``name``, or a phrase for what is wrong with the line.

    Empty lines are skipped.
    """
    for number, line in lines:
        try:
            text = _decoded(line)
            if not text.strip():
                continue
            value = json.loads(text)
        except UserError as error:
            row: dict[str, Any] | str = str(error)
        except (ValueError, RecursionError) as error:
            row = f"not JSON ({error})"
        else:
            row = value if isinstance(value, dict) else "not a JSON object"
            if isinstance(value, dict) and ESCAPED_SURROGATE.search(text):
                row = _not_text(value) or value
        yield f"{name}, line {number}", row


def _rows_of_json_lines(name: str, lines: Lines) -> Iterator[Row]:
    for place, row in json_lines(name, lines):
        if isinstance(row, str):
            raise UserError(f"{place}: {row}")
        yield place, row


def _decoded(line: bytes | None) -> str:
    """The text of a line, without its end and a byte-order mark. UserError: a phrase to follow the line's place."""
    if line is None:
        raise UserError(f"longer than {MAX_RECORD_BYTES // 2**20} MiB")
    try:
        return line.removeprefix(UTF8_MARK).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{not_utf8(line[error.start])}: {CONVERT}") from None


def _rows_of_parquet(location: str, name: str) -> Iterator[Row]:
    import pyarrow  # here, because it takes long
    import pyarrow.parquet

    number = 0
    try:
        with open_raw(location) as file:
            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{name}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}, row {number + 1}: {first_line(error)}") from None
