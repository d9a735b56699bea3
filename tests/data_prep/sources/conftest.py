"""What the tests of sources share: reading them in several ways, and files to read."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import zstandard

from data_prep.settings import ReadSettings
from data_prep.sources.documents import Document, ReadReport
from data_prep.sources.listing import parse_sources, parts_of
from data_prep.sources.reading import read_part
from data_prep.sources.storage import Stream

PACKERS: dict[str, Any] = {
    ".gz": gzip.compress,
    ".bz2": lambda content: bz2.compress(content, 1),  # in blocks of 100 kB
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


def read(*names: object, **options: Any) -> tuple[list[Document], ReadReport]:
    """All documents of the sources, every part read twice, the second time last part first."""
    sources, read_settings = parse_sources([str(name) for name in names]), ReadSettings(**options)
    parts = parts_of(sources, read_settings)
    report = ReadReport()
    documents = []
    for part in parts:
        of_part = ReadReport()
        documents.append(list(read_part(part, sources, read_settings, of_part)))
        report.merge(of_part)
    for number in reversed(range(len(parts))):
        part = parts[number]
        assert list(read_part(part, sources, read_settings, ReadReport())) == documents[number]
    found = [document for of_part in documents for document in of_part]
    assert (report.documents, report.text_bytes) == (len(found), sum(len(d.text.encode()) for d in found))
    return found, report


def texts(*names: object, **options: Any) -> list[str]:
    return [document.text for document in read(*names, **options)[0]]


def write_records(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


class SmallBlocks(Stream):
    """A stream in blocks of a few bytes, so that everything crosses them."""

    def __init__(self, file: IO[bytes], most: int = 5) -> None:
        super().__init__(file, "x")
        self.most = most

    def blocks(self, size: int = 0) -> Iterator[bytes]:
        return super().blocks(self.most)
