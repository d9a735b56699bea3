"""Documents out of whatever the user names: files, folders, standard input, the built-in corpus, Hugging Face datasets.

Everything is read a block at a time, in an order that depends on names only, and may be read again with the same
result. Text is passed on as it is, except that newlines become ``\\n`` and long texts are cut into several documents.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from data_prep.builtin_corpus import builtin_documents
from data_prep.errors import UserError
from data_prep.textfiles import (
    NotTextError,
    check_text_file,
    checked,
    cut_text,
    read_blocks,
    read_lines,
    read_text_blocks,
    with_equal_newlines,
)

TEXT_SUFFIXES = (".txt", ".md")
RECORD_SUFFIXES = (".jsonl",)
BUILTIN = "builtin"
STDIN = "-"
HUGGING_FACE = "hf:"
DEFAULT_MAX_DOCUMENT_BYTES = 65536
SMALLEST_MAX_DOCUMENT_BYTES = 16  # room for any character, and a line or two
MOST_MESSAGES = 20


@dataclass(frozen=True)
class Document:
    """One text to learn from; ``number`` counts the documents of its file from 0."""

    text: str
    source: str
    number: int


@dataclass
class ReadReport:
    """What was read and what was skipped. ``messages`` tells of the first skipped things, one line each."""

    files: int = 0
    documents: int = 0
    text_bytes: int = 0
    skipped_empty_documents: int = 0
    skipped_binary_files: int = 0
    skipped_lines: int = 0
    messages: list[str] = field(default_factory=list)

    def tell(self, message: str) -> None:
        if len(self.messages) < MOST_MESSAGES:
            self.messages.append(message)


def read_documents(
    sources: Sequence[str],
    *,
    max_document_bytes: int = DEFAULT_MAX_DOCUMENT_BYTES,
    text_field: str = "text",
    report: ReadReport,
) -> Iterator[Document]:
    """The documents of all sources in order; ``report`` is filled while they are read.

    A source is a file, a folder, ``-`` for standard input, ``builtin``, or ``hf:NAME[:SPLIT]``. ``text_field`` names
    the text in records. Raises ``UserError`` for what cannot be read; in a folder, binary files are skipped instead.
    """
    reader = _Reader(max_document_bytes, text_field, report)
    for source in sources:
        yield from reader.read(source)


@dataclass(frozen=True)
class _Reader:
    max_document_bytes: int
    text_field: str
    report: ReadReport

    def read(self, source: str) -> Iterator[Document]:
        if source == BUILTIN:
            yield from self._builtin()
        elif source == STDIN:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "stdin.txt"
                with path.open("wb") as file:
                    copy_stdin(file)
                yield from self._text_file(path, "stdin")
        elif source.startswith(HUGGING_FACE):
            yield from self._hugging_face(source)
        elif Path(source).is_dir():
            yield from self._folder(Path(source))
        else:
            yield from self._named_file(_existing_file(source))

    def _documents(self, texts: Iterable[Iterable[str]], source: str) -> Iterator[Document]:
        """Cut each text (given in blocks) into documents, count them, and leave out those that are white space."""
        number = 0
        for blocks in texts:
            for piece in cut_text(blocks, self.max_document_bytes):
                if not piece.strip():
                    self.report.skipped_empty_documents += 1
                    continue
                self.report.documents += 1
                self.report.text_bytes += len(piece.encode("utf-8"))
                yield Document(piece, source, number)
                number += 1

    def _builtin(self) -> Iterator[Document]:
        for name, text in builtin_documents():
            self.report.files += 1
            yield from self._documents([[text]], name)

    def _named_file(self, path: Path) -> Iterator[Document]:
        if path.stat().st_size == 0:
            raise UserError(f'"{path}" is empty')
        try:
            check_text_file(path)
        except NotTextError as error:
            raise UserError(f'"{path}" {error}: {error.mend}') from None
        yield from self._file(path, str(path))

    def _folder(self, folder: Path) -> Iterator[Document]:
        before = self.report.documents
        for path in text_files_of_folder(folder):
            try:
                check_text_file(path)
            except NotTextError as error:
                self.report.skipped_binary_files += 1
                self.report.tell(f'"{path}" {error}')
                continue
            yield from self._file(path, path.relative_to(folder).as_posix())
        if self.report.documents == before:
            raise _no_text_in(folder)

    def _file(self, path: Path, name: str) -> Iterator[Document]:
        return self._record_file(path, name) if _is_record_file(path) else self._text_file(path, name)

    def _text_file(self, path: Path, name: str) -> Iterator[Document]:
        self.report.files += 1
        return self._documents([read_text_blocks(path)], name)

    def _record_file(self, path: Path, name: str) -> Iterator[Document]:
        self.report.files += 1
        return self._documents(([text] for text in self._texts_of_records(path)), name)

    def _texts_of_records(self, path: Path) -> Iterator[str]:
        """The text of each good line. Bad lines are counted; a file with bad lines only raises ``UserError``."""
        any_text = False
        fields: dict[str, None] = {}
        problem = ""
        for number, line in enumerate(read_lines(path), start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if isinstance(record, dict):
                    fields.update(dict.fromkeys(record))
                yield with_equal_newlines(_text_of_record(record, self.text_field))
                any_text = True
            except (ValueError, RecursionError) as error:
                problem = f'"{path}", line {number}: {error}'
                self.report.skipped_lines += 1
                self.report.tell(problem)
        if fields and not any_text:
            raise UserError(_no_such_field(f'"{path}"', self.text_field, fields))
        if problem and not any_text:
            raise UserError(f'no line of "{path}" is a JSON record; the last problem: {problem}')

    def _hugging_face(self, source: str) -> Iterator[Document]:
        name, split = _parse_hugging_face(source)
        self.report.files += 1
        yield from self._documents(([text] for text in self._texts_of_dataset(name, split)), source)

    def _texts_of_dataset(self, name: str, split: str) -> Iterator[str]:
        any_text = False
        for number, row in enumerate(_rows_of_dataset(name, split)):
            try:
                yield with_equal_newlines(_text_of_record(row, self.text_field))
                any_text = True
            except ValueError as error:
                if not any_text and self.text_field not in row:
                    raise UserError(_no_such_field(f'the dataset "{name}"', self.text_field, row)) from None
                self.report.skipped_lines += 1
                self.report.tell(f'"{name}", row {number}: {error}')


def _rows_of_dataset(name: str, split: str) -> Iterator[dict[str, Any]]:
    import datasets  # here, because it takes seconds

    try:
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the library raises anything, from ValueError to errors of its network client
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f'cannot read the dataset "{name}", split "{split}": {reason}') from error


def _no_such_field(where: str, text_field: str, fields: Iterable[str]) -> str:
    names = ", ".join(f'"{name}"' for name in list(fields)[:MOST_MESSAGES])
    return f'{where} has no text in the field "{text_field}": its fields are {names}; choose one with --text-field'


def _text_of_record(record: Any, text_field: str) -> str:
    """The text in a record's field; raises ``ValueError`` with the reason if there is none."""
    if not isinstance(record, dict):
        raise ValueError("not a JSON object")
    text = record.get(text_field)
    if not isinstance(text, str):
        raise ValueError(f'no text in the field "{text_field}"')
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text holds half of a surrogate pair") from None
    return text


def _existing_file(source: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if path.exists():
        raise UserError(f'"{source}" is neither a file nor a folder: pipe a program\'s text in and name the source "-"')
    raise UserError(f'there is no file or folder "{source}"')


def _no_text_in(folder: Path) -> UserError:
    looked_for = ", ".join(TEXT_SUFFIXES + RECORD_SUFFIXES)
    return UserError(f'no text in "{folder}": looked for {looked_for} (also with .gz) in it and the folders below')


def _is_record_file(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(RECORD_SUFFIXES)


def text_files_of_folder(folder: Path) -> list[Path]:
    """The text and record files below a folder, by relative path, without hidden ones; links to folders are ignored."""
    found = []
    for parent, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            known = name.removesuffix(".gz").endswith(TEXT_SUFFIXES + RECORD_SUFFIXES)
            path = Path(parent) / name
            if known and not name.startswith(".") and path.is_file():
                found.append(path)
    return sorted(found, key=lambda path: path.relative_to(folder).parts)


def _raise(error: OSError) -> None:
    raise error


def _parse_hugging_face(source: str) -> tuple[str, str]:
    """Name and split of ``hf:NAME[:SPLIT]``; the split is ``train`` unless given."""
    name = source.removeprefix(HUGGING_FACE)
    if ":" not in name or Path(name).exists():
        return name, "train"
    name, _, split = name.rpartition(":")
    return name, split


def copy_stdin(file: IO[bytes]) -> None:
    """Copy standard input into an open file; raises ``UserError`` if it is not UTF-8 text or is empty."""
    try:
        for block in checked(read_blocks(sys.stdin.buffer)):
            file.write(block)
    except NotTextError as error:
        raise UserError(f"standard input {error}: {error.mend}") from None
    file.flush()
    if file.tell() == 0:
        raise UserError("standard input is empty")


def describe_sources(sources: Sequence[str]) -> list[dict[str, Any]]:
    """What identifies each source without reading it: its name and, where files are known, their number and size.

    Names are the last parts of paths, so that a dataset does not tell where on a machine it was made. Raises
    ``UserError`` for a source that is not there.
    """
    return [_describe(source) for source in sources]


def _describe(source: str) -> dict[str, Any]:
    if source in (BUILTIN, STDIN):
        return {"name": source}
    if source.startswith(HUGGING_FACE):
        name, split = _parse_hugging_face(source)
        shown = Path(name).resolve().name if Path(name).exists() else name
        return {"name": f"{HUGGING_FACE}{shown}:{split}"}
    path = Path(source)
    files = text_files_of_folder(path) if path.is_dir() else [_existing_file(source)]
    if not files:
        raise _no_text_in(path)
    return {"name": path.resolve().name, "files": len(files), "bytes": sum(file.stat().st_size for file in files)}
