"""A file is read as what it is under any name, or refused with what it looks like."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from data_prep.settings import READING_RULES
from data_prep.sources.formats import ENDINGS, json_kind, kind_by_rules, kind_of, table_kind, what_it_is
from data_prep.sources.listing import parse_sources, unread_files
from tests.data_prep.sources.conftest import PACKERS, read, texts

RECORDS = [{"id": number, "text": f"the old miller, number {number}"} for number in range(3)]
TEXTS = [record["text"] for record in RECORDS]


def json_lines(records: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def table(records: list[dict[str, Any]], delimiter: str) -> str:
    rows = [list(records[0]), *([str(value) for value in record.values()] for record in records)]
    quote = {",": '"', ";": '"', "\t": ""}[delimiter]
    return "".join(delimiter.join(f"{quote}{cell}{quote}" for cell in row) + "\n" for row in rows)


CONTENTS = {
    ".jsonl": json_lines(RECORDS),
    ".ndjson": json_lines(RECORDS),
    ".json": json.dumps(RECORDS, indent=1),
    ".csv": table(RECORDS, ","),
    ".tsv": table(RECORDS, "\t"),
}


@pytest.mark.parametrize("packing", ["", *PACKERS])
@pytest.mark.parametrize("ending", CONTENTS)
def test_records_are_read_by_every_ending_in_any_case_packed_or_not(tmp_path: Path, ending: str, packing: str) -> None:
    for name in (f"a{ending}{packing}", f"B{ending}{packing}".upper(), f"c{ending}{packing}".title()):
        (tmp_path / name).write_bytes(PACKERS.get(packing, bytes)(CONTENTS[ending].encode()))
        assert texts(tmp_path / name) == TEXTS, name
    assert texts(tmp_path) == 3 * TEXTS


@pytest.mark.parametrize("name", ["a.TXT", "b.Md", "c.txt.GZ", "notes", "README", "book.tex", "a.py", "x.tar"])
def test_plain_text_is_text_under_any_name(tmp_path: Path, name: str) -> None:
    pack = PACKERS[".gz"] if name.endswith("GZ") else bytes
    (tmp_path / name).write_bytes(pack(b"Some text, and more.\n"))
    assert texts(tmp_path / name) == ["Some text, and more.\n"]


def test_the_end_of_an_address_does_not_hide_the_ending() -> None:
    address = "https://example.org/data/a.jsonl.gz"
    for end in ("", "?download=true", "#top", "?name=b.txt"):
        assert kind_of(address + end) == ".jsonl"
    assert kind_of("folder/what?.csv") == ".csv"
    assert kind_of("a.parquet.gz") == ""


DATA = {
    "JSON lines": json_lines(RECORDS),
    "JSON": json.dumps(RECORDS),
    "pretty JSON": json.dumps(RECORDS[0], indent=2),
    "a long object": json.dumps({"text": "word " * 20_000, "id": 1}),
    "a table (CSV)": table(RECORDS, ","),
    "a table with semicolons": table(RECORDS, ";"),
    "a table with tabs": table(RECORDS, "\t"),
    "a byte-order mark": "\ufeff" + json_lines(RECORDS),
}
SAYS = {"pretty JSON": "JSON", "a long object": "JSON lines", "a table with semicolons": "a table (CSV)"}


@pytest.mark.parametrize("name", ["notes", "a.txt", "a.MD", "data.dat"])
@pytest.mark.parametrize("what", DATA)
def test_data_under_a_name_of_text_is_refused_and_named(tmp_path: Path, what: str, name: str) -> None:
    (tmp_path / name).write_text(DATA[what], encoding="utf-8")
    says = SAYS.get(what, "JSON lines" if what == "a byte-order mark" else what)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert f'{name}" looks like {says}: give it a name that ends in "' in str(caught.value)
    ending = str(caught.value).rsplit('"', 2)[1]
    (tmp_path / name).rename(tmp_path / f"renamed{ending}")
    assert read(tmp_path / f"renamed{ending}")[0]  # the advice helps


def binary_files() -> dict[str, bytes]:
    packed, archive, image = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr("a.txt", "text")
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("a.txt"))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), image)
    return {
        "gzip data": gzip.compress(b"text"),
        "bzip2 data": bz2.compress(b"text"),
        "xz data": lzma.compress(b"text"),
        "Zstandard data": PACKERS[".zst"](b"text"),
        "Parquet": image.getvalue(),
        "a zip archive": packed.getvalue(),
        "a tar archive": archive.getvalue(),
        "a PDF document": b"%PDF-1.7\nstream",
        "a PNG image": b"\x89PNG\r\n\x1a\n\0\0",
        "a program": b"\x7fELF\2\1",
        "not UTF-8 text (byte 0x00": np.arange(9, dtype=np.uint16).tobytes(),
        "UTF-16": "wide text".encode("utf-16"),
    }


@pytest.mark.parametrize("what", binary_files())
@pytest.mark.parametrize("name", ["a.txt", "notes", "a.csv", "a.jsonl", "a.json"])
def test_binary_files_are_refused_and_named(tmp_path: Path, what: str, name: str) -> None:
    (tmp_path / name).write_bytes(binary_files()[what])
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert what in str(caught.value)
    assert f'{name}" ' in str(caught.value)
    (tmp_path / "good.txt").write_text("good")
    documents, report = read(f"{tmp_path}/*")
    assert [d.text for d in documents] == ["good"] and sum(report.counts.values()) == 1 and what in report.messages[0]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.jsonl", CONTENTS[".json"], 'looks like JSON: .* "\\.json"'),
        ("a.jsonl", CONTENTS[".csv"], 'looks like a table \\(CSV\\): .* "\\.csv"'),
        ("a.json", CONTENTS[".tsv"], 'looks like a table with tabs: .* "\\.tsv"'),
        ("a.csv", CONTENTS[".jsonl"], 'looks like JSON lines: .* "\\.jsonl"'),
        ("a.tsv", CONTENTS[".json"], 'looks like JSON: .* "\\.json"'),
        ("a.parquet", CONTENTS[".jsonl"], 'looks like JSON lines: .* "\\.jsonl"'),
        ("a.txt.gz", gzip.compress(gzip.compress(b"twice")), "looks like gzip data"),
    ],
)
def test_one_kind_of_data_under_the_name_of_another_is_refused(
    tmp_path: Path, name: str, content: str | bytes, says: str
) -> None:
    data = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(PACKERS[".gz"](data) if name == "a.txt.gz" and data[:2] != b"\x1f\x8b" else data)
    with pytest.raises(UserError, match=says):
        read(tmp_path / name)


@pytest.mark.parametrize(
    "prose",
    [
        "Roses are red,\nViolets are blue,\nSugar is sweet,\nAnd so are you,\n",
        "床前明月光,疑是地上霜\n举头望明月,低头思故乡\n",
        '{"a": 1}\nis an object in JSON.\n',
        "[1] Smith et al.\n[2] Jones\n",
        "{curly} words\n{in} braces\n",
        "[ ] buy milk\n[x] write tests\n",
        '"Hello," she said.\n"Goodbye," he said.\n',
        "\tindented\n\tindented, too\n",
        "one line",
        '{"a": ' + "9" * 5000 + "}",
        "[" * 9999,
        "[",
        "{}",
    ],
)
def test_prose_is_not_taken_for_data(prose: str) -> None:
    assert what_it_is("", prose.encode()) == ""
    assert table_kind(prose, whole=False) == ""
    assert json_kind(prose, whole=False) == "" or prose == "["


words = st.text(st.sampled_from("abcdeé ,.;'-"), min_size=1).map(lambda text: f"a{text}z")
cells = st.one_of(words, st.integers(), st.none(), st.booleans())


@given(
    records=st.lists(st.fixed_dictionaries({"text": words, "n": cells}), min_size=2, max_size=6),
    indent=st.sampled_from([None, 1]),
    cut=st.integers(1, 40),
)
@settings(max_examples=50, deadline=None)
def test_json_is_recognized_in_every_layout_even_if_cut_off(
    records: list[dict[str, Any]], indent: int | None, cut: int
) -> None:
    for text, kind in (
        (json.dumps(records, indent=indent), ".json"),
        ("\n".join(json.dumps(record) for record in records), ".jsonl"),
        ("\n".join(json.dumps(record, indent=1) for record in records), ".json"),
    ):
        assert json_kind(text, whole=True) == kind
        first = len(json.dumps(records[0], indent=1))
        if len(text) > first + cut:
            assert json_kind(text[: first + cut], whole=False) == kind
    rows = [["text", "n"], *([str(value).replace(",", " ") for value in record.values()] for record in records)]
    assert table_kind("\n".join(map(",".join, rows)), whole=True) == ".csv"
    assert table_kind("\n".join(map("\t".join, rows)), whole=True) == ".tsv"


def test_a_folder_tells_what_it_does_not_read(tmp_path: Path) -> None:
    for name in ("a.txt", "b.PNG", "c.png", "d.png", "e.png", "sub/f.pdf", "Makefile", "g.xyz.gz", ".hidden.png"):
        (tmp_path / "mixed" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mixed" / name).write_text("x")
    assert unread_files(parse_sources([f"{tmp_path}/mixed", f"glob={tmp_path}/mixed/*.txt"]), READING_RULES) == (
        "7 files whose names end in nothing that is read: 4 .png (b.PNG, c.png, d.png, …), 1 .pdf (f.pdf), "
        "1 .xyz (g.xyz.gz), 1 without an ending (Makefile)"
    )
    assert unread_files(parse_sources([f"{tmp_path}/mixed/a.txt"]), READING_RULES) == ""
    (tmp_path / "few" / "sub").mkdir(parents=True)
    (tmp_path / "few" / "a.txt").write_text("x")
    assert unread_files(parse_sources([f"{tmp_path}/few"]), READING_RULES) == ""
    (tmp_path / "few" / "sub" / "link").symlink_to(tmp_path / "mixed")
    assert unread_files(parse_sources([f"{tmp_path}/few"]), READING_RULES) == "1 linked folder (link)"


def test_a_build_from_before_keeps_its_endings() -> None:
    old = {".txt", ".md", ".jsonl", ".csv", ".parquet"}
    for ending in ENDINGS:
        assert bool(kind_by_rules(f"a{ending}", 1)) == (ending in old)
        assert kind_by_rules(f"a{ending}".upper(), 1) == ""
        assert kind_by_rules(f"a{ending}.gz", 1) == ("" if ending == ".parquet" else kind_by_rules(f"a{ending}", 1))
