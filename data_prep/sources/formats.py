"""The kinds of files: which one a name stands for, and what a file of another kind looks like.

The name decides how a file is read, the content only whether that can be right.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.sources.documents import one_line

TEXT, JSON_LINES, JSON, CSV, TSV, PARQUET = ".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"
# What a name may end in, in any case, and the kind of the file.
ENDINGS = {
    ".txt": TEXT,
    ".md": TEXT,
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON,
    ".csv": CSV,
    ".tsv": TSV,
    ".parquet": PARQUET,
}
PACKED_SUFFIXES = (".gz", ".zst", ".bz2", ".xz")
ROWS = tuple(ending for ending, kind in ENDINGS.items() if kind != TEXT)  # of files with columns
TABLES = {CSV: ",", TSV: "\t"}
FIRST_BLOCK_BYTES = 1 << 16  # of a file, by which its kind is checked

# How other kinds of files begin, what they are, and what to do about them.
_MAGIC = (
    (b"\x1f\x8b", "gzip data", 'a name that ends in ".gz", as in "NAME.txt.gz"'),
    (b"\x28\xb5\x2f\xfd", "Zstandard data", 'a name that ends in ".zst", as in "NAME.txt.zst"'),
    (b"\xfd7zXZ\0", "xz data", 'a name that ends in ".xz", as in "NAME.txt.xz"'),
    (b"PAR1", "Parquet", 'a name that ends in ".parquet", and do not compress it'),
    (b"PK\x03\x04", "a zip archive (perhaps a .docx, .xlsx or .epub file)", ""),
    (b"%PDF-", "a PDF document", ""),
    (b"{\\rtf", "an RTF document", ""),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Microsoft Office document", ""),
    (b"\x89PNG\r\n", "a PNG image", ""),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"GIF8", "a GIF image", ""),
    (b"\x7fELF", "a program (ELF)", ""),
    (b"SQLite format 3\0", "an SQLite database", ""),
    (b"ARROW1", "an Arrow file", ""),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", ""),
)
_BZIP2 = re.compile(rb"BZh[1-9]1AY&SY")
_TAR_MARK, _TAR_OFFSET = b"ustar", 257
_COLUMN = re.compile(r"[^\W\d][\w.-]*(?: [\w.-]+){0,2}")
_DECODER = json.JSONDecoder()
_SHORT_LITERAL = 16  # characters; an error this close to the end of what was read may be due to the end
_TABLE_LINES = 100
_MOST_NAMES, _MOST_ENDINGS = 3, 6


def is_compressed(path: str) -> bool:
    """Return whether a file's name ends in a compression suffix."""
    return packing_of(path) != ""


def packing_of(path: str) -> str:
    """Return the compression suffix that a name ends in, in lower case, or ""."""
    suffix = Path(_name(path)).suffix.lower()
    return suffix if suffix in PACKED_SUFFIXES else ""


def ending_of(path: str) -> str:
    """Return what a file's name ends in before any compression suffix, in lower case, or ""."""
    name = _name(path)
    return Path(name[: len(name) - len(packing_of(path))]).suffix.lower()


def kind_of(path: str) -> str:
    """Return the kind of file that a name stands for, or "" if the ending is unknown.

    Parquet must be read from its end, so the kind of a compressed Parquet file is unknown.
    """
    kind = ENDINGS.get(ending_of(path), "")
    return "" if kind == PARQUET and is_compressed(path) else kind


def kind_by_rules(path: str, reading_rules: int) -> str:
    """Return the kind of a file as a build with these ``ReadSettings.reading_rules`` sees it.

    Builds that began before rule 2 know five endings, in lower case.
    """
    if reading_rules > 1:
        return kind_of(path)
    suffix = Path(path).suffix
    inner = Path(path[: -len(suffix)]).suffix if suffix in PACKED_SUFFIXES else suffix
    known = inner in (".txt", ".md", JSON_LINES, CSV) or (inner == suffix == PARQUET)
    return ENDINGS[inner] if known else ""


def _name(location: str) -> str:
    """Return a location without what a web address may have after its path."""
    return re.split("[?#]", location, maxsplit=1)[0] if location.startswith(("http://", "https://")) else location


def what_it_is(kind: str, first_block: bytes) -> str:
    """Return a predicate for a file that is not of this kind, like "looks like JSON lines: …", or "".

    Args:
        kind: the kind that it would be read as; "" stands for text.
        first_block: the first ``FIRST_BLOCK_BYTES`` of the file, decompressed.
    """
    found, names = _other_kind(kind or TEXT, first_block, whole=len(first_block) < FIRST_BLOCK_BYTES)
    if not found:
        return ""
    return f"looks like {found}: " + (f"give it {names}" if names else "convert it to UTF-8 text, or exclude it")


def _other_kind(kind: str, block: bytes, *, whole: bool) -> tuple[str, str]:
    for mark, found, names in _MAGIC:
        if block.startswith(mark):
            return found, names
    if _BZIP2.match(block):
        return "bzip2 data", 'a name that ends in ".bz2", as in "NAME.txt.bz2"'
    if block[_TAR_OFFSET:].startswith(_TAR_MARK):
        return "a tar archive", ""
    text = block.decode("utf-8", "ignore").removeprefix("\ufeff")
    is_json = json_kind(text, whole=whole)
    if is_json and kind != JSON and is_json != kind:
        return {JSON: "JSON", JSON_LINES: "JSON lines"}[is_json], f'a name that ends in "{is_json}"'
    if kind not in TABLES and (table := table_kind(text, whole=whole)):
        return {CSV: "a table (CSV)", TSV: "a table with tabs"}[table], f'a name that ends in "{table}"'
    return "", ""


def json_kind(text: str, *, whole: bool) -> str:
    """Return ``JSON_LINES`` or ``JSON`` if a text, or the beginning of one, consists of objects or arrays, or ""."""
    text = text.strip()
    if not text.startswith(("{", "[")):
        return ""
    lines = JSON if text.startswith("[") or "\n" in text else JSON_LINES
    try:
        value, end = _DECODER.raw_decode(text)
    except json.JSONDecodeError as error:
        return lines if not whole and is_cut_off(text, error) else ""
    except (ValueError, RecursionError):  # a number of thousands of digits, or thousands of brackets
        return ""
    holds_more = isinstance(value, dict) or any(isinstance(each, (dict, list, str)) for each in value)
    rest = text[end:].lstrip()
    if not value or not holds_more or (rest and not rest.startswith(text[0])):
        return ""
    return JSON if "\n" in text[:end] or not (rest or isinstance(value, dict)) else JSON_LINES


def is_cut_off(text: str, error: json.JSONDecodeError) -> bool:
    """Return whether JSON may be wrong only because more of it follows ``text``."""
    return error.msg.startswith("Unterminated string") or error.pos >= len(text) - _SHORT_LITERAL


def table_kind(text: str, *, whole: bool) -> str:
    """Return ``CSV`` or ``TSV`` if a text begins with names of columns and rows of as many fields, or ""."""
    lines = [line for line in text.splitlines()[: None if whole else -1] if line.strip()][:_TABLE_LINES]
    if len(lines) < 2:
        return ""
    for kind, delimiter in ((TSV, "\t"), (CSV, ","), (CSV, ";")):
        names = [name.strip('"') for name in lines[0].split(delimiter)]
        ascii_only = kind == TSV or lines[0].isascii()  # in Chinese, "word,word" is a sentence
        if len(names) < 2 or not ascii_only or not all(map(_COLUMN.fullmatch, names)) or len(set(names)) < len(names):
            continue
        try:
            rows = list(csv.reader(lines, delimiter=delimiter))
        except csv.Error:
            continue
        if all(len(row) == len(names) for row in rows[: None if whole else -1]) and len(rows) > 1:
            return kind
    return ""


def summary_of(paths: Iterable[str]) -> str:
    """Return how many files end in what, with some names: ``2 .png (a.png, b.png), 1 .pdf (c.pdf)``."""
    by_ending: dict[str, list[str]] = {}
    for path in paths:
        by_ending.setdefault(ending_of(path) or "without an ending", []).append(path)
    largest = sorted(by_ending.items(), key=lambda item: (-len(item[1]), item[0]))
    shown = [f"{len(names):,} {ending} ({some_names(names)})" for ending, names in largest[:_MOST_ENDINGS]]
    others = sum(len(names) for _, names in largest[_MOST_ENDINGS:])
    return ", ".join([*shown, *([f"{others:,} others"] if others else [])])


def some_names(paths: Sequence[str]) -> str:
    """Return the last parts of a few paths, each on one printable line."""
    names = [one_line(Path(_name(path)).name) for path in paths[:_MOST_NAMES]]
    return ", ".join([*names, *(["…"] if len(paths) > _MOST_NAMES else [])])
