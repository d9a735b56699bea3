"""Read texts from records: of .jsonl, .json, .csv, .tsv and .parquet files and of Hugging Face datasets."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError
from data_prep.sources.documents import BROKEN_RECORD, DAMAGED_FILE, NO_TEXT_IN_FIELD, NOT_UTF8, RECORD_TOO_LONG
from data_prep.sources.json_values import rows_of_json
from data_prep.sources.storage import Stream
from data_prep.sources.tables import BadRow, rows_of_table
from data_prep.sources.text_files import UTF8_MARK, decode

HUGGING_FACE = "hf:"
MAX_RECORD_BYTES = 64 * 2**20
PARQUET_BATCH_ROWS = 128
PARQUET_BUFFER_BYTES = 1 << 20
STRUCTS, LISTS, NULLS, NUMBERS = "structs", "lists", "nothing (null)", "numbers"
BOOLEANS, TIMES = "true or false", "timestamps or dates"
HALF = "half of a surrogate pair"
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Record:
    """The text of one record, or why there is none, or both if invalid bytes were replaced.

    ``number`` locates the record in its file: the offset of a .jsonl line, the line of a .csv file or, for other
    formats, the row (from 1). If the requested field has no text, ``fields`` lists the record's fields, and ``holds``
    says what the field holds instead ("lists"), or is empty if the record has no such field.
    """

    number: int
    text: str | None = None
    reason: str = ""
    why: str = ""
    fields: tuple[str, ...] = ()
    holds: str = ""


def records_of_json_lines(stream: Stream, text_field: str, errors: str, start: int, stop: int) -> Iterator[Record]:
    """Yield a record for each line that begins in ``[start, stop)``, skipping blank lines.

    The stream must be at ``start - 1``, or at 0 if ``start`` is 0.
    """
    for offset, line in owned_lines(stream, start, stop):
        if line is None:
            yield _too_long(offset)
        elif line and not line.isspace():
            yield _record_of_line(offset, line.removeprefix(UTF8_MARK), text_field, errors)


def _record_of_line(offset: int, line: bytes, text_field: str, errors: str) -> Record:
    content, bad = decode(line, errors)
    if content is None:
        return Record(offset, None, NOT_UTF8, not_utf8(line[bad], offset + bad))
    try:
        record = json.loads(content)
    except (ValueError, RecursionError) as error:
        return Record(offset, None, BROKEN_RECORD, f"not JSON ({error})")
    if not isinstance(record, dict):
        return Record(offset, None, BROKEN_RECORD, "not a JSON object")
    found = _record_of_row(offset, record, text_field, errors)
    return found if bad < 0 else Record(offset, found.text, NOT_UTF8, not_utf8(line[bad], offset + bad))


def owned_lines(stream: Stream, start: int, stop: int) -> Iterator[tuple[int, bytes | None]]:
    """Yield offset and bytes of each line that begins in ``[start, stop)``; a ``stop`` of -1 means the end.

    The final ``\\n`` is removed. A line longer than ``MAX_RECORD_BYTES`` yields None and is never held in memory. A
    line cut off by damage is skipped.
    """
    line_start = max(0, start - 1)
    owned = start == 0  # otherwise the stream is one byte earlier, in the previous line
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


def records_of_table(stream: Stream, kind: str, text_field: str, errors: str) -> Iterator[Record]:
    """Yield a record for each row of a .csv or .tsv file below the header; ``tables`` has the rules."""
    column = -1
    for line, row in rows_of_table(stream, kind):
        if isinstance(row, BadRow):
            yield Record(line, None, *row)
        elif column >= 0:
            yield _record_of_text(line, row[column], errors)
        elif text_field in row:
            column = row.index(text_field)
        else:
            yield _no_text(line, text_field, tuple(row))
            return


def records_of_json(stream: Stream, text_field: str, errors: str) -> Iterator[Record]:
    """Yield a record for each record of a .json file; ``json_values`` has the rules."""
    for number, row in rows_of_json(stream, text_field):
        if isinstance(row, BadRow):
            yield Record(number, None, *row)
        else:
            yield _record_of_row(number, row, text_field, errors)


def row_groups(file: IO[bytes]) -> list[tuple[int, int]]:
    """Return rows and compressed bytes of each row group of a .parquet file, or an empty list if it is not one."""
    import pyarrow  # slow to import
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.ParquetFile(file).metadata
    except (pyarrow.ArrowException, OSError):
        return []
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    return [
        (group.num_rows, sum(group.column(i).total_compressed_size for i in range(group.num_columns)))
        for group in groups
    ]


def records_of_parquet(file: IO[bytes], text_field: str, errors: str, start: int, stop: int) -> Iterator[Record]:
    """Yield a record for each row in row groups ``[start, stop)``; a ``stop`` of -1 means the end."""
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        parquet = pyarrow.parquet.ParquetFile(file, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False)
        schema = parquet.schema_arrow
        names = tuple(_names_in(schema))
        column = _column_at(schema, text_field)
        if column is None:
            yield _no_text(1, text_field, names)
            return
        row = sum(parquet.metadata.row_group(group).num_rows for group in range(start))
        groups = list(range(start, parquet.num_row_groups if stop < 0 else stop))
        if holds := _holds_instead_of_text(column.type):
            rows = sum(parquet.metadata.row_group(group).num_rows for group in groups)
            yield from (_no_text(row + number, text_field, names, holds) for number in range(1, rows + 1))
            return
        batches = parquet.iter_batches(PARQUET_BATCH_ROWS, row_groups=groups, columns=[text_field])
        for batch in batches if groups else ():
            for value in _text_column(batch, text_field).to_pylist():
                row += 1
                yield _no_text(row, text_field, names, NULLS) if value is None else _record_of_bytes(row, value, errors)
    except (pyarrow.ArrowException, OSError) as error:
        yield Record(row + 1, None, DAMAGED_FILE, f"not a complete parquet file ({first_line(error)})")


def _column_at(fields: Any, name: str) -> Any:
    """Return the field of a schema or struct type with this name, in which dots lead into structs, or None."""
    import pyarrow

    if (index := fields.get_field_index(name)) >= 0:
        return fields.field(index)
    for outer, inner in _split_at_dots(name):
        index = fields.get_field_index(outer)
        if index >= 0 and pyarrow.types.is_struct(fields.field(index).type):
            return _column_at(fields.field(index).type, inner)
    return None


def _names_in(fields: Iterable[Any], before: str = "") -> Iterator[str]:
    """Yield the names of all columns, those in structs with dots."""
    import pyarrow

    for each in fields:
        if pyarrow.types.is_struct(each.type):
            yield from _names_in(each.type, f"{before}{each.name}.")
        else:
            yield before + each.name


def _holds_instead_of_text(kind: Any) -> str:
    """Return what a column of this Arrow type holds, or "" if that is text."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    for test, holds in (
        (types.is_struct, STRUCTS),
        (types.is_map, "maps"),
        (types.is_nested, LISTS),
        (types.is_null, NULLS),
        (types.is_boolean, BOOLEANS),
        (types.is_temporal, TIMES),
        (types.is_decimal, NUMBERS),
        (types.is_primitive, NUMBERS),
    ):
        if test(kind):
            return holds
    return ""


def _text_column(batch: Any, name: str) -> Any:
    """Return a batch's column of this name as bytes, because Arrow does not check that text is UTF-8."""
    import pyarrow
    import pyarrow.compute

    names = batch.schema.names
    column = batch.column(names.index(name) if name in names else 0)
    while pyarrow.types.is_struct(column.type):  # the batch has only the child that was asked for
        column = pyarrow.compute.struct_field(column, [0])
    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column.cast(pyarrow.large_binary())


def _record_of_bytes(row: int, value: bytes, errors: str) -> Record:
    text, bad = decode(value, errors)
    return Record(row, text) if bad < 0 else Record(row, text, NOT_UTF8, not_utf8(value[bad]))


def records_of_dataset(name: str, split: str, text_field: str, errors: str) -> Iterator[Record]:
    """Yield a record for each row of a Hugging Face dataset (a name or a local folder), streamed."""
    for number, row in enumerate(rows_of_dataset(name, split), start=1):
        yield _record_of_row(number, row, text_field, errors)


def rows_of_dataset(name: str, split: str) -> Iterator[dict[str, Any]]:
    """Stream the rows of a Hugging Face dataset (a name or a local folder). Raises ``UserError`` if that fails."""
    import datasets  # takes seconds to import

    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the library raises anything from ValueError to errors of its network client
        raise UserError(f'cannot read the dataset "{name}", split "{split}": {first_line(error)}') from error


def parse_hugging_face(location: str) -> tuple[str, str]:
    """Return name and split of ``hf:NAME[:SPLIT]``; the default split is ``train``."""
    name = location.removeprefix(HUGGING_FACE)
    if ":" not in name or Path(name).exists():
        return name, "train"
    name, _, split = name.rpartition(":")
    return name, split


def value_at(row: dict[str, Any], name: str) -> Any:
    """Return the value in a column, in whose name dots lead into objects, as in ``translation.en``, or None."""
    if name in row:
        return row[name]
    for outer, inner in _split_at_dots(name):
        if isinstance(found := row.get(outer), dict):
            return value_at(found, inner)
    return None


def _split_at_dots(name: str) -> Iterator[tuple[str, str]]:
    """Yield what is before and after each dot in the name of a column."""
    for place, character in enumerate(name):
        if character == ".":
            yield name[:place], name[place + 1 :]


def column_names(row: dict[str, Any], before: str = "") -> Iterator[str]:
    """Yield the names of a row's columns, those in objects with dots."""
    for name, value in row.items():
        if isinstance(value, dict) and value:
            yield from column_names(value, f"{before}{name}.")
        else:
            yield f"{before}{name}"


def _record_of_row(number: int, row: dict[str, Any], text_field: str, errors: str) -> Record:
    text = value_at(row, text_field)
    if isinstance(text, bytes):
        return _record_of_bytes(number, text, errors)
    if not isinstance(text, str):
        names = tuple(column_names(row))
        there = text is not None or text_field in names
        return _no_text(number, text_field, names, _what_it_holds(text) if there else "")
    return _record_of_text(number, text, errors)


def _record_of_text(number: int, text: str, errors: str) -> Record:
    """Return the record of a text, in which lone surrogates stand for invalid bytes or come from JSON's escapes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = ord(text[error.start])
        is_byte = 0xDC80 <= found <= 0xDCFF
        replaced: str | None = None
        if errors == "replace":
            try:
                replaced = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
            except UnicodeEncodeError:
                replaced = SURROGATE.sub("\ufffd", text)
        return Record(number, replaced, NOT_UTF8, not_utf8(found & 0xFF) if is_byte else f"{HALF} (\\u{found:04x})")
    return Record(number, text)


def _what_it_holds(value: Any) -> str:
    """Return what a column holds instead of text, for a message."""
    if value is None:
        return NULLS
    kinds = (
        (dict, STRUCTS),
        (list, LISTS),
        (bool, BOOLEANS),
        ((int, float, Decimal), NUMBERS),
        ((datetime.date, datetime.time, datetime.timedelta), TIMES),
    )
    return next((holds for kind, holds in kinds if isinstance(value, kind)), f"values of type {type(value).__name__}")


def _no_text(number: int, text_field: str, fields: tuple[str, ...], holds: str = "") -> Record:
    why = f'"{text_field}" holds {holds}' if holds else f'no text in the field "{text_field}"'
    return Record(number, None, NO_TEXT_IN_FIELD, why, fields, holds)


def _too_long(number: int) -> Record:
    return Record(number, None, RECORD_TOO_LONG, f"the line is longer than {MAX_RECORD_BYTES // 2**20} MiB")


def not_utf8(byte: int, offset: int | None = None) -> str:
    """Describe an invalid byte for a message."""
    where = "" if offset is None else f" at offset {offset}"
    return f"not UTF-8 (byte 0x{byte:02x}{where})"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def known_fields(fields: Iterable[str], most: int = 20) -> str:
    """Return names of fields for a message."""
    return ", ".join(f'"{name}"' for name in list(fields)[:most])
