from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep.errors import UserError
from data_prep.sources import MOST_MESSAGES, Document, ReadReport, describe_sources, read_documents


def read(*sources: object, **options: Any) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    return list(read_documents([str(source) for source in sources], report=report, **options)), report


def texts(*sources: object, **options: Any) -> list[str]:
    return [document.text for document in read(*sources, **options)[0]]


def write_records(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_a_text_file_is_one_document_or_many_if_it_is_long(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\r\n\r\ntwo\r\n\r\nthree", newline="")
    documents, report = read(path)
    assert documents == [Document("one\n\ntwo\n\nthree", str(path), 0)]
    assert (report.files, report.documents, report.text_bytes) == (1, 1, 15)
    assert [(d.text, d.number) for d in read(path, max_document_bytes=16)[0]] == [("one\n\ntwo\n\nthree", 0)]
    path.write_text("one two three\n\nfour five\n\nsix")
    assert texts(path, max_document_bytes=16) == ["one two three\n\n", "four five\n\nsix"]


def test_records_give_their_field_and_long_ones_are_cut(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", {"text": "short\r\n"}, {"text": "a long text\n\nof two parts", "id": 3})
    documents, _ = read(path, max_document_bytes=16)
    assert [(d.text, d.number) for d in documents] == [("short\n", 0), ("a long text\n\n", 1), ("of two parts", 2)]
    path = write_records(tmp_path / "b.jsonl", {"body": "here", "text": "not here"})
    assert texts(path, text_field="body") == ["here"]


def test_records_are_lines_whatever_newlines_the_text_holds(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\ufeff{"text": "a\u2028b\x85c"}\r\n\n{"text": "d"}', encoding="utf-8", newline="")
    assert texts(path) == ["a\u2028b\x85c", "d"]


def test_folders_are_read_by_name_without_hidden_or_other_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.md", "a/b/c.txt", ".hidden.txt", ".git/x.txt", "picture.png", "B.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "loop").symlink_to(tmp_path)
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nothing")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"c.txt.gz"))
    documents, report = read(tmp_path)
    assert [d.source for d in documents] == ["B.txt", "a/b/c.txt", "a/z.md", "b.txt", "c.txt.gz"]
    assert [d.text for d in documents] == [d.source for d in documents]
    assert report.files == 5


def test_sources_come_in_the_order_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    assert texts(tmp_path / "b.txt", tmp_path / "a.txt", tmp_path) == ["b", "a", "a", "b"]


def test_white_space_is_skipped_and_counted(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", {"text": ""}, {"text": " \n\t\u3000"}, {"text": "x"})
    (tmp_path / "b.txt").write_text("\n\n")
    documents, report = read(path, tmp_path / "b.txt")
    assert [d.text for d in documents] == ["x"]
    assert report.skipped_empty_documents == 2  # the first has nothing to skip: it gives no document at all


def test_bad_lines_are_skipped_and_told_with_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    bad = ["{broken", '["text"]', '{"text": 5}', '{"other": "x"}', '{"text": "\\ud800"}', "[" * 100_000]
    path.write_text("\n".join(['{"text": "first"}', *bad, '{"text": "last"}']))
    documents, report = read(path)
    assert [d.text for d in documents] == ["first", "last"]
    assert report.skipped_lines == len(bad) == len(report.messages)
    for number, message in enumerate(report.messages, start=2):
        assert message.startswith(f'"{path}", line {number}: ')
    assert "surrogate" in report.messages[4]


def test_messages_are_few_however_many_lines_are_bad(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + "bad\n" * 500)
    report = read(path)[1]
    assert report.skipped_lines == 500
    assert len(report.messages) == MOST_MESSAGES


def test_binary_files_in_a_folder_are_skipped_and_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("good")
    (tmp_path / "b.txt").write_bytes(b"text\0text")
    (tmp_path / "c.jsonl").write_bytes(b'{"text": "\xff"}')
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b"text " * 1000)[:-12])
    documents, report = read(tmp_path)
    assert [d.text for d in documents] == ["good"]
    assert report.skipped_binary_files == 3
    assert [message.split('" ')[1][:12] for message in report.messages] == [
        "is not UTF-8",
        "is not UTF-8",
        "is damaged (",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.bin", b"0123456789ab\xff", r'x\.bin" is not UTF-8 text \(byte 0xff at offset 12\): convert it'),
        ("x.txt", b"a\0b", "byte 0x00 at offset 1"),
        ("x.txt", b"", r'x\.txt" is empty'),
        ("x.txt.gz", gzip.compress(b"a" * 100)[:-9], r"is damaged .*: get a whole copy"),
        (
            "x.jsonl",
            b'{"body": "a", "id": 1}\n',
            'no text in the field "text": its fields are "body", "id"; .*--text-field',
        ),
        ("x.jsonl", b'{"text": null}\n', 'no text in the field "text": its fields are "text"'),
        ("x.jsonl", b"what\nis this\n", r"no line of .* is a JSON record; the last problem: .* line 2"),
    ],
)
def test_a_named_file_that_is_no_text_is_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read(path)


def test_sources_that_are_not_there_are_refused(tmp_path: Path) -> None:
    for call in (read, lambda source: describe_sources([str(source)])):
        with pytest.raises(UserError, match="there is no file or folder"):
            call(tmp_path / "nothing.txt")
        with pytest.raises(UserError, match="neither a file nor a folder"):
            call("/dev/null")
        with pytest.raises(UserError, match=r"no text in .*: looked for \.txt, \.md, \.jsonl"):
            call(tmp_path)


def test_a_folder_of_binary_files_only_has_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match="no text in"):
        read(tmp_path)


def set_stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(content)))


def test_standard_input_is_one_text(monkeypatch: pytest.MonkeyPatch) -> None:
    set_stdin(monkeypatch, b"one\r\n\r\ntwo two two two")
    assert texts("-", max_document_bytes=16) == ["one\n\n", "two two two two"]


@pytest.mark.parametrize(("content", "message"), [(b"", "is empty"), (b"a\xff", "0xff at offset 1")])
def test_bad_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch, content: bytes, message: str) -> None:
    set_stdin(monkeypatch, content)
    with pytest.raises(UserError, match=f"standard input .*{message}"):
        read("-")


def test_the_builtin_corpus_is_a_source(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_prep.sources.builtin_documents", lambda: (("os.py", "a\n\nb"), ("re.py", "c")))
    documents, report = read("builtin")
    assert documents == [Document("a\n\nb", "os.py", 0), Document("c", "re.py", 0)]
    assert report.files == 2


def test_a_hugging_face_dataset_is_a_source(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    write_records(folder / "train.jsonl", {"text": "one"}, {"text": None}, {"text": "two\r\n"})
    write_records(folder / "test.jsonl", {"text": "three"})
    documents, report = read(f"hf:{folder}")
    assert [d.text for d in documents] == ["one", "two\n"]
    assert report.skipped_lines == 1
    assert texts(f"hf:{folder}:test") == ["three"]
    with pytest.raises(UserError, match='has no text in the field "body": its fields are "text"'):
        read(f"hf:{folder}", text_field="body")
    with pytest.raises(UserError, match=r'cannot read the dataset .*, split "nope"'):
        read(f"hf:{folder}:nope")


def test_descriptions_tell_names_and_sizes_but_no_places(tmp_path: Path) -> None:
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "a.txt").write_text("12345")
    (tmp_path / "books" / "b.md").write_text("123")
    (tmp_path / "books" / "c.png").write_text("1")
    sources = [str(tmp_path / "books"), str(tmp_path / "books" / "a.txt"), "builtin", "-", "hf:org/name:test"]
    described = describe_sources([*sources, f"hf:{tmp_path / 'books'}"])
    assert described == [
        {"name": "books", "files": 2, "bytes": 8},
        {"name": "a.txt", "files": 1, "bytes": 5},
        {"name": "builtin"},
        {"name": "-"},
        {"name": "hf:org/name:test"},
        {"name": "hf:books:train"},
    ]
