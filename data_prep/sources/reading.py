"""Read one part of the sources as documents, independently of all other parts."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import UserError
from data_prep.files import is_remote
from data_prep.settings import ReadSettings
from data_prep.sources.builtin_corpus import builtin_documents
from data_prep.sources.documents import (
    BINARY_FILE,
    BROKEN_RECORD,
    DAMAGED_FILE,
    EMPTY_DOCUMENT,
    EMPTY_FILE,
    MISNAMED_FILE,
    NOT_UTF8,
    NUL_BYTES,
    REPLACED,
    UNREADABLE_FILE,
    UTF16_FILE,
    CorpusPart,
    Document,
    FileRange,
    ReadReport,
    Source,
    one_line,
)
from data_prep.sources.formats import JSON, JSON_LINES, PARQUET, TABLES, TEXT, kind_by_rules, what_it_is
from data_prep.sources.records import (
    HALF,
    HUGGING_FACE,
    Record,
    known_fields,
    not_utf8,
    parse_hugging_face,
    records_of_dataset,
    records_of_json,
    records_of_json_lines,
    records_of_parquet,
    records_of_table,
)
from data_prep.sources.storage import (
    Stream,
    UnreadableError,
    is_glob,
    last_name,
    open_raw,
    open_stream,
    root_of_glob,
)
from data_prep.sources.text_files import (
    UTF8_MARK,
    boundary_at,
    cut_at_blank_lines,
    cut_at_separators,
    cut_by_size,
    decode,
    limited,
    normalize_newlines,
    paragraph_at,
    separator_reach,
    wide_encoding,
)

BUILTIN = "builtin"
STDIN = "-"
ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"}  # in --document-per
ESCAPE = re.compile(r"\\[nt\\]")
MOST_MESSAGES_PER_REASON = 3  # in one range, so that one bad file leaves room for the others
CONVERT = "convert it to UTF-8 text, or exclude it"
WHOLE_COPY = "get an intact copy, or exclude it"


def read_part(
    part: CorpusPart, sources: Sequence[Source], settings: ReadSettings, report: ReadReport
) -> Iterator[Document]:
    """Yield the documents of a part in order, and record in ``report`` what was read and skipped.

    The documents depend only on the part, the settings and the files. Raises ``UserError`` for an explicitly named file
    without readable content, and for invalid bytes if ``settings.errors`` is "stop". Everything else that cannot be
    read is skipped, counted and reported.
    """
    source = sources[part.source]
    for file_range in part.ranges:
        yield from _RangeReader(source, file_range, settings, report).documents()


def display_name(source: Source, path: str) -> str:
    """Return a file's name relative to its source, like ``folder/file.txt``, as one printable line."""
    if source.location == STDIN:
        return "stdin"
    if source.location in (BUILTIN, path):
        return one_line(last_name(path))
    root = root_of_glob(source.location) if is_glob(source.location) else source.location
    relative = path.removeprefix(root).lstrip("/") if is_remote(path) else Path(path).relative_to(root).as_posix()
    return one_line(f"{last_name(root)}/{relative}" if root else relative)


def parse_separator(settings: ReadSettings) -> bytes | None:
    """Return the separator between two documents of a text file, or None if there is none."""
    per = settings.document_per
    if per in ("size", "file") or (per == "paragraph" and settings.reading_rules > 1):
        return None
    if per == "line":
        return b"\n"
    if settings.reading_rules > 1:
        per = ESCAPE.sub(lambda match: ESCAPES[match[0]], per)
    return per.encode("utf-8")


def why_not_read(kind: str, first_block: bytes, reading_rules: int) -> tuple[str, str] | None:
    """Return why a file that begins like this is not of its kind: a reason and a predicate for messages, or None."""
    wide, nul = wide_encoding(first_block), first_block.find(b"\0")
    if wide:
        return UTF16_FILE, f"is {wide}, not UTF-8: convert it, for example with `iconv -f {wide} -t UTF-8 OLD > NEW`"
    if reading_rules > 1 and (other := what_it_is(kind, first_block)):
        return MISNAMED_FILE if nul < 0 else BINARY_FILE, other
    if nul >= 0:
        return BINARY_FILE, f"is not UTF-8 text (byte 0x00 at offset {nul}): {CONVERT}"
    return None


@dataclass
class _RangeReader:
    source: Source
    range: FileRange
    settings: ReadSettings
    report: ReadReport
    name: str = field(init=False)
    any_document: bool = field(default=False, init=False)
    problem: str = field(default="", init=False)  # the first problem, phrased as in an error message
    reported: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        self.name = display_name(self.source, self.range.path)

    def documents(self) -> Iterator[Document]:
        if self.source.location == BUILTIN:
            for name, text in builtin_documents():
                yield from self._cut(text, name)
        elif self.source.location.startswith(HUGGING_FACE):
            dataset, split = parse_hugging_face(self.source.location)
            field_name, errors = self.settings.text_field, self.settings.errors
            yield from self._of_records(records_of_dataset(dataset, split, field_name, errors), "row")
        else:
            try:
                yield from self._of_file()
            except UnreadableError as error:
                self._skip(UNREADABLE_FILE, f'"{self.name}" {error}', f"{error}: make it readable")
        if self.problem and self.range.start == 0 and not self.any_document and self._is_named():
            raise UserError(f"{self._own_name()} {self.problem}")

    def _is_named(self) -> bool:
        return self.source.location in (STDIN, self.range.path)

    def _own_name(self) -> str:
        if self.source.location == STDIN:
            return "standard input"
        if self.source.location.startswith(HUGGING_FACE):
            return f'the dataset "{self.source.location.removeprefix(HUGGING_FACE)}"'
        return f'"{one_line(self.range.path)}"'

    def _skip(self, reason: str, message: str, problem: str) -> None:
        """Count a skipped item and report it. ``problem`` follows the file's name if nothing else can be read."""
        self.report.count(reason)
        self.reported[reason] += 1
        if self.reported[reason] <= MOST_MESSAGES_PER_REASON:
            self.report.note(message)
        self.problem = self.problem or problem

    # Files

    def _of_file(self) -> Iterator[Document]:
        path, start, stop = self.range.path, self.range.start, self.range.stop
        kind = kind_by_rules(path, self.settings.reading_rules) or TEXT
        field_name, errors = self.settings.text_field, self.settings.errors
        if kind == PARQUET:
            with open_raw(path) as file:
                yield from self._of_records(records_of_parquet(file, field_name, errors, start, stop), "row")
            return
        with open_stream(path) as stream:
            first = stream.peek()
            if not self._is_readable(kind, first, stream):
                return
            whole = start == 0 and stop == -1  # compressed files, and others that cannot be read from the middle
            if kind == JSON_LINES:
                self._seek(stream, whole, max(0, start - 1))
                yield from self._of_records(records_of_json_lines(stream, field_name, errors, start, stop), "byte")
            elif kind == JSON:
                yield from self._of_records(records_of_json(stream, field_name, errors), "record")
            elif kind in TABLES:
                self._seek(stream, whole, 0)
                yield from self._of_records(records_of_table(stream, kind, field_name, errors), "line")
            else:
                yield from self._of_text(stream, whole)
            if stream.damage:
                self._skip(
                    DAMAGED_FILE,
                    f'"{self.name}" is damaged ({stream.damage}): only the intact part before the damage is used',
                    f"is damaged ({stream.damage}): {WHOLE_COPY}",
                )

    def _seek(self, stream: Stream, whole: bool, position: int) -> None:
        if not whole:
            stream.seek(position)

    def _is_readable(self, kind: str, first: bytes, stream: Stream) -> bool:
        """Return whether a file may be of its kind, by its first block. Only the first range reports why not."""
        refused = why_not_read(kind, first, self.settings.reading_rules)
        if first and not refused:
            return True
        if self.range.start > 0:
            return False
        if refused:
            reason, problem = refused
            self._skip(reason, f'"{self.name}" {problem}', problem)
        elif stream.damage:
            problem = f"is damaged ({stream.damage}): {WHOLE_COPY}"
            self._skip(DAMAGED_FILE, f'"{self.name}" {problem}', problem)
        else:
            self._skip(EMPTY_FILE, f'"{self.name}" is empty', "is empty")
        return False

    # Text

    def _of_text(self, stream: Stream, whole: bool) -> Iterator[Document]:
        end = 0
        for offset, piece in self._pieces(stream, whole):
            self.report.separators += offset > end
            end = offset + len(piece)
            text, size = self._text_of(offset, piece.removeprefix(UTF8_MARK) if offset == 0 else piece, stream)
            if text is not None:
                self.report.count_text(text, size)
                yield from self._document(text, f"{self.name}:{offset}", size)

    def _pieces(self, stream: Stream, whole: bool) -> Iterator[tuple[int, bytes]]:
        separator = parse_separator(self.settings)
        start, stop, most = self.range.start, self.range.stop, self.settings.max_document_bytes
        if separator is not None:
            self._seek(stream, whole, max(0, start - separator_reach(separator)))
            yield from cut_at_separators(stream.blocks(), separator, most, start=start, stop=stop)
            return
        by_paragraph = self.settings.document_per == "paragraph"
        start_at = paragraph_at if by_paragraph else boundary_at
        begin = start_at(stream.file, start, most) if start > 0 else 0
        end = start_at(stream.file, stop, most) if stop >= 0 else None
        self._seek(stream, whole, begin)
        blocks = stream.blocks() if end is None else limited(stream.blocks(), end - begin)
        for offset, piece in (cut_at_blank_lines if by_paragraph else cut_by_size)(blocks, most):
            yield begin + offset, piece

    def _text_of(self, offset: int, piece: bytes, stream: Stream) -> tuple[str | None, int]:
        """Return the text of a piece, or None if it is not text, and the size of the text in bytes."""
        if b"\0" in piece:
            found = f"NUL at offset {offset + piece.index(0)}"
            self._skip(NUL_BYTES, f'"{self.name}", byte {offset}: {found}', f"is not text ({found}): {CONVERT}")
            return None, 0
        text = normalize_newlines(piece)
        try:
            return text.decode("utf-8"), len(text)
        except UnicodeDecodeError as error:
            if stream.damage and error.reason == "unexpected end of data":  # the data ends in the middle of a character
                return text[: error.start].decode("utf-8"), error.start
        _, bad = decode(piece, "skip")
        self._not_utf8(f"byte {offset}", not_utf8(piece[bad], offset + bad))
        if self.settings.errors != "replace":
            return None, 0
        replaced = text.decode("utf-8", "replace")
        return replaced, len(replaced.encode("utf-8"))

    def _not_utf8(self, position: str, why: str) -> None:
        """Handle bytes that are not UTF-8 as the settings say: stop, or count and report them."""
        if self.settings.errors == "stop":
            raise UserError(f'"{self.name}", {position}: {why}: {CONVERT}, or choose --errors skip or --errors replace')
        replaced = self.settings.errors == "replace"
        message = f'"{self.name}", {position}: {why}{", replaced" if replaced else ""}'
        self._skip(REPLACED if replaced else NOT_UTF8, message, f"is {why}: {CONVERT}")

    def _document(self, text: str, origin: str, size: int) -> Iterator[Document]:
        """Yield the document of a text of ``size`` bytes, or nothing if it is only whitespace."""
        if not text or text.isspace():
            self.report.count(EMPTY_DOCUMENT)
            return
        self.any_document = True
        self.report.documents += 1
        self.report.text_bytes += size
        yield Document(text, origin)

    # Records

    def _of_records(self, records: Iterable[Record], unit: str) -> Iterator[Document]:
        fields: dict[str, None] = {}
        holds: dict[str, None] = {}
        any_text = False
        for record in map(self._by_the_rules, records):
            fields.update(dict.fromkeys(record.fields))
            holds.update(dict.fromkeys([record.holds] if record.holds else []))
            if record.text is not None:
                any_text = True
                yield from self._cut(record.text, f"{self.name}:{record.number}")
            if record.reason == NOT_UTF8:
                self._not_utf8(f"{unit} {record.number}", record.why)
            elif record.reason:
                message = f'"{self.name}", {unit} {record.number}: {record.why}'
                self._skip(record.reason, message, f"contains no valid record: {unit} {record.number}: {record.why}")
        if fields and not any_text and self.range.start == 0:
            self.problem = self._no_such_field(fields, holds)
            self.report.note(f'"{self.name}" {self.problem}')

    def _by_the_rules(self, record: Record) -> Record:
        """Apply this build's rules to a record: a text that contains NUL is not text, as in text files."""
        if self.settings.reading_rules > 1:
            if record.text is not None and "\0" in record.text:
                return Record(record.number, None, NUL_BYTES, f"NUL at character {record.text.index(chr(0))}")
        elif record.why.startswith(HALF):
            return Record(record.number, None, BROKEN_RECORD, record.why)
        return record

    def _no_such_field(self, fields: Iterable[str], holds: Iterable[str]) -> str:
        wanted = self.settings.text_field
        others = [name for name in fields if name != wanted]
        known = f"its fields are {known_fields(others)}; choose one with --text-field"
        if not any(holds):
            return f'has no text in the field "{wanted}": {known}'
        return f'has no text in "{wanted}": it holds {" and ".join(holds)}' + (f"; {known}" if others else "")

    def _cut(self, text: str, origin: str) -> Iterator[Document]:
        """Yield the documents that a text of any length is cut into."""
        data = normalize_newlines(text.encode("utf-8"))
        for _, piece in cut_by_size([data], self.settings.max_document_bytes):
            yield from self._document(piece.decode("utf-8"), origin, len(piece))
        if not data:
            self.report.count(EMPTY_DOCUMENT)
