"""Parse the sources a user names and divide them into parts that workers read independently.

``parse_sources`` interprets the names, ``parts_of`` lists the files and divides them into parts of about equal size,
and ``read_part`` yields the documents of a part. A part depends only on its file ranges: it yields the same documents
wherever and in whatever order it is read. Only file sizes are inspected before a part is read.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from data_prep.errors import UserError
from data_prep.errors.wording import counted
from data_prep.files import is_remote
from data_prep.settings import ReadSettings
from data_prep.sources.documents import CorpusPart, FileRange, ReadReport, Source, one_line
from data_prep.sources.formats import (
    ENDINGS,
    FIRST_BLOCK_BYTES,
    JSON_LINES,
    PACKED_SUFFIXES,
    PARQUET,
    TEXT,
    is_compressed,
    kind_by_rules,
    some_names,
    summary_of,
    what_it_is,
)
from data_prep.sources.reading import BUILTIN, STDIN, parse_separator, read_part, why_not_read
from data_prep.sources.records import HUGGING_FACE, parse_hugging_face, row_groups
from data_prep.sources.storage import (
    BLOCK_BYTES,
    UnreadableError,
    is_folder,
    is_glob,
    last_name,
    linked_folders,
    list_folder,
    list_glob,
    open_raw,
    open_stream,
    root_of_glob,
    size_of,
)
from data_prep.sources.text_files import is_local

PARQUET_MARK = b"PAR1"
T = TypeVar("T")
NAME = re.compile(r"(?P<name>[^=/\\:@*?]+)=(?P<location>.+)", re.DOTALL)


def parse_sources(sources: Sequence[str]) -> list[Source]:
    """Parse sources written as ``[NAME=]LOCATION[@WEIGHT]``.

    A location is a file, a folder, a glob, a URL, ``-`` for standard input, ``builtin``, or ``hf:NAME[:SPLIT]``. If
    the whole text is an existing path, it is a location even if it contains ``=`` or ``@``. Raises ``UserError`` for a
    location that does not exist, two sources with the same name, and weights that are not above 0.
    """
    if not sources:
        raise UserError("no source given: name a file, a folder, - or builtin")
    parsed = [_parse(text) for text in sources]
    if sum(source.location == STDIN for source in parsed) > 1:
        raise UserError("standard input (-) can be read only once")
    name, times = Counter(source.name for source in parsed).most_common(1)[0]
    if times > 1:
        location = next(source.location for source in parsed if source.name == name)
        raise UserError(
            f'{times} sources are called "{one_line(name)}": give each a different name, as in "other={location}"'
        )
    return parsed


def _parse(text: str) -> Source:
    location, weight = text, 1.0
    before, sign, after = text.rpartition("@")
    if sign and before and "/" not in after and not _is_there(text):
        location, weight = before, _parse_weight(text, after)
    named = None if _is_there(location) else NAME.fullmatch(location)
    if named:
        location = named["location"]
    if not _is_there(location):
        _refuse_missing(location)
    return Source(named["name"] if named else _default_name(location), location, weight)


def _parse_weight(text: str, number: str) -> float:
    try:
        weight = float(number)
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise UserError(f'the weight "{one_line(number)}" of "{one_line(text)}" must be a number above 0')
    return weight


def _is_there(location: str) -> bool:
    """Return whether the whole text is a location. Globs and remote locations are judged by their spelling."""
    if location in (BUILTIN, STDIN) or Path(location).is_file() or Path(location).is_dir():
        return True
    if location.startswith(HUGGING_FACE):
        return "@" not in location or Path(parse_hugging_face(location)[0]).exists()
    if is_remote(location):
        return NAME.match(location) is None and "@" not in location.rpartition("/")[2]
    return is_glob(location) and Path(root_of_glob(location)).is_dir() and "@" not in Path(location).name


def _refuse_missing(location: str) -> None:
    if is_glob(location) or is_remote(location):
        return  # parts_of reports what is wrong
    if Path(location).exists():
        raise UserError(
            f'"{one_line(location)}" is neither a file nor a folder: '
            'to read the output of a program, pipe it in and name the source "-"'
        )
    raise UserError(f'there is no file or folder "{one_line(location)}"')


def _default_name(location: str) -> str:
    if location in (BUILTIN, STDIN):
        return location
    if location.startswith(HUGGING_FACE):
        name, split = parse_hugging_face(location)
        return f"{HUGGING_FACE}{last_name(name) if Path(name).exists() else name}:{split}"
    if is_glob(location):
        return last_name(root_of_glob(location) or ".")
    return last_name(location)


def parts_of(sources: Sequence[Source], settings: ReadSettings, stdin_copy: Path | None = None) -> list[CorpusPart]:
    """List files and their sizes, and return all parts ordered by source, path and offset.

    ``stdin_copy`` is where ``copy_stdin`` stored standard input; without it, that source has no parts yet. Raises
    ``UserError`` for a source with nothing to read, and for a named file that is empty or not text.
    """
    parts: list[CorpusPart] = []
    for index, source in enumerate(sources):
        ranges = _ranges_of_source(source, settings, stdin_copy)
        parts.extend(CorpusPart(index, each, size) for each, size in grouped(ranges, settings.part_bytes))
    return parts


def grouped(sized: Iterable[tuple[T, int]], most: int) -> Iterator[tuple[tuple[T, ...], int]]:
    """Group consecutive things with their sizes into groups of up to ``most`` in total, with at least one each."""
    waiting: list[T] = []
    total = 0
    for each, size in sized:
        if waiting and total + size > most:
            yield tuple(waiting), total
            waiting, total = [], 0
        waiting.append(each)
        total += size
    if waiting:
        yield tuple(waiting), total


def _ranges_of_source(
    source: Source, settings: ReadSettings, stdin_copy: Path | None
) -> Iterator[tuple[FileRange, int]]:
    location = source.location
    if location == STDIN:
        if stdin_copy is not None:
            yield from _ranges_of_file(str(stdin_copy), stdin_copy.stat().st_size, settings)
    elif location == BUILTIN or location.startswith(HUGGING_FACE):
        yield FileRange(location), 0
    elif is_glob(location):
        files = list_glob(location)
        if not files:
            raise UserError(f'no file matches "{one_line(location)}"')
        for path, size in files:
            yield from _ranges_of_file(path, size, settings)
    elif is_folder(location):
        listed = list_folder(location)
        files = [(path, size) for path, size in listed if kind_by_rules(path, settings.reading_rules)]
        if not files:
            raise _no_text_in(location, [path for path, _ in listed])
        for path, size in files:
            yield from _ranges_of_file(path, size, settings)
    else:
        known_size = size_of(location)
        _refuse_unreadable(location, known_size, settings.reading_rules)
        yield from _ranges_of_file(location, known_size, settings)


def _ranges_of_file(path: str, size: int | None, settings: ReadSettings) -> Iterator[tuple[FileRange, int]]:
    """Yield the ranges of a file: equal in size and at most ``part_bytes`` if the file can be split."""
    kind = kind_by_rules(path, settings.reading_rules) or TEXT
    if not size:
        yield FileRange(path), 0
    elif kind == PARQUET and size > settings.part_bytes:
        yield from _ranges_of_parquet(path, size, settings.part_bytes)
    elif not _can_be_split(path, kind, settings):
        # A compressed file is read to its end, a text file up to the size it had when it was listed.
        yield FileRange(path, 0, -1 if is_compressed(path) or kind != TEXT else size), size
    else:
        count = -(-size // settings.part_bytes)
        bounds = [size * number // count for number in range(count + 1)]
        for start, stop in itertools.pairwise(bounds):
            yield FileRange(path, start, stop), stop - start


def _can_be_split(path: str, kind: str, settings: ReadSettings) -> bool:
    if is_compressed(path) or kind not in (TEXT, JSON_LINES):
        return False
    if kind == JSON_LINES:
        return True
    separator = parse_separator(settings)
    return settings.document_per != "file" if separator is None else is_local(separator)


def _ranges_of_parquet(path: str, size: int, part_bytes: int) -> Iterator[tuple[FileRange, int]]:
    """Yield runs of row groups up to ``part_bytes``, or the file if it cannot be opened (its reader reports that)."""
    try:
        with open_raw(path) as file:
            groups = row_groups(file)
    except UnreadableError:
        groups = []
    if not groups:
        yield FileRange(path), size
        return
    start, total, left = 0, 0, size
    for number, (_, group) in enumerate(groups):
        if number > start and total + group > part_bytes:
            yield FileRange(path, start, number), total
            start, total, left = number, 0, left - total
        total += group
    yield FileRange(path, start, len(groups)), max(0, left)


def unread_files(sources: Sequence[Source], reading_rules: int) -> str:
    """Return what the folders among the sources have that is not read: files with other endings and links, or ""."""
    folders = [source.location for source in sources if _is_listed(source.location)]
    unread = [path for folder in folders for path, _ in list_folder(folder) if not kind_by_rules(path, reading_rules)]
    linked = [path for folder in folders for path in linked_folders(folder)]
    found = []
    if unread:
        files = "1 file whose name ends" if len(unread) == 1 else f"{len(unread):,} files whose names end"
        found.append(f"{files} in nothing that is read: {summary_of(unread)}")
    if linked:
        found.append(f"{counted(len(linked), 'linked folder')} ({some_names(linked)})")
    return "; ".join(found)


def _is_listed(location: str) -> bool:
    special = location in (BUILTIN, STDIN) or location.startswith(HUGGING_FACE) or is_glob(location)
    return not special and is_folder(location)


def _no_text_in(folder: str, others: Sequence[str]) -> UserError:
    looked_for, compressed = ", ".join(ENDINGS), ", ".join(PACKED_SUFFIXES)
    return UserError(
        f'no text in "{one_line(folder)}": looked for {looked_for} (all but {PARQUET} also with {compressed}) in it '
        "and its subfolders" + (f"; there is only {summary_of(others)}" if others else "")
    )


def _refuse_unreadable(path: str, size: int | None, reading_rules: int) -> None:
    """Raise ``UserError`` early for an explicitly named file that is empty, unreadable or not of its kind."""
    if size == 0:
        raise UserError(f'"{one_line(path)}" is empty')
    try:
        with open_stream(path) as stream:
            first = stream.peek()
    except UnreadableError as error:
        raise UserError(f'"{one_line(path)}" {error}: make it readable') from None
    kind = kind_by_rules(path, reading_rules)
    if kind != PARQUET:
        _refuse_content(f'"{one_line(path)}"', kind, first, reading_rules)
    elif not first.startswith(PARQUET_MARK) and (other := what_it_is(kind, first)):
        raise UserError(f'"{one_line(path)}" {other}')


def _refuse_content(name: str, kind: str, first_block: bytes, reading_rules: int) -> None:
    if refused := why_not_read(kind, first_block, reading_rules):
        advice = refused[1] if kind != STDIN else refused[1].replace("give it a name", "save it in a file with a name")
        raise UserError(f"{name} {advice}")


def describe(sources: Sequence[Source], parts: Sequence[CorpusPart]) -> list[dict[str, Any]]:
    """Return what identifies each source without reading it: name, weight and, if known, number and size of its files.

    Names are the last components of paths, so a dataset does not reveal where on a machine it was made.
    """
    return [_describe(source, [part for part in parts if part.source == i]) for i, source in enumerate(sources)]


def _describe(source: Source, parts: Sequence[CorpusPart]) -> dict[str, Any]:
    described = {"name": source.name, "weight": source.weight}
    if source.location in (BUILTIN, STDIN) or source.location.startswith(HUGGING_FACE):
        return described
    files = {file_range.path for part in parts for file_range in part.ranges}
    return described | {"files": len(files), "bytes": sum(part.bytes for part in parts)}


def first_texts(names: Sequence[str], most_bytes: int, reading: ReadSettings) -> Iterator[str]:
    """Yield the first documents of some sources, up to ``most_bytes`` or slightly more.

    Raises ``UserError`` as a build would, and for standard input.
    """
    problems = list(reading.check())
    if STDIN in names:
        problems.append("standard input (-) cannot be used here: name a file")
    if problems:
        raise UserError("\n".join(problems))
    sources = parse_sources(names)
    for part in parts_of(sources, reading):
        for document in read_part(part, sources, reading, ReadReport()):
            yield document.text
            most_bytes -= len(document.text)
            if most_bytes <= 0:
                return


def copy_stdin(file: IO[bytes], reading_rules: int) -> None:
    """Copy standard input into an open file. Raises ``UserError`` if it is empty or does not start like UTF-8 text."""
    first = True
    while block := sys.stdin.buffer.read(BLOCK_BYTES):
        if first:
            _refuse_content("standard input", STDIN, block[:FIRST_BLOCK_BYTES], reading_rules)
        first = False
        file.write(block)
    file.flush()
    if first:
        raise UserError("standard input is empty")
