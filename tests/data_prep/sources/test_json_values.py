"""The reader of .json files compared with ``json.loads``."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from typing import Any

import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources import json_values
from data_prep.sources.json_values import rows_of_json
from data_prep.sources.storage import Stream
from data_prep.sources.tables import BadRow
from tests.data_prep.sources.conftest import SmallBlocks


def rows(content: str | bytes, block: int = 3, text_field: str = "") -> list[dict[str, Any] | BadRow]:
    stream = SmallBlocks(io.BytesIO(content.encode("utf-8") if isinstance(content, str) else content), block)
    numbers, found = zip(*rows_of_json(stream, text_field), strict=True) if content else ((), ())
    assert list(numbers) == list(range(1, len(numbers) + 1))
    return list(found)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=9)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)
records = st.lists(st.dictionaries(st.text(max_size=6), values, max_size=4), min_size=2, max_size=5)


@given(
    made=records,
    block=st.integers(1, 50),
    indent=st.sampled_from([None, 2]),
    ascii_only=st.booleans(),
    between=st.sampled_from(["\n", "\r\n", " ", ""]),
    mark=st.sampled_from(["", "\ufeff"]),
)
@settings(max_examples=100, deadline=None)
def test_arrays_and_sequences_give_what_json_gives_in_any_blocks(
    made: list[dict[str, Any]], block: int, indent: int | None, ascii_only: bool, between: str, mark: str
) -> None:
    written = json.dumps(made, indent=indent, ensure_ascii=ascii_only)
    one_by_one = between.join(json.dumps(each, indent=indent, ensure_ascii=ascii_only) for each in made)
    for content in (written, one_by_one):
        # Halves of surrogate pairs are JSON, but no UTF-8.
        data = (mark + content + "\n").encode("utf-8", "surrogatepass")
        if b"\xed" not in data:
            assert rows(data, block) == made


@pytest.mark.parametrize("orient", ["records", "columns"])
@pytest.mark.parametrize("lines", [False, True])
def test_what_pandas_writes_is_read(orient: Any, lines: bool) -> None:
    if lines and orient != "records":
        return
    made = [{"text": f"text {number}", "n": number} for number in range(12)]
    assert rows(pandas.DataFrame(made).to_json(orient=orient, lines=lines)) == made


def test_one_object_holds_columns_or_a_list_of_records_or_is_one() -> None:
    made = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    assert rows(json.dumps({"text": ["a", "b"], "n": [1, 2]})) == made
    assert rows(json.dumps({"version": "1.1", "data": made})) == made
    assert rows(json.dumps({"data": made, "more": made})) == [{"data": made, "more": made}]
    assert rows(json.dumps({"text": ["a", "b"], "n": [1]})) == [{"text": ["a", "b"], "n": [1]}]
    document = {"text": "one", "spans": made}
    assert rows(json.dumps(document)) == made
    assert rows(json.dumps(document), text_field="text") == [document]
    assert rows("{}") == [{}]


@pytest.mark.parametrize(
    ("content", "kept", "why"),
    [
        ('[{"a": 1}, {"a" 2}, {"a": 3}]', [{"a": 1}], "so the rest of the file cannot be read"),
        ('[{"a": 1}, {"a": 2}', [{"a": 1}, {"a": 2}], "the array does not end"),
        ('[{"a": 1}] tail', [{"a": 1}], "more after the end"),
        ('{"a": 1}\n{"a" 2}\n{"a": 3}\n', [{"a": 1}, {"a": 3}], "not JSON"),
        ('{"a": 1}\nword\n{"a": 3}\nlast', [{"a": 1}, {"a": 3}], "not JSON"),
        ('{"a": 1}\n[1]\n', [{"a": 1}], "not a JSON object"),
        ('["a", {"a": 1}]', [{"a": 1}], "not a JSON object"),
        ('{"a": 1}\n' + "[" * 100_000, [{"a": 1}], "nested too deeply"),
        ('{"a": 1}\n{"a": ' + "9" * 5000 + '}\n{"a": 3}', [{"a": 1}, {"a": 3}], "too many digits"),
        ('[{"a": 1}, {"a": ' + "9" * 5000 + "}]", [{"a": 1}], "too many digits"),
    ],
)
def test_what_is_broken_is_told_and_the_rest_kept(content: str, kept: list[Any], why: str) -> None:
    for block in (1, 7, 1 << 20):
        found = rows(content, block)
        assert [row for row in found if isinstance(row, dict)] == kept
        assert any(why in row.why for row in found if isinstance(row, BadRow))


def test_an_array_is_not_held_and_a_record_that_is_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = 0

    class Endless(Stream):
        def blocks(self, size: int = 0) -> Iterator[bytes]:
            nonlocal blocks
            yield b"["
            while True:
                blocks += 1
                yield b'{"text": "word word word"},' * 100

    stream = rows_of_json(Endless(io.BytesIO(), "x"))
    for _ in range(1000):
        next(stream)
    assert blocks < 20
    monkeypatch.setattr(json_values, "MAX_VALUE_CHARACTERS", 1000)
    (found,) = rows('[{"text": "' + "w" * 100_000 + '"}]', 100)
    assert isinstance(found, BadRow) and found.reason == "record too long"
