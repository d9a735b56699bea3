"""What a label in a file means: a class, a number, or one of several choices, the same in every kind of file.

``1``, ``1.0`` and ``"1"`` are one class, and so are ``true``, ``"True"`` and ``"TRUE"``: .csv files hold everything as
text, and programs that write them choose the spelling.
"""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any

from data_prep.errors import UserError
from data_prep.files import is_text
from data_prep.sources.records import HALF

WHOLE_NUMBER = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0*)?")
PADDED_NUMBER = re.compile(r"([+-]?)0*([0-9]+)")


def is_missing(value: Any) -> bool:
    """Whether a cell is empty."""
    return value is None or (isinstance(value, str) and not value.strip())


def text_of(column: str, value: str) -> str:
    """The text itself. UserError if it contains half of a surrogate pair, which no tokenizer or file can hold."""
    if not is_text(value):
        raise UserError(f'"{column}" contains {HALF}')
    return value


def class_name(column: str, value: Any, kept: Collection[str] = ()) -> str:
    """The one spelling of a class; labels in ``kept``, those of an older run, are kept as they are spelled.

    Spaces around a label do not count, nor does how Unicode composes its characters.

    Raises:
        UserError: there is no label, or it is not a class.
    """
    if is_missing(value):
        raise UserError(f'"{column}" is missing')
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float, Decimal)):
        if not math.isfinite(value) or value != int(value):
            raise UserError(f'"{column}" is {value}, which is not a class: use --task regression for numbers')
        return str(int(value))
    if not isinstance(value, str):
        raise UserError(f'"{column}" is neither text nor a whole number')
    if value in kept:
        return value
    text = unicodedata.normalize("NFC", text_of(column, value)).strip()
    if text.lower() in ("true", "false"):
        return text.lower()
    number = WHOLE_NUMBER.fullmatch(text)
    return number[1].replace("-0", "0") if number else text


def refuse_doubles(places: Mapping[str, str]) -> None:
    """Raise UserError if two classes are probably one, spelled in two ways: ``1`` and ``true``, or ``1`` and ``01``.

    ``places`` says where each class is found first.
    """
    seen: dict[str, str] = {}
    for name, place in places.items():
        number = PADDED_NUMBER.fullmatch(name)
        meaning = number[1].strip("+") + number[2] if number else {"true": "1", "false": "0"}.get(name, name)
        if seen.setdefault(meaning, name) != name:
            first = f'{places[seen[meaning]]}, has the label "{seen[meaning]}"'
            raise UserError(f'{first} and {place}, "{name}", which look like one class: spell it in one way')


def number_of(column: str, value: Any) -> float:
    """The number that a regression learns. UserError if it is none, or not finite."""
    try:
        is_number = isinstance(value, (str, int, float, Decimal)) and not isinstance(value, bool)
        number = float(value) if is_number and "_" not in str(value) else math.nan
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        hint = ": write a decimal point, and no other commas" if isinstance(value, str) and "," in value else ""
        raise UserError(f'"{column}" is {json.dumps(value, default=str)}, not a number{hint}')
    return number


def choice_of(column: str, answer: Any, choices: Sequence[str], *, typed: bool) -> int:
    """The index of the choice that an answer names by its number from 0, its letter from A, or its text.

    With ``typed``, texts and numbers differ, as in JSON: a number is a number, and a text that is one of the choices is
    that choice. Without it, as in .csv files, such a text could also be the number of another choice.

    Raises:
        UserError: it names none of the choices, or two different ones.
    """
    name = class_name(column, answer)
    by_text = by_other = -1
    other = instead = ""
    if isinstance(answer, (str, bool)):
        exact = [choice == answer for choice in choices]
        same = exact if any(exact) else [class_name(column, choice) == name for choice in choices]
        by_text = same.index(True) if any(same) else -1
    if name.isascii() and name.isdecimal() and len(name) < 6:
        by_other, other, instead = int(name), "number", "letter"
    elif len(name) == 1 and name.isascii() and name.isalpha():
        by_other, other, instead = ord(name.upper()) - ord("A"), "letter", "number"
    if 0 <= by_text != by_other and 0 <= by_other < len(choices) and not (typed and other == "number"):
        raise UserError(
            f'the answer "{name}" is the text of choice {by_text} and the {other} of choice {by_other}: '
            f"give the {instead} of the right one"
        )
    found = by_text if by_text >= 0 else by_other
    if not 0 <= found < len(choices):
        raise UserError(
            f'the answer "{name}" is none of the {len(choices)} choices: give its number from 0, its letter or its text'
        )
    return found
