"""The words of reading: how to read, what to read, what came out of it and what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

DEFAULT_MAX_DOCUMENT_BYTES = 65536
SMALLEST_MAX_DOCUMENT_BYTES = 16  # room for any character, and a line or two
DEFAULT_PART_BYTES = 64 * 2**20
DOCUMENT_PER = ("size", "file", "line")
ERRORS = ("skip", "replace", "stop")
MOST_MESSAGES = 20

# Why something was left out: the keys of ``ReadReport.counts``.
EMPTY_DOCUMENT = "empty document"
NOT_UTF8 = "not UTF-8"
REPLACED = "not UTF-8, replaced"  # the document was kept
NUL_BYTES = "NUL bytes"
BROKEN_RECORD = "broken record"
NO_TEXT_IN_FIELD = "no text in the field"
RECORD_TOO_LONG = "record too long"
BINARY_FILE = "binary file"
UTF16_FILE = "file with UTF-16"
EMPTY_FILE = "empty file"
DAMAGED_FILE = "damaged file"
UNREADABLE_FILE = "unreadable file"


@dataclass(frozen=True)
class ReadSettings:
    """How files become documents. All of it changes the result."""

    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES
    #: What is one document of a text file: "size" (a file, cut at blank lines if it is long), "file" (the same, but the
    #: cuts follow from the file alone, at the price that one part reads all of it), "line", or any other text: what
    #: stands between two documents, and is dropped. Whatever is longer than ``max_document_bytes`` is cut.
    document_per: str = "size"
    #: The column with the text in .jsonl, .csv, .parquet and Hugging Face datasets.
    text_field: str = "text"
    #: Bytes that are no UTF-8: "skip" leaves the document out, "replace" puts U+FFFD, "stop" raises ``UserError``.
    errors: str = "skip"
    #: How many bytes of files one part should hold.
    part_bytes: int = DEFAULT_PART_BYTES

    def check(self) -> Iterator[str]:
        """One sentence for each setting that cannot be."""
        if self.max_document_bytes < SMALLEST_MAX_DOCUMENT_BYTES:
            yield f"--max-document-bytes must be at least {SMALLEST_MAX_DOCUMENT_BYTES}"
        if not self.document_per:
            yield f"--document-per is empty: choose {', '.join(DOCUMENT_PER)}, or the text between two documents"
        elif "\0" in self.document_per or "\r" in self.document_per:
            yield "--document-per cannot hold NUL or carriage return: write newlines as \\n, they match every kind"
        if not self.text_field:
            yield "--text-field is empty: name the column that holds the text"
        if self.errors not in ERRORS:
            yield f'unknown --errors "{self.errors}": choose one of {", ".join(ERRORS)}'
        if self.part_bytes < 1:
            yield "--part-bytes must be at least 1"


@dataclass(frozen=True)
class Source:
    """Something to read, as the user named it: ``location`` is a path, a glob, a URL, "-", "builtin" or "hf:…"."""

    name: str
    location: str
    weight: float = 1.0


@dataclass(frozen=True)
class Span:
    """A run of a file: bytes for text and .jsonl, row groups for .parquet. A ``stop`` of -1 is the end.

    The borders of bytes are nominal: a document belongs to the span in which it begins.
    """

    path: str
    start: int = 0
    stop: int = -1


@dataclass(frozen=True)
class Part:
    """What one worker reads at a time. ``bytes`` is the size in the files, 0 where it is not known."""

    source: int
    spans: tuple[Span, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Document:
    """One text to learn from. ``place`` says where it was, like ``folder/file.txt:81234``.

    The number is the offset of its first byte (after unpacking) in text and .jsonl files, the line (from 1) in .csv
    files, and the row (from 1) in .parquet files and datasets.
    """

    text: str
    place: str


@dataclass
class ReadReport:
    """What was read and what was left out. ``messages`` tells of the first things left out, a sentence each."""

    documents: int = 0
    text_bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def count(self, reason: str) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def tell(self, message: str) -> None:
        if len(self.messages) < MOST_MESSAGES:
            self.messages.append(message)

    def merge(self, other: ReadReport) -> None:
        """Add what another part's report says; called in the order of the parts, it gives the same every time."""
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.counts = dict(Counter(self.counts) + Counter(other.counts))
        for message in other.messages:
            self.tell(message)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> ReadReport:
        return cls(**record)


def one_line(name: str) -> str:
    """A name as one printable line: quotes, backslashes, newlines and all that cannot be shown are escaped."""
    if name.isprintable() and '"' not in name and "\\" not in name:
        return name
    return "".join(_escaped(character) for character in name)


def _escaped(character: str) -> str:
    if character == '"':
        return '\\"'
    if character == "\\" or not character.isprintable():
        return character.encode("unicode_escape").decode("ascii")
    return character
