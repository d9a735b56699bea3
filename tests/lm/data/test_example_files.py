from __future__ import annotations

import gzip
import io
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from data_prep.errors import UserError
from lm.data.example_files import rows_of

ROWS = [{"text": "one, two", "label": "1"}, {"text": 'a "b"', "label": "0"}, {"text": "naïve\nline", "label": "1"}]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def csv_text(between: str) -> str:
    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"'

    return "".join(between.join(map(quoted, row)) + "\n" for row in (ROWS[0], *(r.values() for r in ROWS)))


def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path):
    (tmp_path / "a.jsonl").write_text(JSON_LINES)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(JSON_LINES.encode(), mtime=0))
    (tmp_path / "c.csv").write_text("\ufeff" + csv_text(","))
    (tmp_path / "d.tsv").write_text(csv_text("\t").replace("\n", "\r\n"), newline="")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    for name in ("a.jsonl", "b.jsonl.gz", "c.csv", "d.tsv", "e.parquet"):
        found = list(rows_of(tmp_path / name))
        assert [row for _, row in found] == ROWS, name
        word, second = ("row", 2) if name == "e.parquet" else ("line", 3 if name[0] in "cd" else 2)
        assert found[1][0] == f"{tmp_path / name}, {word} {second}"


def test_a_dataset_folder_is_read_through_the_datasets_library(tmp_path):
    (tmp_path / "train.jsonl").write_text(JSON_LINES)
    (tmp_path / "test.jsonl").write_text('{"text": "only", "label": "0"}\n')
    assert [row for _, row in rows_of(f"hf:{tmp_path}")] == ROWS
    assert list(rows_of(f"hf:{tmp_path}:test")) == [(f"hf:{tmp_path}:test, row 1", {"text": "only", "label": "0"})]
    with pytest.raises(UserError, match=r'cannot read the dataset .* split "dev"'):
        list(rows_of(f"hf:{tmp_path}:dev"))


def test_standard_input_is_json_lines_and_a_text_file_a_text_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n\n{"text": "b"}\n')))
    assert list(rows_of("-")) == [
        ("standard input, line 1", {"text": "a"}),
        ("standard input, line 3", {"text": "b"}),
    ]
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert [row for _, row in rows_of(tmp_path / "a.txt", lines_as="sentence")] == [
        {"sentence": "one"},
        {"sentence": ""},
        {"sentence": "two"},
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"a": 1}\n{"a"\n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n\n[1]\n', "line 3: not a JSON object"),
        ("a.jsonl", b'{"a": "\xff"}\n', r"line 1: not UTF-8 \(byte 0xff\)"),
        ("a.jsonl.gz", gzip.compress(JSON_LINES.encode() * 9, mtime=0)[:-20], "is damaged"),
        ("a.csv", b"a,b\n1,2\n3\n", "a.csv, line 3: the row has 1 columns, the header 2"),
        ("a.csv", b'a,b\n1,"2\n', "a.csv, line 2: "),
        ("a.parquet", b"no parquet", "a.parquet, row 1: "),
        ("a.docx", b"", "the file must end in one of"),
        ("a.txt", b"text", "the file must end in one of"),
    ],
)
def test_the_first_row_that_cannot_be_read_is_reported(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        list(rows_of(tmp_path / name))
    with pytest.raises(UserError, match="there is no file"):
        list(rows_of(tmp_path / "nowhere.csv"))


def test_rows_are_not_held(tmp_path):
    (tmp_path / "a.csv").write_text("a\n1\n2\n" + "x,y\n")  # what is wrong far below is not met by who stops before
    rows = rows_of(tmp_path / "a.csv")
    assert [next(rows)[1], next(rows)[1]] == [{"a": "1"}, {"a": "2"}]
