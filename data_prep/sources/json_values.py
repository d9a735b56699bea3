"""Read the records of .json files: an array of objects, objects one after another, or one object that holds them.

An array is streamed, with one record in memory at a time. A single object is read whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from data_prep.sources.documents import BROKEN_RECORD, RECORD_TOO_LONG
from data_prep.sources.formats import is_cut_off
from data_prep.sources.storage import Stream
from data_prep.sources.tables import BadRow

MAX_VALUE_CHARACTERS = 64 * 2**20
_DECODER = json.JSONDecoder()
_NO_SPACE = re.compile(r"[^ \t\r\n]")

JsonRow = tuple[int, dict[str, Any] | BadRow]


def rows_of_json(stream: Stream, text_field: str = "") -> Iterator[JsonRow]:
    """Yield the number (from 1) and the object of each record, or why there is none.

    A single object holds columns if its values are lists of one length or, as pandas writes them, objects with the same
    numbers as keys. It holds records if one of its values is a list of objects. Otherwise, or if its ``text_field`` is
    text, it is one record. Bytes that are not UTF-8 arrive as lone surrogates (``surrogateescape``).
    """
    values = _Values(stream)
    if values.next_character() == "[":
        yield from enumerate(map(_object, values.of_array()), 1)
        return
    sequence = map(_object, values.one_after_another())
    first, second = next(sequence, None), next(sequence, None)
    if first is None:
        return
    if second is None and isinstance(first, dict):
        yield from enumerate(_rows_of_object(first, text_field), 1)
        return
    yield 1, first
    if second is not None:
        yield 2, second
    yield from enumerate(sequence, 3)


def _object(value: Any) -> dict[str, Any] | BadRow:
    return value if isinstance(value, (dict, BadRow)) else BadRow(BROKEN_RECORD, "not a JSON object")


def _rows_of_object(found: dict[str, Any], text_field: str) -> Iterator[dict[str, Any] | BadRow]:
    values = list(found.values())
    lists = [value for value in values if isinstance(value, list) and value and isinstance(value[0], dict)]
    if isinstance(found.get(text_field), str):
        yield found
    elif values and all(isinstance(value, list) for value in values) and len(set(map(len, values))) == 1 and not lists:
        yield from (dict(zip(found, row, strict=True)) for row in zip(*values, strict=True))
    elif values and _have_same_numbers(values):
        yield from ({name: column[number] for name, column in found.items()} for number in values[0])
    elif len(lists) == 1:
        yield from map(_object, lists[0])
    else:
        yield found


def _have_same_numbers(values: list[Any]) -> bool:
    keys = values[0].keys() if isinstance(values[0], dict) else ()
    numbered = bool(keys) and all(key.isdecimal() for key in keys)
    return numbered and all(isinstance(value, dict) and value.keys() == keys for value in values)


class _Values:
    """Decodes JSON from a stream, holding little more than one value."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._blocks = stream.blocks()
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._text = ""
        self._at = 0
        self._ended = False
        self._more()
        self._text = self._text.removeprefix("\ufeff")

    def _more(self) -> None:
        """Read at least as much as is held already, so that a long value is not decoded too often."""
        pieces, wanted = [self._text[self._at :]], max(1, len(self._text) - self._at)
        while wanted > 0 and not self._ended:
            block = next(self._blocks, b"")
            self._ended = not block
            pieces.append(self._decoder.decode(block, final=self._ended))
            wanted -= len(pieces[-1])
        self._text, self._at = "".join(pieces), 0

    def next_character(self) -> str:
        """Return the next character that is not whitespace, or "" at the end."""
        while (found := _NO_SPACE.search(self._text, self._at)) is None:
            self._at = len(self._text)
            if self._ended:
                return ""
            self._more()
        self._at = found.start()
        return found[0]

    def _value(self) -> Any:
        """Decode the value at the current place, or return a ``BadRow``."""
        while True:
            try:
                value, self._at = _DECODER.raw_decode(self._text, self._at)
                return value
            except RecursionError:
                return BadRow(BROKEN_RECORD, "not JSON (it is nested too deeply)")
            except json.JSONDecodeError as error:
                if self._ended or not is_cut_off(self._text, error):
                    return BadRow(BROKEN_RECORD, f"not JSON ({error.msg})")
                if len(self._text) - self._at > MAX_VALUE_CHARACTERS:
                    most = f"{MAX_VALUE_CHARACTERS // 2**20} MiB"
                    return BadRow(RECORD_TOO_LONG, f"longer than {most}: write an array of records, or JSON lines")
                self._more()
            except ValueError:
                return BadRow(BROKEN_RECORD, "a number has too many digits")

    def of_array(self) -> Iterator[Any]:
        """Yield the elements of the array that begins here, up to the first bad one."""
        self._at += 1
        if self.next_character() == "]":
            return
        while True:
            self.next_character()
            value = self._value()
            if isinstance(value, BadRow):
                if not (self._ended and self._stream.damage):
                    yield BadRow(value.reason, f"{value.why}, so the rest of the file cannot be read")
                return
            yield value
            following = self.next_character()
            if following == "]":
                self._at += 1
                if self.next_character():
                    yield BadRow(BROKEN_RECORD, "not JSON (there is more after the end of the array)")
                return
            if following != ",":
                if not self._stream.damage:
                    yield BadRow(BROKEN_RECORD, "not JSON (the array does not end)")
                return
            self._at += 1

    def one_after_another(self) -> Iterator[Any]:
        """Yield values until the end; after a bad one, resume in the next line."""
        while self.next_character():
            value = self._value()
            if isinstance(value, BadRow):
                if self._ended and self._stream.damage:
                    return
                self._skip_line()
            yield value

    def _skip_line(self) -> None:
        while (end := self._text.find("\n", self._at)) < 0 and not self._ended:
            self._at = len(self._text)
            self._more()
        self._at = end + 1 if end >= 0 else len(self._text)
