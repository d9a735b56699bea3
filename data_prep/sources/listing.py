"""Whatever the user names, as sources, and the sources as parts that workers read, each by itself.

``parse_sources`` understands the names, ``parts_of`` lists the files and divides them into parts of about equal size,
and ``read_part`` gives a part's documents. A part is a function of its range of files only: read anywhere and in any
order, it gives the same documents. Nothing but sizes is looked at before a part is read.
"""

from __future__ import annotations

import itertools
import math
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError
from data_prep.sources.documents import (
    DEFAULT_MAX_DOCUMENT_BYTES,
    DEFAULT_PART_BYTES,
    Document,
    Part,
    ReadReport,
    ReadSettings,
    Source,
    Span,
    one_line,
)
from data_prep.sources.reading import (
    BUILTIN,
    CSV,
    JSON_LINES,
    PARQUET,
    STDIN,
    is_packed,
    kind_of,
    parse_separator,
    place_of,
    read_part,
    unpacked_name,
    why_no_text,
)
from data_prep.sources.records import HUGGING_FACE, parse_hugging_face, row_groups
from data_prep.sources.storage import (
    BLOCK_BYTES,
    PACKED_SUFFIXES,
    UnreadableError,
    is_folder,
    is_glob,
    is_remote,
    last_name,
    list_folder,
    list_glob,
    open_raw,
    open_stream,
    root_of_glob,
    size_of,
)
from data_prep.sources.text_files import is_local

__all__ = [
    "BUILTIN",
    "DEFAULT_MAX_DOCUMENT_BYTES",
    "DEFAULT_PART_BYTES",
    "STDIN",
    "Document",
    "Part",
    "ReadReport",
    "ReadSettings",
    "Source",
    "Span",
    "copy_stdin",
    "describe",
    "first_texts",
    "parse_sources",
    "parts_of",
    "place_of",
    "read_part",
]

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (JSON_LINES, CSV)
NAME = re.compile(r"(?P<name>[^=/\\:@*?]+)=(?P<location>.+)", re.DOTALL)


def parse_sources(sources: Sequence[str]) -> list[Source]:
    """The sources named as ``[NAME=]LOCATION[@WEIGHT]``.

    A location is a file, a folder, a glob, a URL, ``-`` for standard input, ``builtin``, or ``hf:NAME[:SPLIT]``. What
    exists under the whole text is taken for a location, whatever signs it holds. Raises ``UserError`` for what is not
    there, two sources of one name, and weights that are not above 0.
    """
    if not sources:
        raise UserError("no source is named: give a file, a folder, - or builtin")
    parsed = [_parse(text) for text in sources]
    if sum(source.location == STDIN for source in parsed) > 1:
        raise UserError("standard input (-) can be read only once")
    name, times = Counter(source.name for source in parsed).most_common(1)[0]
    if times > 1:
        location = next(source.location for source in parsed if source.name == name)
        raise UserError(
            f'{times} sources are called "{one_line(name)}": give each a name of its own, as in "other={location}"'
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
        raise UserError(f'the weight "{one_line(number)}" of "{one_line(text)}" is not a number above 0')
    return weight


def _is_there(location: str) -> bool:
    """Whether the whole of a text is a location; of globs and what lies elsewhere, going by how it is written."""
    if location in (BUILTIN, STDIN) or Path(location).is_file() or Path(location).is_dir():
        return True
    if location.startswith(HUGGING_FACE):
        return "@" not in location or Path(parse_hugging_face(location)[0]).exists()
    if is_remote(location):
        return NAME.match(location) is None and "@" not in location.rpartition("/")[2]
    return is_glob(location) and Path(root_of_glob(location)).is_dir() and "@" not in Path(location).name


def _refuse_missing(location: str) -> None:
    if is_glob(location) or is_remote(location):
        return  # parts_of says what is wrong
    if Path(location).exists():
        raise UserError(
            f'"{one_line(location)}" is neither a file nor a folder: pipe a program\'s text in and name the source "-"'
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


def parts_of(sources: Sequence[Source], settings: ReadSettings, stdin_copy: Path | None = None) -> list[Part]:
    """All parts in order: by source, then by path, then by place in a file. Lists files and their sizes.

    ``stdin_copy`` is where ``copy_stdin`` put standard input; without it that source gives no part yet. Raises
    ``UserError`` for a source in which there is nothing to read, and a named file that is empty or not text.
    """
    parts: list[Part] = []
    for index, source in enumerate(sources):
        parts.extend(_gathered(index, _spans_of_source(source, settings, stdin_copy), settings.part_bytes))
    return parts


def _gathered(source: int, spans: Iterator[tuple[Span, int]], part_bytes: int) -> Iterator[Part]:
    """Spans in a row as parts of up to ``part_bytes``, and at least one span."""
    waiting: list[Span] = []
    total = 0
    for span, size in spans:
        if waiting and total + size > part_bytes:
            yield Part(source, tuple(waiting), total)
            waiting, total = [], 0
        waiting.append(span)
        total += size
    if waiting:
        yield Part(source, tuple(waiting), total)


def _spans_of_source(source: Source, settings: ReadSettings, stdin_copy: Path | None) -> Iterator[tuple[Span, int]]:
    location = source.location
    if location == STDIN:
        if stdin_copy is not None:
            yield from _spans_of_file(str(stdin_copy), stdin_copy.stat().st_size, settings)
    elif location == BUILTIN or location.startswith(HUGGING_FACE):
        yield Span(location), 0
    elif is_glob(location):
        files = list_glob(location)
        if not files:
            raise UserError(f'no file matches "{one_line(location)}"')
        for path, size in files:
            yield from _spans_of_file(path, size, settings)
    elif is_folder(location):
        files = [(path, size) for path, size in list_folder(location) if _is_known(path)]
        if not files:
            raise _no_text_in(location)
        for path, size in files:
            yield from _spans_of_file(path, size, settings)
    else:
        known_size = size_of(location)
        _refuse_no_text(location, known_size)
        yield from _spans_of_file(location, known_size, settings)


def _spans_of_file(path: str, size: int | None, settings: ReadSettings) -> Iterator[tuple[Span, int]]:
    """The file's spans, of about equal size and at most ``part_bytes`` where it may come apart."""
    if not size:
        yield Span(path), 0
    elif kind_of(path) == PARQUET and size > settings.part_bytes:
        yield from _spans_of_parquet(path, size, settings.part_bytes)
    elif not _comes_apart(path, settings):
        # A packed file is read to its end, one that is not up to where it ended when it was listed.
        yield Span(path, 0, -1 if is_packed(path) or kind_of(path) in (CSV, PARQUET) else size), size
    else:
        count = -(-size // settings.part_bytes)
        borders = [size * number // count for number in range(count + 1)]
        for start, stop in itertools.pairwise(borders):
            yield Span(path, start, stop), stop - start


def _comes_apart(path: str, settings: ReadSettings) -> bool:
    if is_packed(path) or kind_of(path) in (CSV, PARQUET):
        return False
    if kind_of(path) == JSON_LINES:
        return True
    separator = parse_separator(settings.document_per)
    return settings.document_per != "file" if separator is None else is_local(separator)


def _spans_of_parquet(path: str, size: int, part_bytes: int) -> Iterator[tuple[Span, int]]:
    """Runs of row groups of up to ``part_bytes``; all of a file that cannot be opened, which its reader tells."""
    try:
        with open_raw(path) as file:
            groups = row_groups(file)
    except UnreadableError:
        groups = []
    if not groups:
        yield Span(path), size
        return
    start, total, left = 0, 0, size
    for number, group in enumerate(groups):
        if number > start and total + group > part_bytes:
            yield Span(path, start, number), total
            start, total, left = number, 0, left - total
        total += group
    yield Span(path, start, len(groups)), max(0, left)


def _is_known(path: str) -> bool:
    return unpacked_name(path).endswith(TEXT_SUFFIXES + RECORD_SUFFIXES) or path.endswith(PARQUET)


def _no_text_in(folder: str) -> UserError:
    looked_for = ", ".join(TEXT_SUFFIXES + RECORD_SUFFIXES)
    packed = ", ".join(PACKED_SUFFIXES)
    return UserError(
        f'no text in "{one_line(folder)}": looked for {looked_for} (also with {packed}) and {PARQUET} in it and the '
        "folders below"
    )


def _refuse_no_text(path: str, size: int | None) -> None:
    """Raise ``UserError`` early for a file that was named itself and is empty, unreadable or binary."""
    if size == 0:
        raise UserError(f'"{one_line(path)}" is empty')
    try:
        with open_stream(path) as stream:
            first = stream.peek()
    except UnreadableError as error:
        raise UserError(f'"{one_line(path)}" {error}: make it readable') from None
    if kind_of(path) != PARQUET:
        _refuse_binary(f'"{one_line(path)}"', first)


def _refuse_binary(name: str, first_block: bytes) -> None:
    refused = why_no_text(first_block)
    if refused:
        raise UserError(f"{name} {refused[1]}")


def describe(sources: Sequence[Source], parts: Sequence[Part]) -> list[dict[str, Any]]:
    """What identifies each source without reading it: name, weight and, where files are known, their number and size.

    Names are the last parts of paths, so that a dataset does not tell where on a machine it was made.
    """
    return [_describe(source, [part for part in parts if part.source == i]) for i, source in enumerate(sources)]


def _describe(source: Source, parts: Sequence[Part]) -> dict[str, Any]:
    described = {"name": source.name, "weight": source.weight}
    if source.location in (BUILTIN, STDIN) or source.location.startswith(HUGGING_FACE):
        return described
    files = {span.path for part in parts for span in part.spans}
    return described | {"files": len(files), "bytes": sum(part.bytes for part in parts)}


def first_texts(names: Sequence[str], most_bytes: int, reading: ReadSettings) -> Iterator[str]:
    """The first documents of some sources, up to ``most_bytes`` or a little more.

    Raises ``UserError`` as a build would, and for standard input.
    """
    problems = list(reading.check())
    if STDIN in names:
        problems.append("standard input (-) cannot be looked at here: name a file")
    if problems:
        raise UserError("\n".join(problems))
    sources = parse_sources(names)
    for part in parts_of(sources, reading):
        for document in read_part(part, sources, reading, ReadReport()):
            yield document.text
            most_bytes -= len(document.text)
            if most_bytes <= 0:
                return


def copy_stdin(file: IO[bytes]) -> None:
    """Copy standard input into an open file; raises ``UserError`` if it is empty or begins like no UTF-8 text."""
    first = True
    while block := sys.stdin.buffer.read(BLOCK_BYTES):
        if first:
            _refuse_binary("standard input", block)
        first = False
        file.write(block)
    file.flush()
    if first:
        raise UserError("standard input is empty")
