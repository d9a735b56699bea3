"""The rows of small files that people write by hand or get from others, each with its place, for messages about it.

.jsonl, .csv, .tsv and .parquet, packed (.gz, .zst, .bz2, .xz) or not; ``-`` for JSON lines on standard input; and
Hugging Face datasets as ``hf:NAME[:SPLIT]``. The readers of pretraining text leave out what is damaged and go on; this
one stops at the first thing that is wrong, for a score over a part of a file is no score of the file.
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
from data_prep.sources.records import HUGGING_FACE, MAX_RECORD_BYTES, UTF8_MARK, owned_lines, parse_hugging_face
from data_prep.sources.storage import PACKED_SUFFIXES, UnreadableError, open_raw, open_stream

STDIN = "-"
SUFFIXES = (".jsonl", ".csv", ".tsv", ".parquet")
LINES = ".txt"  # a text a line; only where no other column is wanted
Row = tuple[str, dict[str, Any]]


def rows_of(source: str | Path, lines_as: str = "") -> Iterator[Row]:
    """The rows of a file or dataset, one after the other, each as (place, values by column).

    A place reads like ``reviews.jsonl, line 12``, for the beginning of a sentence. Empty lines are skipped. Values of
    .csv and .tsv files are text; others are what JSON or the file's columns hold.

    Args:
        lines_as: if given, each line of a .txt file is a row with the line as this column.

    Raises:
        UserError: the source is not there or of no known kind, or a row cannot be read; the message has its place.
    """
    location = str(source)
    if location.startswith(HUGGING_FACE):
        yield from _rows_of_dataset(location)
        return
    if location == STDIN:
        yield from _rows_of_json_lines(_lines("standard input", enumerate(sys.stdin.buffer, 1)))
        return
    name, kind = one_line(location), _kind(location)
    if kind not in (*SUFFIXES, *([LINES] if lines_as else [])):
        known = ", ".join(SUFFIXES)
        raise UserError(f"{name} is not a kind of file that is read here: name one that ends in {known}")
    if not Path(location).is_file():
        raise UserError(f"there is no file {name}")
    try:
        if kind == ".parquet":
            yield from _rows_of_parquet(location, name)
            return
        with open_stream(location) as stream:
            lines = _lines(name, enumerate((line for _, line in owned_lines(stream, 0, -1)), 1))
            if kind == ".jsonl":
                yield from _rows_of_json_lines(lines)
            elif kind == LINES:
                yield from ((place, {lines_as: text}) for place, text in lines if text)
            else:
                yield from _rows_of_csv(name, lines, "\t" if kind == ".tsv" else ",")
            if stream.damage:
                raise UserError(f"{name} is damaged ({stream.damage}): get a whole copy")
    except UnreadableError as error:
        raise UserError(f"{name} {error}: make it readable") from None


def _kind(location: str) -> str:
    path = Path(location)
    return Path(path.stem).suffix if path.suffix in PACKED_SUFFIXES else path.suffix


def _lines(name: str, lines: Iterable[tuple[int, bytes | None]]) -> Iterator[tuple[str, str]]:
    """The place and the text of each line."""
    for number, line in lines:
        place = f"{name}, line {number}"
        if line is None:
            raise UserError(f"{place} is longer than {MAX_RECORD_BYTES // 2**20} MiB")
        try:
            yield place, (line.removeprefix(UTF8_MARK) if number == 1 else line).decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise UserError(f"{place}: not UTF-8 (byte 0x{line[error.start]:02x}): convert the file to UTF-8") from None


def _rows_of_json_lines(lines: Iterable[tuple[str, str]]) -> Iterator[Row]:
    for place, text in lines:
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: no JSON ({error})") from None
        if not isinstance(row, dict):
            raise UserError(f"{place}: not a JSON object")
        yield place, row


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
        raise UserError(f"{name}, row {number + 1}: {_first_line(error)}") from None


def _rows_of_dataset(location: str) -> Iterator[Row]:
    import datasets  # here, because it takes seconds

    dataset, split = parse_hugging_face(location)
    try:
        for number, row in enumerate(datasets.load_dataset(dataset, split=split, streaming=True), 1):
            yield f"{HUGGING_FACE}{dataset}:{split}, row {number}", row
    except Exception as error:  # the library raises anything, from ValueError to errors of its network client
        raise UserError(f'cannot read the dataset "{dataset}", split "{split}": {_first_line(error)}') from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
