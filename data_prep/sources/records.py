"""Texts out of records: the lines of .jsonl files, the rows of .csv and .parquet files and of Hugging Face datasets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError
from data_prep.sources.documents import BROKEN_RECORD, DAMAGED_FILE, NO_TEXT_IN_FIELD, NOT_UTF8, RECORD_TOO_LONG
from data_prep.sources.storage import Stream
from data_prep.sources.text_files import decode

HUGGING_FACE = "hf:"
MAX_RECORD_BYTES = 64 * 2**20
MAX_CSV_FIELD = 16 * 2**20  # characters, for each of which the csv module takes four bytes
PARQUET_BATCH_ROWS = 128
PARQUET_BUFFER_BYTES = 1 << 20
UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Record:
    """The text of one record, or why there is none, or both if bytes in it had to be replaced.

    ``number`` is the record's place in its file: the offset of a line of .jsonl, the line of a .csv file, the row of
    other things, from 1. ``fields`` are the record's fields if the wanted one has no text.
    """

    number: int
    text: str | None = None
    reason: str = ""
    why: str = ""
    fields: tuple[str, ...] = ()


def records_of_json_lines(stream: Stream, text_field: str, errors: str, start: int, stop: int) -> Iterator[Record]:
    """A record for each line that begins from ``start`` up to ``stop``; the stream stands at ``start``, or a byte
    before it unless that is 0. Lines of white space only are nothing."""
    for offset, line in owned_lines(stream, start, stop):
        if line is None:
            yield _too_long(offset)
        elif line and not line.isspace():
            yield _record_of_line(offset, line.removeprefix(UTF8_MARK) if offset == 0 else line, text_field, errors)


def _record_of_line(offset: int, line: bytes, text_field: str, errors: str) -> Record:
    content, bad = decode(line, errors)
    if content is None:
        return Record(offset, None, NOT_UTF8, not_utf8(line[bad], offset + bad))
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        return Record(offset, None, BROKEN_RECORD, f"no JSON ({error})")
    if not isinstance(record, dict):
        return Record(offset, None, BROKEN_RECORD, "not a JSON object")
    found = _record_of_value(offset, record.get(text_field), text_field, tuple(record))
    return found if bad < 0 else Record(offset, found.text, NOT_UTF8, not_utf8(line[bad], offset + bad))


def owned_lines(stream: Stream, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
    """Offset and bytes of each line that begins from ``start`` up to ``stop`` (-1: the end).

    A line ends at ``\\n``, which is left off. One above ``MAX_RECORD_BYTES`` gives ``None`` and is never held. A line
    that damage cut off is left out.
    """
    line_start = max(0, start - 1)
    owned = start == 0  # else the stream stands a byte before, in the line before
    held: list[bytes] = []
    length = 0
    for block in stream.blocks():
        *whole, last = block.split(b"\n")
        for piece in whole:
            length += len(piece)
            if owned:
                yield line_start, b"".join((*held, piece)) if length <= MAX_RECORD_BYTES else None
            line_start += length + 1
            if 0 <= stop <= line_start:
                return
            held, length, owned = [], 0, True
        length += len(last)
        if length > MAX_RECORD_BYTES or not owned:
            held = []
            if 0 <= stop <= line_start + length:  # no other line begins before ``stop``
                break
        elif last:
            held.append(last)
    if owned and length and not stream.damage:
        yield line_start, b"".join(held) if length <= MAX_RECORD_BYTES else None


def records_of_csv(stream: Stream, text_field: str, errors: str) -> Iterator[Record]:
    """A record for each row below the header. Rows of the wrong length and bad quotes are broken records."""
    csv.field_size_limit(MAX_CSV_FIELD)
    skipped: list[Record] = []
    rows = csv.reader(_csv_lines(stream, skipped), strict=True)
    header: list[str] | None = None
    while True:
        line = rows.line_num + len(skipped) + 1
        try:
            row = next(rows)
        except StopIteration:
            break
        except csv.Error as error:
            reason = RECORD_TOO_LONG if "field larger" in str(error) else BROKEN_RECORD
            yield Record(line, None, reason, str(error))
            continue
        if not row:
            continue
        if header is None:
            header = row
            if text_field not in header:
                yield _no_text(line, text_field, tuple(header))
                return
        elif len(row) != len(header):
            yield Record(line, None, BROKEN_RECORD, f"the row has {len(row)} columns, the header {len(header)}")
        else:
            yield _record_of_field(line, row[header.index(text_field)], text_field, errors)
    yield from skipped


def _csv_lines(stream: Stream, skipped: list[Record]) -> Iterator[str]:
    for number, lines in _runs_of_lines(stream):
        if lines is None:
            skipped.append(_too_long(number))
            continue
        # Bytes that are no UTF-8 pass as half surrogates: they may be in another field than the text's.
        text = (lines.removeprefix(UTF8_MARK) if number == 1 else lines).decode("utf-8", "surrogateescape")
        yield from io.StringIO(text, newline="\n")


def _runs_of_lines(stream: Stream) -> Iterator[tuple[int, bytes | None]]:
    """The lines that ``owned_lines`` gives for all of a file, many at a time, with the number of the first from 1."""
    held: list[bytes] = []
    length, number = 0, 1
    for block in stream.blocks():
        first, newline, rest = block.partition(b"\n")
        length += len(first)
        held = [*held, first] if length <= MAX_RECORD_BYTES else []
        if not newline:
            continue
        yield number, b"".join((*held, newline)) if length <= MAX_RECORD_BYTES else None
        end = rest.rfind(b"\n") + 1
        if end:
            yield number + 1, rest[:end]
        number += 1 + rest.count(b"\n")
        held, length = [rest[end:]], len(rest) - end
    if length and not stream.damage:
        yield number, b"".join((*held, b"\n")) if length <= MAX_RECORD_BYTES else None


def _record_of_field(line: int, field: str, text_field: str, errors: str) -> Record:
    if field.isascii():
        return Record(line, field)
    data = field.encode("utf-8", "surrogateescape")
    text, bad = decode(data, errors)
    return Record(line, text) if bad < 0 else Record(line, text, NOT_UTF8, not_utf8(data[bad]))


def row_groups(file: IO[bytes]) -> list[int]:
    """The packed bytes of each row group of a .parquet file; none if it is not one."""
    import pyarrow  # here, because it takes long
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(file).metadata
    except (pyarrow.ArrowException, OSError):
        return []
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]


def records_of_parquet(file: IO[bytes], text_field: str, errors: str, start: int, stop: int) -> Iterator[Record]:
    """A record for each row of the row groups from ``start`` up to ``stop`` (-1: all)."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
        names = tuple(parquet.schema_arrow.names)
        if text_field not in names:
            yield _no_text(1, text_field, names)
            return
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(start))
        groups = list(range(start, parquet.num_row_groups if stop < 0 else stop))
        batches = parquet.iter_batches(PARQUET_BATCH_ROWS, row_groups=groups, columns=[text_field])
        for batch in batches if groups else ():
            for value in _column_of(batch).to_pylist():
                row += 1
                yield _record_of_cell(row, value, text_field, names, errors)
    except (pyarrow.ArrowException, OSError) as error:
        yield Record(row + 1, None, DAMAGED_FILE, f"no whole parquet file ({first_line(error)})")


def _column_of(batch: Any) -> Any:
    """The first column of a batch, text as bytes, because Arrow does not check that it is UTF-8."""
    import pyarrow

    column = batch.column(0)
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
        return column.cast(pyarrow.large_binary())
    return column


def _record_of_cell(row: int, value: Any, text_field: str, names: tuple[str, ...], errors: str) -> Record:
    if not isinstance(value, bytes):
        return _record_of_value(row, value, text_field, names)
    text, bad = decode(value, errors)
    return Record(row, text) if bad < 0 else Record(row, text, NOT_UTF8, not_utf8(value[bad]))


def records_of_dataset(name: str, split: str, text_field: str) -> Iterator[Record]:
    """A record for each row of a Hugging Face dataset (a name, or a local folder), streamed."""
    for number, row in enumerate(rows_of_dataset(name, split), start=1):
        yield _record_of_value(number, row.get(text_field), text_field, tuple(row))


def rows_of_dataset(name: str, split: str) -> Iterator[dict[str, Any]]:
    """The rows of a Hugging Face dataset, streamed. UserError if it cannot be read."""
    import datasets  # here, because it takes seconds

    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the library raises anything, from ValueError to errors of its network client
        raise UserError(f'cannot read the dataset "{name}", split "{split}": {first_line(error)}') from error


def parse_hugging_face(location: str) -> tuple[str, str]:
    """Name and split of ``hf:NAME[:SPLIT]``; the split is ``train`` unless given."""
    name = location.removeprefix(HUGGING_FACE)
    if ":" not in name or Path(name).exists():
        return name, "train"
    name, _, split = name.rpartition(":")
    return name, split


def _record_of_value(number: int, text: Any, text_field: str, fields: tuple[str, ...]) -> Record:
    if not isinstance(text, str):
        return _no_text(number, text_field, fields)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return Record(number, None, BROKEN_RECORD, "the text holds half of a surrogate pair")
    return Record(number, text)


def _no_text(number: int, text_field: str, fields: tuple[str, ...]) -> Record:
    return Record(number, None, NO_TEXT_IN_FIELD, f'no text in the field "{text_field}"', fields)


def _too_long(number: int) -> Record:
    return Record(number, None, RECORD_TOO_LONG, f"the line is longer than {MAX_RECORD_BYTES // 2**20} MiB")


def not_utf8(byte: int, offset: int | None = None) -> str:
    """What is wrong with a byte, for a message."""
    where = "" if offset is None else f" at offset {offset}"
    return f"not UTF-8 (byte 0x{byte:02x}{where})"


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def known_fields(fields: Iterable[str], most: int = 20) -> str:
    """Names of fields for a message."""
    return ", ".join(f'"{name}"' for name in list(fields)[:most])
