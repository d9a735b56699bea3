"""One part of the sources as documents: every part by itself, whoever reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_prep.errors import UserError
from data_prep.sources.builtin_corpus import builtin_documents
from data_prep.sources.documents import (
    BINARY_FILE,
    DAMAGED_FILE,
    EMPTY_DOCUMENT,
    EMPTY_FILE,
    NOT_UTF8,
    NUL_BYTES,
    REPLACED,
    UNREADABLE_FILE,
    UTF16_FILE,
    Document,
    Part,
    ReadReport,
    ReadSettings,
    Source,
    Span,
    one_line,
)
from data_prep.sources.records import (
    HUGGING_FACE,
    UTF8_MARK,
    Record,
    known_fields,
    not_utf8,
    parse_hugging_face,
    records_of_csv,
    records_of_dataset,
    records_of_json_lines,
    records_of_parquet,
)
from data_prep.sources.storage import (
    PACKED_SUFFIXES,
    Stream,
    UnreadableError,
    is_glob,
    is_remote,
    last_name,
    open_raw,
    open_stream,
    root_of_glob,
)
from data_prep.sources.text_files import (
    border_at,
    cut_at_separators,
    cut_by_size,
    decode,
    limited,
    separator_reach,
    wide_encoding,
    with_equal_newlines,
)

BUILTIN = "builtin"
STDIN = "-"
JSON_LINES, CSV, PARQUET = ".jsonl", ".csv", ".parquet"
MOST_TOLD_OF_A_KIND = 3  # of one reason in one span, so that one bad file leaves room for the others
CONVERT = "convert it to UTF-8 text, or leave it out"
WHOLE_COPY = "get a whole copy, or leave it out"


def read_part(part: Part, sources: Sequence[Source], settings: ReadSettings, report: ReadReport) -> Iterator[Document]:
    """The documents of a part in order; ``report`` is filled on the way.

    They follow from the part, the settings and the files alone. Raises ``UserError`` for a file that was named itself
    and holds nothing that can be read, and for what ``settings.errors`` says to stop at; other things are left out,
    counted and told.
    """
    source = sources[part.source]
    for span in part.spans:
        yield from _SpanReader(source, span, settings, report).documents()


def place_of(source: Source, path: str) -> str:
    """A file's name from its source on, like ``folder/file.txt``, in one line, without where that lies."""
    if source.location == STDIN:
        return "stdin"
    if source.location in (BUILTIN, path):
        return one_line(last_name(path))
    root = root_of_glob(source.location) if is_glob(source.location) else source.location
    relative = path.removeprefix(root).lstrip("/") if is_remote(path) else Path(path).relative_to(root).as_posix()
    return one_line(f"{last_name(root)}/{relative}" if root else relative)


def kind_of(path: str) -> str:
    """The suffix that says how a file is read, without that of its packing."""
    return Path(unpacked_name(path)).suffix


def unpacked_name(path: str) -> str:
    """A file's name without the suffix of its packing."""
    return path[: -len(Path(path).suffix)] if is_packed(path) else path


def is_packed(path: str) -> bool:
    return Path(path).suffix in PACKED_SUFFIXES


def parse_separator(document_per: str) -> bytes | None:
    """What stands between two documents of a text file, as bytes; ``None`` where its size says what is one."""
    if document_per in ("size", "file"):
        return None
    return b"\n" if document_per == "line" else document_per.encode("utf-8")


def why_no_text(first_block: bytes) -> tuple[str, str] | None:
    """The reason, and the sentence after the file's name, if a file that begins so is no UTF-8 text."""
    wide, nul = wide_encoding(first_block), first_block.find(b"\0")
    if wide:
        return UTF16_FILE, f"is {wide}, not UTF-8: convert it, as with `iconv -f {wide} -t UTF-8 OLD > NEW`"
    if nul >= 0:
        return BINARY_FILE, f"is not UTF-8 text (byte 0x00 at offset {nul}): {CONVERT}"
    return None


@dataclass
class _SpanReader:
    source: Source
    span: Span
    settings: ReadSettings
    report: ReadReport
    name: str = field(init=False)
    any_document: bool = field(default=False, init=False)
    problem: str = field(default="", init=False)  # the first thing that was left out, as an error would say it
    told: Counter[str] = field(default_factory=Counter, init=False)

    def __post_init__(self) -> None:
        self.name = place_of(self.source, self.span.path)

    def documents(self) -> Iterator[Document]:
        if self.source.location == BUILTIN:
            for name, text in builtin_documents():
                yield from self._cut(text, name)
        elif self.source.location.startswith(HUGGING_FACE):
            dataset, split = parse_hugging_face(self.source.location)
            yield from self._of_records(records_of_dataset(dataset, split, self.settings.text_field), "row")
        else:
            try:
                yield from self._of_file()
            except UnreadableError as error:
                self._leave_out(UNREADABLE_FILE, f'"{self.name}" {error}', f"{error}: make it readable")
        if self.problem and self.span.start == 0 and not self.any_document and self._is_named():
            raise UserError(f"{self._own_name()} {self.problem}")

    def _is_named(self) -> bool:
        return self.source.location in (STDIN, self.span.path)

    def _own_name(self) -> str:
        if self.source.location == STDIN:
            return "standard input"
        if self.source.location.startswith(HUGGING_FACE):
            return f'the dataset "{self.source.location.removeprefix(HUGGING_FACE)}"'
        return f'"{one_line(self.span.path)}"'

    def _leave_out(self, reason: str, message: str, problem: str) -> None:
        """Count a thing that is left out and tell of it; ``problem`` goes after the file's name if nothing else is."""
        self.report.count(reason)
        self.told[reason] += 1
        if self.told[reason] <= MOST_TOLD_OF_A_KIND:
            self.report.tell(message)
        self.problem = self.problem or problem

    # Files

    def _of_file(self) -> Iterator[Document]:
        path, start, stop = self.span.path, self.span.start, self.span.stop
        kind, field_name, errors = kind_of(path), self.settings.text_field, self.settings.errors
        if kind == PARQUET:
            with open_raw(path) as file:
                yield from self._of_records(records_of_parquet(file, field_name, errors, start, stop), "row")
            return
        with open_stream(path) as stream:
            first = stream.peek()
            if not self._is_text(first, stream):
                return
            whole = start == 0 and stop == -1  # packed files, and others that cannot be read from the middle
            if kind == JSON_LINES:
                self._stand_at(stream, whole, max(0, start - 1))
                yield from self._of_records(records_of_json_lines(stream, field_name, errors, start, stop), "byte")
            elif kind == CSV:
                self._stand_at(stream, whole, 0)
                yield from self._of_records(records_of_csv(stream, field_name, errors), "line")
            else:
                yield from self._of_text(stream, whole)
            if stream.damage:
                self._leave_out(
                    DAMAGED_FILE,
                    f'"{self.name}" is damaged ({stream.damage}): what was whole before the damage is used',
                    f"is damaged ({stream.damage}): {WHOLE_COPY}",
                )

    def _stand_at(self, stream: Stream, whole: bool, position: int) -> None:
        if not whole:
            stream.seek(position)

    def _is_text(self, first: bytes, stream: Stream) -> bool:
        """Whether a file may be text by its first block. Every span looks, and only the first one tells."""
        refused = why_no_text(first)
        if first and not refused:
            return True
        if self.span.start > 0:
            return False
        if refused:
            reason, problem = refused
            self._leave_out(reason, f'"{self.name}" {problem}', problem)
        elif stream.damage:
            problem = f"is damaged ({stream.damage}): {WHOLE_COPY}"
            self._leave_out(DAMAGED_FILE, f'"{self.name}" {problem}', problem)
        else:
            self._leave_out(EMPTY_FILE, f'"{self.name}" is empty', "is empty")
        return False

    # Text

    def _of_text(self, stream: Stream, whole: bool) -> Iterator[Document]:
        for offset, piece in self._pieces(stream, whole):
            text, size = self._text_of(offset, piece.removeprefix(UTF8_MARK) if offset == 0 else piece, stream)
            if text is not None:
                yield from self._document(text, f"{self.name}:{offset}", size)

    def _pieces(self, stream: Stream, whole: bool) -> Iterator[tuple[int, bytes]]:
        separator = parse_separator(self.settings.document_per)
        start, stop, most = self.span.start, self.span.stop, self.settings.max_document_bytes
        if separator is not None:
            self._stand_at(stream, whole, max(0, start - separator_reach(separator)))
            yield from cut_at_separators(stream.blocks(), separator, most, start=start, stop=stop)
            return
        begin = border_at(stream.file, start, most) if start > 0 else 0
        end = border_at(stream.file, stop, most) if stop >= 0 else None
        self._stand_at(stream, whole, begin)
        blocks = stream.blocks() if end is None else limited(stream.blocks(), end - begin)
        for offset, piece in cut_by_size(blocks, most):
            yield begin + offset, piece

    def _text_of(self, offset: int, piece: bytes, stream: Stream) -> tuple[str | None, int]:
        """A piece's text, if it is text, and the text's size in bytes."""
        if b"\0" in piece:
            found = f"NUL at offset {offset + piece.index(0)}"
            self._leave_out(NUL_BYTES, f'"{self.name}", byte {offset}: {found}', f"is no text ({found}): {CONVERT}")
            return None, 0
        text = with_equal_newlines(piece)
        try:
            return text.decode("utf-8"), len(text)
        except UnicodeDecodeError as error:
            if stream.damage and error.reason == "unexpected end of data":  # what comes last is half a character
                return text[: error.start].decode("utf-8"), error.start
        _, bad = decode(piece, "skip")
        self._not_utf8(f"byte {offset}", not_utf8(piece[bad], offset + bad))
        if self.settings.errors != "replace":
            return None, 0
        replaced = text.decode("utf-8", "replace")
        return replaced, len(replaced.encode("utf-8"))

    def _not_utf8(self, place: str, why: str) -> None:
        """Do with bytes that are no UTF-8 as the settings say: stop, or count and tell."""
        if self.settings.errors == "stop":
            raise UserError(f'"{self.name}", {place}: {why}: {CONVERT}, or choose --errors skip or --errors replace')
        replaced = self.settings.errors == "replace"
        message = f'"{self.name}", {place}: {why}{", replaced" if replaced else ""}'
        self._leave_out(REPLACED if replaced else NOT_UTF8, message, f"is {why}: {CONVERT}")

    def _document(self, text: str, place: str, size: int) -> Iterator[Document]:
        """The document of a text of ``size`` bytes; none if it is white space."""
        if not text or text.isspace():
            self.report.count(EMPTY_DOCUMENT)
            return
        self.any_document = True
        self.report.documents += 1
        self.report.text_bytes += size
        yield Document(text, place)

    # Records

    def _of_records(self, records: Iterable[Record], unit: str) -> Iterator[Document]:
        fields: dict[str, None] = {}
        any_text = False
        for record in records:
            fields.update(dict.fromkeys(record.fields))
            if record.text is not None:
                any_text = True
                yield from self._cut(record.text, f"{self.name}:{record.number}")
            if record.reason == NOT_UTF8:
                self._not_utf8(f"{unit} {record.number}", record.why)
            elif record.reason:
                message = f'"{self.name}", {unit} {record.number}: {record.why}'
                self._leave_out(record.reason, message, f"holds no record: {unit} {record.number}: {record.why}")
        if fields and not any_text and self.span.start == 0:
            self.problem = self._no_such_field(fields)
            self.report.tell(f'"{self.name}" {self.problem}')

    def _no_such_field(self, fields: Iterable[str]) -> str:
        wanted = self.settings.text_field
        return (
            f'has no text in the field "{wanted}": its fields are {known_fields(fields)}; choose one with --text-field'
        )

    def _cut(self, text: str, place: str) -> Iterator[Document]:
        """The documents of a text of any length."""
        data = with_equal_newlines(text.encode("utf-8"))
        for _, piece in cut_by_size([data], self.settings.max_document_bytes):
            yield from self._document(piece.decode("utf-8"), place, len(piece))
        if not data:
            self.report.count(EMPTY_DOCUMENT)
