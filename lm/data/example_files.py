"""The rows of small files such as task examples and prompts, each with its place in the file for error messages.

.jsonl, .csv, .tsv and .parquet, compressed (.gz, .zst, .bz2, .xz) or not; ``-`` for JSON lines on standard input; and
Hugging Face datasets as ``hf:NAME[:SPLIT]``. The readers of pretraining text skip damaged records; this one stops at
the first error, because a score over part of a file is not a score of the file.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.sources.documents import one_line
from data_prep.sources.records import (
    HUGGING_FACE,
    MAX_RECORD_BYTES,
    UTF8_MARK,
    first_line,
    owned_lines,
    parse_hugging_face,
    rows_of_dataset,
)
from data_prep.sources.storage import PACKED_SUFFIXES, UnreadableError, open_raw, open_stream

STDIN = "-"
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
LINES = ".txt"  # one text per line; only if no other column is needed
Row = tuple[str, dict[str, Any]]
Lines = Iterable[tuple[int, bytes | None]]  # with their numbers, from 1; None for one that is too long


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
    kind = Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix
    if kind not in (*SUFFIXES, *([LINES] if lines_as else [])):
        raise UserError(f"cannot read {name}: the file must end in one of {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise UserError(f"there is no file {name}")
    try:
        if kind == ".parquet":
            yield from _rows_of_parquet(location, name)
            return
        with open_stream(location) as stream:
            lines = enumerate((line for _, line in owned_lines(stream, 0, -1)), 1)
            if kind == ".jsonl":
                yield from _rows_of_json_lines(name, lines)
            elif kind == LINES:
                yield from ((place, {lines_as: text}) for place, text in _texts(name, lines) if text)
            else:
                yield from _rows_of_csv(name, _texts(name, lines), "\t" if kind == ".tsv" else ",")
            if stream.damage:
                raise UserError(f"{name} is damaged ({stream.damage}): get a complete copy")
    except UnreadableError as error:
        raise UserError(f"{name} {error}: make it readable") from None


def json_lines(name: str, lines: Lines) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The place and the object of each line of JSON in the file ``name``, or a phrase for what is wrong with the line.

    Empty lines are skipped.
    """
    for number, line in lines:
        try:
            text = _decoded(number, line)
            if not text.strip():
                continue
            row = json.loads(text)
        except UserError as error:
            row = str(error)
        except (ValueError, RecursionError) as error:
            row = f"not JSON ({error})"
        else:
            row = row if isinstance(row, dict) else "not a JSON object"
        yield f"{name}, line {number}", row


def _rows_of_json_lines(name: str, lines: Lines) -> Iterator[Row]:
    for place, row in json_lines(name, lines):
        if isinstance(row, str):
            raise UserError(f"{place}: {row}")
        yield place, row


def _texts(name: str, lines: Lines) -> Iterator[tuple[str, str]]:
    """The place and the text of each line."""
    for number, line in lines:
        try:
            yield f"{name}, line {number}", _decoded(number, line)
        except UserError as error:
            raise UserError(f"{name}, line {number}: {error}") from None


def _decoded(number: int, line: bytes | None) -> str:
    """The text of a line, without its end and a byte-order mark. UserError: a phrase to follow the line's place."""
    if line is None:
        raise UserError(f"longer than {MAX_RECORD_BYTES // 2**20} MiB")
    try:
        return (line.removeprefix(UTF8_MARK) if number == 1 else line).decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte 0x{line[error.start]:02x}): convert the file to UTF-8") from None


def _rows_of_csv(name: str, lines: Iterable[tuple[str, str]], between: str) -> Iterator[Row]:
    reader = csv.reader((text + "\n" for _, text in lines), delimiter=between, strict=True)
    header: list[str] = []
    while True:
        place = f"{name}, line {reader.line_num + 1}"
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{place}: {error}") from None
        if not row:
            continue
        if not header:
            header = row
        elif len(row) != len(header):
            raise UserError(f"{place}: the row has {len(row)} columns, the header {len(header)}")
        else:
            yield place, dict(zip(header, row, strict=True))


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
