"""The reader of .csv and .tsv files compared with the csv module and pandas."""

from __future__ import annotations

import csv
import io

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources import tables
from data_prep.sources.tables import BadRow, rows_of_table
from tests.data_prep.sources.conftest import SmallBlocks


def rows(content: bytes | str, kind: str, block: int = 3) -> list[tuple[int, list[str] | BadRow]]:
    stream = SmallBlocks(io.BytesIO(content.encode() if isinstance(content, str) else content), block)
    return list(rows_of_table(stream, kind))


def fields(content: bytes | str, kind: str) -> list[list[str] | BadRow]:
    return [row for _, row in rows(content, kind)]


cells = st.text(st.sampled_from('ab,;\t"\n\r é'), max_size=8)


@given(
    body=st.lists(st.tuples(cells, cells), max_size=6),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]),
    kind=st.sampled_from([".csv", ".tsv"]),
    block=st.integers(1, 40),
)
@settings(max_examples=300, deadline=None)
def test_what_the_csv_module_wrote_is_read_again(
    body: list[tuple[str, str]], newline: str, quoting: int, kind: str, block: int
) -> None:
    if kind == ".tsv":  # tabs and newlines in one field can look like rows with raw quotes
        body = [(one.replace("\t", "x"), two.replace("\t", "x")) for one, two in body]
    if quoting == csv.QUOTE_MINIMAL:  # the module does not quote every newline
        body = [("".join(one.split()), "".join(two.split())) for one, two in body]
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=tables.TABLES[kind], lineterminator=newline, quoting=quoting)
    writer.writerows([("id", "text"), *body])
    expected = [["id", "text"], *map(list, body)]
    assert [row for _, row in rows(text.getvalue(), kind, block)] == expected


@given(body=st.lists(st.tuples(st.text(st.sampled_from('ab" é'), min_size=1, max_size=8), st.just("1"))))
@settings(max_examples=200, deadline=None)
def test_raw_quotes_in_tsv_are_characters(body: list[tuple[str, str]]) -> None:
    body = [(text, label) for text, label in body if not (text.startswith('"') and text.endswith('"'))]
    content = "text\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in body)
    found = fields(content, ".tsv")
    assert found == [["text", "label"], *map(list, body)]
    frame = pandas.read_csv(io.StringIO(content), sep="\t", quoting=csv.QUOTE_NONE, dtype=str, keep_default_na=False)
    assert found[1:] == frame.to_numpy().tolist()


@pytest.mark.parametrize(
    ("line", "row"),
    [
        ('1\t"A B" said C.', ["1", '"A B" said C.']),
        ('1\t"unclosed', ["1", '"unclosed']),
        ('1\tsize 3" by 4"', ["1", 'size 3" by 4"']),
        ('1\t"closed"', ["1", "closed"]),
        ('1\t"do ""it"""', ["1", 'do "it"']),
        ('1\t"one\ttwo"', ["1", "one\ttwo"]),
        ('1\t"one\ntwo"', ["1", "one\ntwo"]),
        ('"one\n\ntwo"\t1', ["one\n\ntwo", "1"]),
        ('1\t""', ["1", ""]),
        ('1\t"', ["1", '"']),
        ("1\t", ["1", ""]),
    ],
)
def test_a_quoted_field_in_tsv_begins_and_ends_with_a_quote(line: str, row: list[str]) -> None:
    for end in ("", "\n", "\r\n"):
        assert fields(f"id\ttext\n{line}{end}", ".tsv") == [["id", "text"], row]
    assert fields(f'id\ttext\n0\t"x" y\n{line}\n2\tlast\n', ".tsv") == [
        ["id", "text"],
        ["0", '"x" y'],
        row,
        ["2", "last"],
    ]


@pytest.mark.parametrize("kind", [".csv", ".tsv"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_rows_carry_their_lines_with_any_newline(kind: str, newline: str) -> None:
    between = tables.TABLES[kind]
    content = newline.join(
        [f"\ufeffid{between}text", f"1{between}one", "", f"2{between}two{between}more", f"3{between}x"]
    )
    assert rows(content, kind) == [
        (1, ["id", "text"]),
        (2, ["1", "one"]),
        (4, BadRow("broken record", "the row has 3 columns, the header 2")),
        (5, ["3", "x"]),
    ]


def test_long_fields_are_read_and_too_long_ones_told(monkeypatch: pytest.MonkeyPatch) -> None:
    long = "word " * 60_000
    for kind in (".csv", ".tsv"):
        assert rows(f"text{tables.TABLES[kind]}n\n{long}{tables.TABLES[kind]}1\n", kind, 1 << 16)[1] == (2, [long, "1"])
    monkeypatch.setattr(tables, "MAX_FIELD_CHARACTERS", 50)
    monkeypatch.setattr(tables, "MAX_LINE_BYTES", 100)
    for kind in (".csv", ".tsv"):
        between = tables.TABLES[kind]
        content = f"text{between}n\n{'y' * 60}{between}1\n{'z' * 200}{between}2\nlast{between}3\n"
        told = {line: row.reason for line, row in rows(content, kind) if isinstance(row, BadRow)}
        assert told == {2: "record too long", 3: "record too long"}
        assert ["last", "3"] in fields(content, kind)


@pytest.mark.parametrize(
    ("content", "header"),
    [
        ("id,text\n", ["id", "text"]),
        (",text\n", ["", "text"]),
        ("id;text\n", ["id", "text"]),
        ("id\ttext\n", ["id", "text"]),
        ("text\n", ["text"]),
        ("a;b,c\n", ["a;b", "c"]),
        ("text,text\n", BadRow("broken record", 'the header has 2 columns named "text": rename them')),
        (",\n", BadRow("broken record", "the header has no names: the first line must name the columns")),
    ],
)
def test_the_header_names_the_columns_and_shows_what_separates_them(content: str, header: list[str] | BadRow) -> None:
    assert fields(content, ".csv") == [header]
    assert fields(content + ("1,2\n" if isinstance(header, BadRow) else ""), ".csv") == [header]


def test_a_quote_that_never_closes_takes_no_more_lines_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MOST_LINES_OF_FIELD", 5)
    content = 'id\ttext\n1\t"open\n' + "no tab\n" * 20 + "2\tlast\n"
    found = fields(content, ".tsv")
    assert found[1] == ["1", '"open'] and found[-1] == ["2", "last"] and len(found) == 23
