from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import sys
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from lm.data.example_files import rows_of

ROWS = [{"text": "one, two", "label": "1"}, {"text": 'a "b"', "label": "0"}, {"text": "naïve\nline", "label": "1"}]
JSON_LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def csv_text(between: str) -> str:
    def quoted(value: str) -> str:
        return '"' + value.replace('"', '""') + '"'

    return "".join(between.join(map(quoted, row)) + "\n" for row in (ROWS[0], *(r.values() for r in ROWS)))


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


@pytest.mark.parametrize("packing", PACKERS)
def test_every_kind_of_file_gives_the_same_rows_with_their_places(tmp_path, packing):
    contents = {
        "a.jsonl": JSON_LINES,
        "b.NDJSON": "\ufeff" + JSON_LINES,
        "c.csv": "\ufeff" + csv_text(","),
        "d.tsv": csv_text("\t").replace("\n", "\r\n"),
        "e.CSV": csv_text(";"),
        "f.json": json.dumps(ROWS, indent=1),
        "g.Json": json.dumps({name: [row[name] for row in ROWS] for name in ROWS[0]}),
        "h.parquet": "",
    }
    for name, content in contents.items():
        path = tmp_path / f"{name}{packing}"
        path.write_bytes(PACKERS[packing](content.encode()))
        if name == "h.parquet":
            path = tmp_path / name
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
        found = list(rows_of(path))
        assert [row for _, row in found] == ROWS, name
        word = {"f": "record", "g": "record", "h": "row"}.get(name[0], "line")
        assert found[1][0] == f"{path}, {word} {3 if name[0] in 'cde' else 2}"


def test_a_dataset_folder_is_read_through_the_datasets_library(tmp_path):
    (tmp_path / "train.jsonl").write_text(JSON_LINES)
    (tmp_path / "test.jsonl").write_text('{"text": "only", "label": "0"}\n')
    assert [row for _, row in rows_of(f"hf:{tmp_path}")] == ROWS
    assert list(rows_of(f"hf:{tmp_path}:test")) == [(f"hf:{tmp_path}:test, row 1", {"text": "only", "label": "0"})]
    with pytest.raises(UserError, match=r'cannot read the dataset .* split "dev"'):
        list(rows_of(f"hf:{tmp_path}:dev"))


def test_standard_input_is_json_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b'{"text": "a"}\n\n{"text": "b"}\n')))
    assert list(rows_of("-")) == [
        ("standard input, line 1", {"text": "a"}),
        ("standard input, line 3", {"text": "b"}),
    ]


@given(
    lines=st.lists(st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=5), max_size=8),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    last=st.booleans(),
)
@settings(max_examples=100, deadline=None)
def test_a_text_file_has_a_text_for_each_line_blank_or_not(lines, newline, last):
    lines = ["a", *(line.lstrip("\ufeff") for line in lines), "z"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.TXT"
        path.write_bytes((newline.join(lines) + (newline if last else "")).encode())
        found = list(rows_of(path, lines_as="sentence"))
    assert [row["sentence"] for _, row in found] == lines
    assert [place for place, _ in found] == [f"{path}, line {number}" for number in range(1, len(lines) + 1)]


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
        ("a.jsonl", b'{"a": "x", "b": "\\ud83d"}\n', r'line 1: "b" contains half of a surrogate pair \(\\ud83d\)'),
        ("a.jsonl", b'{"a": 1}\n{"a": [{"b": "\\uDC00"}]}\n', 'line 2: "a" contains half of a surrogate pair'),
        ("a.jsonl", b'{"a": 1, "\\ud83d": 2}\n', "line 1: .* contains half of a surrogate pair"),
        ("a.json", b'[{"a": "x"}, {"a": "\\ud83d"}]', 'record 2: "a" contains half of a surrogate pair'),
        ("a.json", b'[{"a": "\xff"}]', r"record 1: not UTF-8 \(byte 0xff\): convert the file to UTF-8"),
        ("a.json", b'[{"a": 1}, {"a" 2}]', "record 2: not JSON"),
        ("a.csv", b"a,b\n1,2\n1,\xe9\n", r"a.csv, line 3: not UTF-8 \(byte 0xe9\): convert the file to UTF-8"),
        ("a.csv", b"a,\xe9\n1,2\n", r"a.csv, line 1: not UTF-8 \(byte 0xe9\)"),
        ("a.tsv", b"a\tb\n1\t2\t3\n", "a.tsv, line 2: the row has 3 columns, the header 2"),
        ("a.csv", b"a,b,a\n1,2,3\n", 'a.csv, line 1: the header has 2 columns named "a"'),
        ("a.csv", "a,b\n1,2\n".encode("utf-16"), "is UTF-16, not UTF-8: convert the file"),
        ("a.csv", JSON_LINES.encode(), 'a.csv looks like JSON lines: give it a name that ends in ".jsonl"'),
        ("a.jsonl", gzip.compress(b"x"), 'a.jsonl looks like gzip data: give it a name that ends in ".gz"'),
        ("a.docx", b"", "the file must end in one of .jsonl, .ndjson, .json, .csv, .tsv, .parquet"),
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


def test_a_long_field_is_read(tmp_path):
    for name, between in (("a.csv", ","), ("a.tsv", "\t")):
        (tmp_path / name).write_text(f"text{between}label\n{'word ' * 28_000}{between}a\nshort{between}b\n")
        assert [len(row["text"]) for _, row in rows_of(tmp_path / name)] == [140_000, 5]


def test_a_table_may_have_a_column_without_a_name(tmp_path):
    (tmp_path / "a.csv").write_text(",text\n0,foo\n1,bar\n")  # as pandas writes its index
    assert [row for _, row in rows_of(tmp_path / "a.csv")] == [{"": "0", "text": "foo"}, {"": "1", "text": "bar"}]
