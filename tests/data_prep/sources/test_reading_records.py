"""Documents from records."""

from __future__ import annotations

import datetime
import decimal
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.errors import UserError
from data_prep.settings import ReadSettings
from data_prep.sources import records, tables
from data_prep.sources.documents import MOST_MESSAGES
from data_prep.sources.listing import parse_sources, parts_of
from tests.data_prep.sources.conftest import read, texts, write_records


def test_records_give_their_field_and_long_ones_are_cut(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", {"text": "short\r\n"}, {"text": "a long text\n\nof two parts", "id": 3})
    assert [(d.text, d.origin) for d in read(path, max_document_bytes=16)[0]] == [
        ("short\n", "a.jsonl:0"),
        ("a long text\n\n", "a.jsonl:22"),
        ("of two parts", "a.jsonl:22"),
    ]
    path = write_records(tmp_path / "b.jsonl", {"body": "here", "text": "not here"})
    assert texts(path, text_field="body") == ["here"]


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


def test_a_text_with_nul_is_none_in_records_as_in_files(tmp_path: Path) -> None:
    path = write_records(tmp_path / "a.jsonl", {"text": "a\0b"}, {"text": "good"})
    found, report = read(path)
    assert ([d.text for d in found], report.counts) == (["good"], {"NUL bytes": 1})
    assert report.messages == ['"a.jsonl", byte 0: NUL at character 1']
    assert texts(path, reading_rules=1) == ["a\0b", "good"]


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
