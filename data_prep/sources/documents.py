"""What reading works with: sources, the parts they are divided into, documents, and a report of what was skipped."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

MOST_MESSAGES = 20
MOST_COUNTED = 1000  # documents of text files whose paragraphs are counted, in each part

# Why something was skipped: the keys of ``ReadReport.counts``.
EMPTY_DOCUMENT = "empty document"
NOT_UTF8 = "not UTF-8"
REPLACED = "not UTF-8, replaced"  # the document was kept
NUL_BYTES = "NUL bytes"
BROKEN_RECORD = "broken record"
NO_TEXT_IN_FIELD = "no text in the field"
RECORD_TOO_LONG = "record too long"
BINARY_FILE = "binary file"
MISNAMED_FILE = "file of another kind than its name says"
UTF16_FILE = "file with UTF-16"
EMPTY_FILE = "empty file"
DAMAGED_FILE = "damaged file"
UNREADABLE_FILE = "unreadable file"


@dataclass(frozen=True)
class Source:
    """Something to read: ``location`` is a path, a glob, a URL, "-", "builtin" or "hf:…"."""

    name: str
    location: str
    weight: float = 1.0


@dataclass(frozen=True)
class FileRange:
    """A range of a file: bytes for text and .jsonl, row groups for .parquet. A ``stop`` of -1 means the end.

    Byte ranges are nominal: a document belongs to the range in which it begins.
    """

    path: str
    start: int = 0
    stop: int = -1


@dataclass(frozen=True)
class CorpusPart:
    """What one worker reads at a time. ``bytes`` is the size of the file ranges, 0 if unknown."""

    source: int
    ranges: tuple[FileRange, ...]
    bytes: int


@dataclass(frozen=True, slots=True)
class Document:
    """One training text. ``origin`` says where it came from, for example ``folder/file.txt:81234``.

    The number is the offset of its first byte (after decompression) in text and .jsonl files, the line (from 1) in
    .csv files, and the row (from 1) in .parquet files and datasets.
    """

    text: str
    origin: str


@dataclass
class ReadReport:
    """What was read and what was skipped. ``messages`` describes the first skipped items, one sentence each.

    The last five are about text files: documents and their bytes, separators between them, and paragraphs and lines of
    the first ``MOST_COUNTED`` documents.
    """

    documents: int = 0
    text_bytes: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    text_documents: int = 0
    text_document_bytes: int = 0
    separators: int = 0
    paragraphs: int = 0
    lines: int = 0

    def count(self, reason: str) -> None:
        """Count one skipped item."""
        self.counts[reason] = self.counts.get(reason, 0) + 1

    def count_text(self, text: str, size: int) -> None:
        """Count a document of ``size`` bytes from a text file."""
        self.text_documents += 1
        self.text_document_bytes += size
        if self.text_documents <= MOST_COUNTED:
            self.paragraphs += sum(not paragraph.isspace() and paragraph != "" for paragraph in text.split("\n\n"))
            self.lines += text.count("\n") + (not text.endswith("\n"))

    def note(self, message: str) -> None:
        """Keep a message, up to ``MOST_MESSAGES``."""
        if len(self.messages) < MOST_MESSAGES:
            self.messages.append(message)

    def merge(self, other: ReadReport) -> None:
        """Add the report of another part. Merging in the order of the parts gives the same result every time."""
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.text_documents += other.text_documents
        self.text_document_bytes += other.text_document_bytes
        self.separators += other.separators
        self.paragraphs += other.paragraphs
        self.lines += other.lines
        self.counts = dict(Counter(self.counts) + Counter(other.counts))
        for message in other.messages:
            self.note(message)


def one_line(name: str) -> str:
    """Return a name as one printable line, with quotes, backslashes and unprintable characters escaped."""
    if name.isprintable() and '"' not in name and "\\" not in name:
        return name
    return "".join(_escaped(character) for character in name)


def _escaped(character: str) -> str:
    if character == '"':
        return '\\"'
    if character == "\\" or not character.isprintable():
        return character.encode("unicode_escape").decode("ascii")
    return character
