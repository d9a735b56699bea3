from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.sources.documents import MOST_MESSAGES, ReadReport, one_line

reports = st.builds(
    ReadReport,
    st.integers(0, 9),
    st.integers(0, 9),
    st.dictionaries(st.sampled_from(["a", "b"]), st.integers(1, 9)),
    st.lists(st.text(), max_size=MOST_MESSAGES),
)


@given(first=reports, second=reports, third=reports)
def test_merging_reports_adds_and_is_associative(first: ReadReport, second: ReadReport, third: ReadReport) -> None:
    def merged(*found: ReadReport) -> ReadReport:
        total = ReadReport()
        for report in found:
            total.merge(ReadReport(**json.loads(json.dumps(asdict(report)))))
        return total

    total = merged(first, second, third)
    assert total == merged(first, merged(second, third)) == merged(merged(first, second), third)
    assert total.documents == first.documents + second.documents + third.documents
    assert sum(total.counts.values()) == sum(sum(r.counts.values()) for r in (first, second, third))
    assert total.messages == (first.messages + second.messages + third.messages)[:MOST_MESSAGES]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("books/é 日.txt", "books/é 日.txt"),
        ("new\nline", r"new\nline"),
        ('a "b"', r"a \"b\""),
        ("\udcff\u2028", r"\udcff\u2028"),
        ("back\\slash", r"back\\slash"),
    ],
)
def test_names_are_shown_on_one_line(name: str, shown: str) -> None:
    assert one_line(name) == shown


@given(names=st.lists(st.text(), min_size=2, max_size=2, unique=True))
def test_different_names_are_shown_differently_and_can_be_written(names: list[str]) -> None:
    first, second = map(one_line, names)
    assert first != second
    assert first.encode("utf-8").decode().isprintable()
