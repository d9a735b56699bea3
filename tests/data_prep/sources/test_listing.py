from __future__ import annotations

import io
import itertools
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.settings import READING_RULES, ReadSettings
from data_prep.sources.documents import CorpusPart, FileRange, ReadReport, Source
from data_prep.sources.listing import copy_stdin, describe, grouped, parse_sources, parts_of
from data_prep.sources.reading import read_part


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("books/a.txt", "books/sub/b.md", "books/c.png", "x=y.txt", "a@2", "empty.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("12345" if name != "empty.txt" else "")
    return tmp_path


def parts(*names: str, **options: Any) -> list[CorpusPart]:
    return parts_of(parse_sources(names), ReadSettings(**options))


@pytest.mark.parametrize(
    ("text", "source"),
    [
        ("books", Source("books", "books", 1)),
        ("books/", Source("books", "books/", 1)),
        ("books/a.txt@0.5", Source("a.txt", "books/a.txt", 0.5)),
        ("wiki=books/*.txt@2", Source("wiki", "books/*.txt", 2)),
        ("books/**/*.txt", Source("books", "books/**/*.txt", 1)),
        ("x=y.txt", Source("x=y.txt", "x=y.txt", 1)),
        ("x=y.txt@3", Source("x=y.txt", "x=y.txt", 3)),
        ("n=x=y.txt", Source("n", "x=y.txt", 1)),
        ("a@2", Source("a@2", "a@2", 1)),
        ("a@2@2", Source("a@2", "a@2", 2)),
        ("builtin@2", Source("builtin", "builtin", 2)),
        ("in=-", Source("in", "-", 1)),
        ("hf:org/name:test@2e-1", Source("hf:org/name:test", "hf:org/name:test", 0.2)),
        ("h=hf:org/name", Source("h", "hf:org/name", 1)),
        ("hf:books", Source("hf:books:train", "hf:books", 1)),
        ("s3://bucket/day=1/x.jsonl@4", Source("x.jsonl", "s3://bucket/day=1/x.jsonl", 4)),
        ("w=s3://bucket/x/*.gz", Source("w", "s3://bucket/x/*.gz", 1)),
    ],
)
def test_a_source_is_a_name_a_location_and_a_weight(here: Path, text: str, source: Source) -> None:
    assert parse_sources([text]) == [source]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "no source given"),
        (
            ["books", "b=books/sub", "books/"],
            '2 sources are called "books": give each a different name.* "other=books"',
        ),
        (["-", "in=-"], "standard input .* only once"),
        (["books@0"], 'the weight "0" of "books@0" must be a number above 0'),
        (["books@inf"], "must be a number above 0"),
        (["books@two"], "must be a number above 0"),
        (["nothing.txt"], 'there is no file or folder "nothing.txt"'),
        (["n=nothing\n.txt@2"], r'there is no file or folder "nothing\\n.txt"'),
        (["/dev/null"], "neither a file nor a folder"),
    ],
)
def test_sources_that_cannot_be_are_refused(here: Path, texts: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_sources(texts)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", '"empty.txt" is empty'),
        ("x.txt", b"a\0b", r'"x.txt" is not UTF-8 text \(byte 0x00 at offset 1\): convert it'),
        (
            "x.txt",
            "wide".encode("utf-32"),
            '"x.txt" is UTF-32, not UTF-8: convert it, for example with `iconv -f UTF-32',
        ),
        ("none*.txt", None, 'no file matches "none'),
        (
            "pictures",
            None,
            r'no text in "pictures": .*\.txt, \.md, \.jsonl, .*\.tsv.*; there is only 1 \.png \(a\.png\)$',
        ),
        ("nowhere/*.txt", None, 'cannot list the folder "nowhere"'),
    ],
)
def test_sources_without_text_are_refused_before_anything_is_read(
    here: Path, name: str, content: bytes | None, message: str
) -> None:
    (here / "pictures").mkdir()
    (here / "pictures" / "a.png").write_bytes(b"png")
    if content is not None:
        (here / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        parts(name)


def test_parts_go_by_source_path_and_place(here: Path) -> None:
    (here / "books" / "big.txt").write_bytes(b"a" * 25)
    (here / "books" / "packed.txt.gz").write_bytes(b"g" * 25)
    (here / "books" / "z.csv").write_bytes(b"c" * 25)
    assert parts("x=y.txt", "books", "books/c.png", part_bytes=10) == [
        CorpusPart(0, (FileRange("x=y.txt", 0, 5),), 5),
        CorpusPart(1, (FileRange("books/a.txt", 0, 5),), 5),
        CorpusPart(1, (FileRange("books/big.txt", 0, 8),), 8),
        CorpusPart(1, (FileRange("books/big.txt", 8, 16),), 8),
        CorpusPart(1, (FileRange("books/big.txt", 16, 25),), 9),
        CorpusPart(1, (FileRange("books/packed.txt.gz", 0, -1),), 25),
        CorpusPart(1, (FileRange("books/sub/b.md", 0, 5),), 5),
        CorpusPart(1, (FileRange("books/z.csv", 0, -1),), 25),
        CorpusPart(2, (FileRange("books/c.png", 0, 5),), 5),
    ]
    for per in ("file", "---"):
        assert CorpusPart(0, (FileRange("books/big.txt", 0, 25),), 25) in parts(
            "books", part_bytes=10, document_per=per
        )
    assert len(parts("books")) == 1


@given(sizes=st.lists(st.integers(0, 30)), most=st.integers(1, 20))
def test_small_files_are_grouped_in_order_as_far_as_they_fit(sizes: list[int], most: int) -> None:
    ranges = [(FileRange(str(number)), size) for number, size in enumerate(sizes)]
    found = list(grouped(iter(ranges), most))
    assert [each for group, _ in found for each in group] == [each for each, _ in ranges]
    assert all(size <= most or len(group) == 1 for group, size in found)
    assert sum(size for _, size in found) == sum(sizes)
    for (_, size), (following, _) in itertools.pairwise(found):
        assert size + sizes[int(following[0].path)] > most


def test_descriptions_tell_names_and_sizes_but_no_places(here: Path) -> None:
    sources = parse_sources([f"{here}/books@2"])
    assert describe(sources, parts_of(sources, ReadSettings(part_bytes=3))) == [
        {"name": "books", "weight": 2.0, "files": 2, "bytes": 10}
    ]
    sources = parse_sources([f"t={here}/books/*.txt", "builtin", "-", "hf:org/name:test"])
    assert describe(sources, parts_of(sources, ReadSettings())) == [
        {"name": "t", "weight": 1.0, "files": 1, "bytes": 5},
        {"name": "builtin", "weight": 1.0},
        {"name": "-", "weight": 1.0},
        {"name": "hf:org/name:test", "weight": 1.0},
    ]


def read_stdin(monkeypatch: pytest.MonkeyPatch, folder: Path, content: bytes) -> list[tuple[str, str]]:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    copy, sources, settings = folder / "stdin.txt", parse_sources(["-"]), ReadSettings(max_document_bytes=16)
    assert parts_of(sources, settings) == []
    with copy.open("wb") as file:
        copy_stdin(file, READING_RULES)
    found = [
        list(read_part(part, sources, settings, ReadReport())) for part in parts_of(sources, settings, stdin_copy=copy)
    ]
    return [(document.text, document.origin) for of_part in found for document in of_part]


def test_standard_input_is_one_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_stdin(monkeypatch, tmp_path, b"one\r\n\r\ntwo two two two")
    assert found == [("one\n\n", "stdin:0"), ("two two two two", "stdin:7")]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"a\xff", "0xff at offset 1"), (b"\0", "byte 0x00"), ("a".encode("utf-16"), "is UTF-16")],
)
def test_bad_standard_input_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, message: str
) -> None:
    with pytest.raises(UserError, match=f"standard input .*{message}"):
        read_stdin(monkeypatch, tmp_path, content)
