from __future__ import annotations

import gzip
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.settings import ReadSettings
from data_prep.sources import reading, records
from data_prep.sources.documents import CorpusPart, FileRange, ReadReport
from data_prep.sources.listing import parse_sources
from data_prep.sources.reading import read_part
from tests.data_prep.sources.conftest import PACKERS, read, texts, write_records


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


def test_white_space_is_skipped_and_counted(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", {"text": ""}, {"text": " \n\t\u3000"}, {"text": "x"})
    (tmp_path / "b.txt").write_text("\n\n")
    found, report = read(path, tmp_path / "b.txt")
    assert [d.text for d in found] == ["x"]
    assert report.counts == {"empty document": 3}


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
def test_paragraphs_are_what_is_between_blank_lines_in_any_parts(text: str, part_bytes: int, packed: bool) -> None:
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
