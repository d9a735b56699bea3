from __future__ import annotations

import bz2
import datetime
import decimal
import gzip
import json
import lzma
import re
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.settings import ReadSettings
from data_prep.sources import reading, records, tables
from data_prep.sources.documents import MOST_MESSAGES, CorpusPart, Document, FileRange, ReadReport
from data_prep.sources.listing import parse_sources, parts_of
from data_prep.sources.reading import read_part

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


def equal_newlines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


lines = st.lists(
    st.sampled_from(["a", "bcd", "日本", "é", "\n", "\n\n", "\r\n", "\r\n\r\n", "\r", " x"]), max_size=80
).map("".join)


@given(text=lines, part_bytes=st.integers(1, 60), max_bytes=st.integers(16, 40), per=st.sampled_from(["size", "file"]))
@settings(max_examples=150, deadline=None)
def test_the_documents_of_all_parts_join_to_the_text(text: str, part_bytes: int, max_bytes: int, per: str) -> None:
    text = f"x{text}x"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.txt"
        path.write_bytes(text.encode())
        found, report = read(path, part_bytes=part_bytes, max_document_bytes=max_bytes, document_per=per)
        joined = "".join(document.text for document in found)
        if not report.counts:
            assert joined == equal_newlines(text)
        assert "".join(joined.split()) == "".join(text.split())
        assert all(len(document.text.encode()) <= max_bytes for document in found)
        whole = [document.origin for document in read(path, max_document_bytes=max_bytes)[0]]
        if per == "file":
            assert [document.origin for document in found] == whole


@given(
    texts_of=st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1),
    part_bytes=st.integers(1, 200),
    kind=st.sampled_from(["line", "<|x|>", "--", ".jsonl"]),
)
@settings(max_examples=150, deadline=None)
def test_lines_separated_texts_and_records_are_the_same_whatever_the_parts(
    texts_of: list[str], part_bytes: int, kind: str
) -> None:
    made = [f"a{text}a".replace("\0", "") for text in texts_of]
    if kind == ".jsonl":
        content = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in made)
    else:
        made = [text.replace("-", "") for text in made]
        if kind == "line":
            made = [text.replace("\n", "").replace("\r", "") for text in made]
        content = ("\n" if kind == "line" else kind).join(made)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.jsonl" if kind == ".jsonl" else "a.txt")
        path.write_bytes(content.encode())
        per = {".jsonl": "size"}.get(kind, kind)
        found, report = read(path, part_bytes=part_bytes, document_per=per)
        assert [document.text for document in found] == [equal_newlines(text) for text in made]
        assert not report.counts
        assert found == read(path, document_per=per)[0]


def test_places_are_relative_and_lead_to_the_text(tmp_path: Path) -> None:
    content = "\ufeffone two three\n\nfour five\n\nsix".encode()
    (tmp_path / "books" / "a").mkdir(parents=True)
    (tmp_path / "books" / "a" / "b.txt").write_bytes(content)
    for name in (tmp_path / "books", f"{tmp_path}/books/", tmp_path / "books" / "a" / ".." / "a" / "b.txt"):
        found, _ = read(name, max_document_bytes=20)
        assert [d.text for d in found] == ["one two three\n\n", "four five\n\nsix"]
        start = "books/a/b.txt:" if "b.txt" not in str(name) else "b.txt:"
        assert [d.origin for d in found] == [f"{start}0", f"{start}18"]
        assert content[18:].decode() == found[1].text
    assert read(f"{tmp_path}/*/**/*.txt")[0][0].origin == f"{tmp_path.name}/books/a/b.txt:0"


@pytest.mark.parametrize("suffix", PACKERS)
def test_packed_files_give_what_plain_ones_give(tmp_path: Path, suffix: str) -> None:
    text = "some text, and then more\n\n" * 5000
    record = json.dumps({"text": "a record"}) + "\n"
    for name, content in (("a.txt", text), ("b.md", "b"), ("c.jsonl", record), ("d.csv", 'id,text\n1,"x\ny"\n')):
        (tmp_path / name).write_text(content)
        (tmp_path / (name + suffix)).write_bytes(PACKERS[suffix](content.encode()))
        plain, packed = read(tmp_path / name)[0], read(tmp_path / (name + suffix))[0]
        assert [d.text for d in plain] == [d.text for d in packed]
    assert packed[0].origin == f"d.csv{suffix}:2"


@pytest.mark.parametrize("suffix", PACKERS)
def test_what_was_whole_before_damage_is_used_and_the_damage_is_told(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "x"
    folder.mkdir()
    records = [json.dumps({"text": f"record é {number**5}"}, ensure_ascii=False) for number in range(8_000)]
    contents = {"a.jsonl": "\n".join(records).encode(), "b.txt": "\n".join(["a text", *records]).encode()}
    for name, content in contents.items():
        packed = PACKERS[suffix](content)
        (folder / (name + suffix)).write_bytes(packed[: len(packed) * 2 // 3])
    found, report = read(folder)
    of_records = [d.text for d in found if "jsonl" in d.origin]
    of_text = "".join(d.text for d in found if "b.txt" in d.origin)
    assert of_records and of_records == [json.loads(r)["text"] for r in records[: len(of_records)]]
    assert of_text and contents["b.txt"].decode().startswith(of_text)
    assert report.counts == {"damaged file": 2}
    for name, message in zip(("a.jsonl", "b.txt"), report.messages, strict=True):
        assert message.startswith(f'"x/{name}{suffix}" is damaged (')


def test_a_named_file_with_nothing_before_its_damage_is_refused(tmp_path: Path) -> None:
    for suffix in PACKERS:
        path = tmp_path / f"x.txt{suffix}"
        path.write_bytes(b"this was never packed")
        with pytest.raises(UserError, match=r"x\.txt.* is damaged .*: get an intact copy"):
            read(path)


def test_bytes_that_are_no_utf8_are_skipped_replaced_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good good good\n\nbad \xff bad bad\n\ngood\n\n")
    found, report = read(path, max_document_bytes=16)
    assert [d.text for d in found] == ["good good good\n\n", "good\n\n"]
    assert report.counts == {"not UTF-8": 1}
    assert report.messages == ['"a.txt", byte 16: not UTF-8 (byte 0xff at offset 20)']
    found, report = read(path, max_document_bytes=16, errors="replace")
    assert found[1].text == "bad \ufffd bad bad\n\n"
    assert report.counts == {"not UTF-8, replaced": 1}
    with pytest.raises(UserError, match=r'"a\.txt", byte 16: not UTF-8 \(byte 0xff at offset 20\): convert .*--errors'):
        read(path, max_document_bytes=16, errors="stop")


def test_nul_bytes_later_in_a_file_make_only_their_document_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"a" * 70_000 + b"\n\nb\0b\n\n" + b"c" * 70_000)
    found, report = read(path)
    assert "".join(d.text for d in found) == "a" * 65536 + "c" * 70_000
    assert report.counts == {"NUL bytes": 1}
    assert report.messages == ['"a.txt", byte 65536: NUL at offset 70003']


def test_records_give_their_field_and_long_ones_are_cut(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", {"text": "short\r\n"}, {"text": "a long text\n\nof two parts", "id": 3})
    assert [(d.text, d.origin) for d in read(path, max_document_bytes=16)[0]] == [
        ("short\n", "a.jsonl:0"),
        ("a long text\n\n", "a.jsonl:22"),
        ("of two parts", "a.jsonl:22"),
    ]
    path = write_records(tmp_path / "b.jsonl", {"body": "here", "text": "not here"})
    assert texts(path, text_field="body") == ["here"]


def test_white_space_is_skipped_and_counted(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", {"text": ""}, {"text": " \n\t\u3000"}, {"text": "x"})
    (tmp_path / "b.txt").write_text("\n\n")
    found, report = read(path, tmp_path / "b.txt")
    assert [d.text for d in found] == ["x"]
    assert report.counts == {"empty document": 3}


def test_bad_lines_are_skipped_and_told_with_file_and_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = [b"{broken", b'["text"]', b'{"text": "\\ud800"}', b'{"text": 5}', b'{"text": "\xff"}', b"[" * 100_000]
    path.write_bytes(b"\n".join([b'{"text": "first"}', *bad, b'{"text": "last"}']))
    found, report = read(path)
    assert [d.text for d in found] == ["first", "last"]
    assert report.counts == {"broken record": 3, "no text in the field": 1, "not UTF-8": 2}
    assert report.messages[0].startswith('"a.jsonl", byte 18: not JSON (')
    assert report.messages[2] == '"a.jsonl", byte 35: half of a surrogate pair (\\ud800)'
    assert texts(path, errors="replace") == ["first", "\ufffd", "\ufffd", "last"]
    with pytest.raises(UserError, match=r'"a\.jsonl", byte 35: half of a surrogate pair .*--errors replace'):
        read(path, errors="stop")


def test_messages_are_few_however_many_lines_are_bad(tmp_path: Path) -> None:
    for number in range(20):
        (tmp_path / f"{number}.jsonl").write_text('{"text": "good"}\n' + "bad\n" * 500)
    report = read(tmp_path)[1]
    assert report.counts == {"broken record": 10_000}
    assert len(report.messages) == MOST_MESSAGES
    assert len({message.split(",")[0] for message in report.messages}) > 5


def test_a_line_that_is_too_long_is_skipped_without_being_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 20)
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 1 << 20)
    monkeypatch.setattr(tables, "MAX_FIELD_CHARACTERS", 1 << 19)
    long = "y" * (5 << 20)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + long + '"}\n{"text": "b"}\n' + long)
    (tmp_path / "b.csv").write_text(f'text,id\na,1\n"{long}",2\n"{long[: 1 << 19]}y",3\nb,4\n')
    for part_bytes in (1 << 19, 64 << 20):
        found, report = read(tmp_path, part_bytes=part_bytes)
        assert [d.text for d in found] == ["a", "b", "a", "b"]
        assert report.counts == {"record too long": 4}


def test_rows_of_csv_and_parquet_are_documents_and_large_parquet_files_come_apart(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"text {number}\r\n" for number in range(1000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=100)
    found, report = read(path)
    assert [d.text for d in found] == [f"text {number}\n" for number in range(1000)]
    assert found[-1].origin == "a.parquet:1000" and not report.counts
    size = path.stat().st_size
    parts = parts_of(parse_sources([str(path)]), ReadSettings(part_bytes=size // 4))
    assert 3 < len(parts) <= 10 and sum(part.bytes for part in parts) == size
    assert read(path, part_bytes=size // 4)[0] == found
    (tmp_path / "b.csv").write_bytes(b'\xef\xbb\xbftext,id\r\na,1\r\n"b\r\nc",2\r\n\r\nd,3\r\n')
    assert [(d.text, d.origin) for d in read(tmp_path / "b.csv")[0]] == [
        ("a", "b.csv:2"),
        ("b\nc", "b.csv:3"),
        ("d", "b.csv:6"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bin", b"0123456789ab\xff", r'x\.bin" is not UTF-8 \(byte 0xff at offset 12\): convert it'),
        ("x.jsonl", b'{"body": "a", "id": 1}\n', 'the field "text": its fields are "body", "id"; .*--text-field'),
        ("x.jsonl", b'{"text": null}\n', r'no text in "text": it holds nothing \(null\)$'),
        ("x.jsonl", b"what\nis this\n", r"contains no valid record: byte 0: not JSON"),
        ("x.csv", b"a,b\n1,2\n", 'no text in the field "text": its fields are "a", "b"'),
        ("x.parquet", b"PAR1 not at all", "not a complete parquet file"),
    ],
)
def test_a_named_file_without_a_document_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_the_builtin_corpus_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "builtin_documents", lambda: (("os.py", "a\n\nb"), ("re.py", "c")))
    assert [(d.text, d.origin) for d in read("builtin")[0]] == [("a\n\nb", "os.py"), ("c", "re.py")]


def test_a_hugging_face_dataset_is_a_source(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_records(folder / "train.jsonl", {"text": "one"}, {"text": None}, {"text": "two\r\n"})
    write_records(folder / "test.jsonl", {"text": "three"})
    found, report = read(f"hf:{folder}")
    assert [(d.text, d.origin) for d in found] == [("one", "data:1"), ("two\n", "data:3")]
    assert report.counts == {"no text in the field": 1}
    assert texts(f"hf:{folder}:test") == ["three"]
    with pytest.raises(UserError, match=r'the dataset ".*" has no text in the field "body": its fields are "text"'):
        read(f"hf:{folder}", text_field="body")
    with pytest.raises(UserError, match=r'cannot read the dataset .*, split "nope"'):
        read(f"hf:{folder}:nope")


def test_remote_files_are_read_like_local_ones(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name, content in {
        "a.txt": b"one\n\ntwo two two two",
        "b/c.jsonl": b'{"text": "r1"}\n{"text": "r2"}\n',
        "b/d.txt.gz": gzip.compress(b"packed"),
        ".hidden/e.txt": b"no",
        "f.png": b"no",
    }.items():
        memory.pipe(f"/corpus/{name}", content)
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    local = read(tmp_path / "corpus", max_document_bytes=16, part_bytes=16)
    assert len(local[0]) == 5
    for name in ("memory://corpus", "memory://corpus/", f"file://{tmp_path}/corpus"):
        assert read(name, max_document_bytes=16, part_bytes=16) == local
    assert texts("memory://corpus/*/*.jsonl") == ["r1", "r2"]
    assert [d.origin for d in read("memory://corpus/a.txt")[0]] == ["a.txt:0"]
    with pytest.raises(UserError, match=r'there is no file or folder "memory://corpus/none\.txt"'):
        read("memory://corpus/none.txt")
    with pytest.raises(UserError, match=r'cannot read "nothing://x/a\.txt"'):
        read("nothing://x/a.txt")


def test_a_folder_of_bad_things_is_told_and_the_rest_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "MAX_RECORD_BYTES", 1 << 17)
    bad = tmp_path / "bad"
    (bad / "sub").mkdir(parents=True)
    (bad / "sub" / "loop").symlink_to(bad)
    files: dict[str, bytes] = {
        "good.txt": b"good",
        "latin.txt": "caf\xe9".encode("latin-1"),
        "utf16.txt": ("wide" * 1000).encode("utf-16"),
        "nul.txt": b"a\0b" * 1000,
        "empty.txt": b"",
        "cut.txt.gz": gzip.compress(bytes(range(32, 127)) * 99)[:-30],
        "cut.txt.zst": PACKERS[".zst"](b"before the damage " * 9)[:-4],
        "broken.jsonl": b'{"text": "record"}\n{"text": \n',
        "column.jsonl": b'{"body": "x"}\n',
        "column.csv": b"body\nx\n",
        "long.jsonl": b'{"text": "' + b"l" * (1 << 18) + b'"}\n{"text": "short"}\n',
        "long.txt": b"t" * 200_000,
        'new\nline "quoted".txt': b"\xff",
        "not.parquet": b"text",
        "secret.txt": b"secret",
    }
    for name, content in files.items():
        (bad / name).write_bytes(content)
    opened = reading.open_stream

    def refusing(path: str) -> Any:
        if "secret" in path:
            raise reading.UnreadableError("cannot be opened (Permission denied)")
        return opened(path)

    monkeypatch.setattr(reading, "open_stream", refusing)
    for part_bytes in (1000, 64 << 20):
        found, report = read(bad, part_bytes=part_bytes)
        joined = "".join(d.text for d in found)
        assert [word in joined for word in ("good", "record", "short")] == [True] * 3
        assert joined.count("t" * 60_000) == 3
        assert report.counts == {
            "not UTF-8": 2,
            "file with UTF-16": 1,
            "binary file": 1,
            "empty file": 1,
            "damaged file": 3,
            "broken record": 1,
            "no text in the field": 2,
            "record too long": 1,
            "unreadable file": 1,
        }
        assert all("\n" not in message for message in report.messages)
        assert '"bad/secret.txt" cannot be opened (Permission denied)' in report.messages
        assert any(r'"bad/new\nline \"quoted\".txt", byte 0' in message for message in report.messages)
        assert any("iconv -f UTF-16 -t UTF-8" in message for message in report.messages)
        assert any('"bad/column.csv" has no text in the field "text"' in message for message in report.messages)


def test_a_file_without_permission_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    part = CorpusPart(0, (FileRange(str(path)),), 0)
    report = ReadReport()
    assert list(read_part(part, parse_sources([str(tmp_path)]), ReadSettings(), report)) == []
    assert report.counts == {"unreadable file": 1}
    assert report.messages == [f'"{tmp_path.name}/a.txt" cannot be opened (No such file or directory)']


paragraphs = st.lists(
    st.sampled_from(["a", "bcd", "日本", "é", "\n", "\n\n", "\r\n", "\r\n\r\n", " \n", "\n \t\n", "\n\n\n", " x"]),
    max_size=60,
).map("".join)


@given(text=paragraphs, part_bytes=st.integers(1, 60), packed=st.booleans())
@settings(max_examples=150, deadline=None)
def test_paragraphs_are_what_is_between_blank_lines_whatever_the_parts(
    text: str, part_bytes: int, packed: bool
) -> None:
    text = f"x{text}x"
    plain = [p.strip("\n") for p in re.split(r"\n(?:[ \t]*\n)+", equal_newlines(text))]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / ("a.txt.gz" if packed else "a.txt")
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        found, report = read(path, part_bytes=part_bytes, document_per="paragraph")
        assert [document.text for document in found] == [p for p in plain if p.strip()]
        assert "separators" not in report.counts


def test_long_paragraphs_are_cut_and_never_held(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\n" + "word " * 50 + "\n\n\nshort\n \nlast\n\n")
    found = texts(path, document_per="paragraph", max_document_bytes=100)
    assert found[-2:] == ["short", "last"]
    assert "".join(found[:-2]) == "word " * 50
    assert all(len(text) <= 100 for text in found)


@pytest.mark.parametrize(
    ("per", "found"),
    [
        ("line", ["one  two", "three\\n", "---", "four", "five"]),
        ("paragraph", ["one  two\nthree\\n", "---", "four\nfive"]),
        ("\\n\\n", ["one  two\nthree\\n", "---", "four\nfive\n"]),
        ("\n\n", ["one  two\nthree\\n", "---", "four\nfive\n"]),
        ("\\n---\\n", ["one  two\nthree\\n\n", "\nfour\nfive\n"]),
        ("---", ["one  two\nthree\\n\n\n", "\n\nfour\nfive\n"]),
        ("\\\\n", ["one  two\nthree", "\n\n---\n\nfour\nfive\n"]),
        ("\\t", ["one  two\nthree\\n\n\n---\n\nfour\nfive\n"]),
        ("file", ["one  two\nthree\\n\n\n---\n\nfour\nfive\n"]),
    ],
)
def test_document_per_means_what_it_says(tmp_path: Path, per: str, found: list[str]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one  two\nthree\\n\n\n---\n\nfour\nfive\n")
    documents, report = read(path, document_per=per)
    assert [document.text for document in documents] == found
    assert report.separators == (0 if per in ("file", "\\t") else report.separators)
    if per == "paragraph":  # for builds that began before, these are letters
        path.write_text("a paragraph of words")
        assert texts(path, document_per=per, reading_rules=1) == ["a ", " of words"]


def test_text_without_letters_is_none_in_records_as_in_files(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", {"text": "a\0b"}, {"text": "good"})
    found, report = read(path)
    assert ([d.text for d in found], report.counts) == (["good"], {"NUL bytes": 1})
    assert report.messages == ['"a.jsonl", byte 0: NUL at character 1']
    assert texts(path, reading_rules=1) == ["a\0b", "good"]


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".txt"])
def test_a_byte_order_mark_is_no_text_and_wide_encodings_are_refused(tmp_path: Path, kind: str) -> None:
    content = {
        ".jsonl": '{"text": "one"}\n\ufeff{"text": "two"}\n',  # as joined by cat
        ".json": '[{"text": "one"}, {"text": "two"}]',
        ".csv": "text,n\none,1\ntwo,2\n",
        ".tsv": "text\tn\none\t1\ntwo\t2\n",
        ".txt": "one\n\ntwo",
    }[kind]
    path = tmp_path / f"a{kind}"
    path.write_bytes(("\ufeff" + content).encode())
    assert texts(path, document_per="paragraph") == ["one", "two"]
    for encoding, name in (("utf-16", "UTF-16"), ("utf-32", "UTF-32")):
        path.write_bytes(content.encode(encoding))
        with pytest.raises(UserError, match=f"is {name}, not UTF-8: convert it, for example with `iconv -f {name}"):
            read(path)


COLUMNS: dict[str, Any] = {
    "lists": [["a b", "c d"]],
    "structs": [{"en": "a b"}],
    "timestamps or dates": [datetime.datetime(2020, 1, 2)],
    "timestamps or dates ": [datetime.date(2020, 1, 2)],
    "nothing (null)": [None],
    "numbers": [1.5],
    "numbers ": [7],
    "numbers  ": [decimal.Decimal("1.5")],
    "true or false": [True],
    "nothing (null) and lists": [None, []],
}


@pytest.mark.parametrize("holds", COLUMNS)
@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".json", "hf:"])
def test_a_column_without_text_is_told_by_what_it_holds(tmp_path: Path, holds: str, kind: str) -> None:
    column = COLUMNS[holds]
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / f"train{kind if kind != 'hf:' else '.parquet'}"
    if kind in (".jsonl", ".json"):
        if isinstance(column[0], datetime.date | decimal.Decimal):
            return  # JSON has none
        path.write_text("".join(json.dumps({"text": value, "id": "x"}) + "\n" for value in column))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": column, "id": ["x"] * len(column)}), path)
    wanted = holds.strip()
    if holds == "nothing (null) and lists" and kind in (".parquet", "hf:"):
        wanted = "lists" if kind == ".parquet" else holds
    fields = '"text.en", "id"' if holds == "structs" else '"id"'
    with pytest.raises(UserError) as caught:
        read(f"hf:{folder}" if kind == "hf:" else path)
    end = f'has no text in "text": it holds {wanted}; its fields are {fields}; choose one with --text-field'
    assert str(caught.value).endswith(end)


@pytest.mark.parametrize("kind", [".parquet", ".jsonl", ".json", "hf:"])
def test_dots_name_fields_inside_of_fields(tmp_path: Path, kind: str) -> None:
    rows = [{"translation": {"en": f"text {n}", "more": {"fr": f"texte {n}"}}, "a.b": "dotted"} for n in range(3)]
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / f"train{kind if kind != 'hf:' else '.parquet'}"
    if kind in (".parquet", "hf:"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == ".json":
        path.write_text(json.dumps(rows))
    else:
        write_records(path, *rows)
    source = f"hf:{folder}" if kind == "hf:" else path
    assert texts(source, text_field="translation.en") == ["text 0", "text 1", "text 2"]
    assert texts(source, text_field="translation.more.fr") == ["texte 0", "texte 1", "texte 2"]
    assert texts(source, text_field="a.b") == ["dotted"] * 3
    with pytest.raises(UserError, match=r'fields are "translation.en", "translation.more.fr", "a.b"; choose one'):
        read(source, text_field="translation.de")
