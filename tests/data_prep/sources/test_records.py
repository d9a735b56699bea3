from __future__ import annotations

import csv
import io
import itertools
import tempfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources import records
from data_prep.sources.records import Record, owned_lines, records_of_parquet, records_of_table, row_groups
from data_prep.sources.storage import open_raw, open_stream
from tests.data_prep.sources.conftest import SmallBlocks


def csv_records(path: Path, text_field: str = "text") -> list[Record]:
    with open_stream(str(path)) as stream, path.open("rb") as file:
        found = list(records_of_table(stream, ".csv", text_field, "skip"))
        assert list(records_of_table(SmallBlocks(file), ".csv", text_field, "skip")) == found
        return found


def parquet_records(path: Path, start: int = 0, stop: int = -1, text_field: str = "text") -> list[Record]:
    with open_raw(str(path)) as file:
        return list(records_of_parquet(file, text_field, "skip", start, stop))


@given(
    lines=st.lists(st.text(st.sampled_from("ab"), max_size=20).map(str.encode)),
    last=st.booleans(),
    borders=st.lists(st.integers(1, 60)),
)
@settings(max_examples=300, deadline=None)
def test_every_line_is_owned_by_one_span_and_long_ones_are_never_held(
    lines: list[bytes], last: bool, borders: list[int]
) -> None:
    content = b"\n".join(lines) + (b"\n" if last else b"")
    expected = [(offset, line if len(line) <= 12 else None) for offset, line in lines_with_offsets(content)]
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "MAX_RECORD_BYTES", 12)
        for start, stop in itertools.pairwise([0, *sorted(b for b in borders if b < len(content)), len(content)]):
            file = io.BytesIO(content)
            file.seek(max(0, start - 1))
            found += list(owned_lines(SmallBlocks(file), start, stop))
    assert found == expected


def lines_with_offsets(content: bytes) -> list[tuple[int, bytes]]:
    kept = content.splitlines(keepends=True)
    offsets = itertools.accumulate(map(len, kept), initial=0)
    return [(offset, line.removesuffix(b"\n")) for offset, line in zip(offsets, kept, strict=False)]


@given(
    rows=st.lists(st.tuples(st.text(st.sampled_from('ab,"\n\r é')), st.text(st.sampled_from('x"\n,'))), min_size=1),
    terminator=st.sampled_from(["\n", "\r\n"]),
)
@settings(max_examples=100, deadline=None)
def test_csv_texts_are_what_was_written(rows: list[tuple[str, str]], terminator: str) -> None:
    rows = [(f"a{text}a", other) for text, other in rows]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        with path.open("w", encoding="utf-8-sig", newline="") as file:
            csv.writer(file, lineterminator=terminator, quoting=csv.QUOTE_ALL).writerows(
                [("id", "text"), *((b, a) for a, b in rows)]
            )
        assert [record.text for record in csv_records(path)] == [text for text, _ in rows]


def test_broken_rows_are_told_with_their_line_and_the_others_kept(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'id,text\n1,good\n2,too,many\n3,"bad"quote\n4,\xff\n\xff,fine\n5,"open\n6,lost\n')
    assert [(record.number, record.text, record.reason) for record in csv_records(path)] == [
        (2, "good", ""),
        (3, None, "broken record"),
        (4, None, "broken record"),
        (5, None, "not UTF-8"),
        (6, "fine", ""),
        (7, None, "broken record"),
    ]
    assert csv_records(path)[1].why == "the row has 3 columns, the header 2"
    assert csv_records(path, "body") == [
        Record(1, None, "no text in the field", 'no text in the field "body"', ("id", "text"))
    ]


def test_any_run_of_row_groups_gives_its_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = [f"text {number}" for number in range(1000)]
    column[3:5] = ["", None]  # type: ignore[list-item]
    for kind in (pyarrow.string(), pyarrow.large_string(), pyarrow.dictionary(pyarrow.int32(), pyarrow.string())):
        table = pyarrow.table({"id": range(1000), "text": pyarrow.array(column, pyarrow.string()).cast(kind)})
        pyarrow.parquet.write_table(table, path, row_group_size=300)
        found = parquet_records(path)
        assert [(record.number, record.text) for record in found] == list(enumerate(column, start=1))
        assert found[4].reason == "no text in the field" and not found[3].reason
        assert [r for group in range(4) for r in parquet_records(path, group, group + 1)] == found
    with open_raw(str(path)) as file:
        rows, sizes = zip(*row_groups(file), strict=True)
    assert rows == (300, 300, 300, 100)
    assert 0 < sum(sizes) < path.stat().st_size
    assert parquet_records(path, text_field="body")[0].fields == ("id", "text")
    assert {record.reason for record in parquet_records(path, text_field="id")} == {"no text in the field"}


def test_parquet_text_that_is_no_utf8_is_told_and_damage_ends_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pyarrow.array([b"good", b"caf\xe9"] * 50_000).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path, row_group_size=50_000, use_dictionary=False)
    found = parquet_records(path)
    assert [(record.text, record.reason) for record in found[:2]] == [("good", ""), (None, "not UTF-8")]
    assert len(found) == 100_000
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 + 1000
    content[middle : middle + 50] = bytes(50)
    path.write_bytes(content)
    assert parquet_records(path)[-1].reason in ("damaged file", "not UTF-8")
    path.write_bytes(content[:-100])
    assert [record.reason for record in parquet_records(path)] == ["damaged file"]
    with open_raw(str(path)) as file:
        assert row_groups(file) == []
