"""Marked text does what plain text does, and keeps its marks where it keeps its characters."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.inference.marked_text import STAND_INS, marked_kind

MARKS = marked_kind("<|>/suer.")
TEXTS = st.text("<|>/suer. \nxß", max_size=14)
CUTS = {
    "strip": lambda text, part: text.strip(),
    "strip these": lambda text, part: text.strip(part),
    "lstrip": lambda text, part: text.lstrip(part or None),
    "rstrip": lambda text, part: text.rstrip(part or None),
    "slice": lambda text, part: text[len(part) : -1 : 2],
    "last": lambda text, part: text[-1:],
    "backwards": lambda text, part: text[::-1],
    "split": lambda text, part: text.split(),
    "split once": lambda text, part: text.split(None, 1),
    "split by": lambda text, part: text.split(part or "|"),
    "split by at most": lambda text, part: text.split(part or "|", 2),
    "rsplit": lambda text, part: text.rsplit(None, 1),
    "rsplit by": lambda text, part: text.rsplit(part or "<", 1),
    "splitlines": lambda text, part: text.splitlines(),
    "splitlines with ends": lambda text, part: text.splitlines(True),
    "partition": lambda text, part: text.partition(part or ">"),
    "rpartition": lambda text, part: text.rpartition(part or ">"),
    "removeprefix": lambda text, part: text.removeprefix(part),
    "removesuffix": lambda text, part: text.removesuffix(part),
    "characters": lambda text, part: list(text),
    "remove": lambda text, part: text.replace(part or "x", ""),
}
OTHERS = {
    "replace": lambda text, part: text.replace(part, "<new>"),
    "replace two": lambda text, part: text.replace(part, "<new>", 2),
    "before": lambda text, part: part + text,
    "after": lambda text, part: text + part,
    "twice": lambda text, part: text * 2 + 2 * text,
    "join": lambda text, part: text.join([part, "a", "b"]),
    "joined": lambda text, part: part.join([text, "a", text]),
    "changes": lambda text, part: [text.upper(), text.title(), text.capitalize(), text.center(20, "<")],
    "equal": lambda text, part: (text == part, text != part, text < part, part <= text, hash(text) == hash(part)),
    "in": lambda text, part: (part in text, text in [part, "<"], {part: 1}.get(text)),
    "found": lambda text, part: (text.find(part), text.rfind(part), text.count(part), len(text), bool(text)),
    "starts": lambda text, part: (text.startswith(part), text.endswith((part, "x")), text.isspace(), text.isalpha()),
    "format": lambda text, part: [f"{text}|{part}", f"{text:>20}", "%s" % text, repr(text), repr([text])],  # noqa: UP031
}


@pytest.mark.parametrize("operation", CUTS)
@given(text=TEXTS, part=TEXTS)
def test_what_is_cut_off_marked_text_is_marked(operation, text, part):
    cut = CUTS[operation]
    for same in (part, MARKS.marked(part)):
        assert cut(MARKS.marked(text), same) == marked(cut(text, part))
        assert raw(cut(MARKS.marked(text), same)) == raw(marked(cut(text, part)))


@pytest.mark.parametrize("operation", OTHERS)
@given(text=TEXTS, part=TEXTS)
def test_marked_text_acts_as_plain_text(operation, text, part):
    done = OTHERS[operation]
    for same in (part, MARKS.marked(part)):
        assert MARKS.plain(done(MARKS.marked(text), same)) == done(text, part)


def marked(value):
    """Every string in a result marked."""
    if isinstance(value, str):
        return MARKS.marked(value)
    return type(value)(map(marked, value)) if isinstance(value, (list, tuple)) else value


def raw(value):
    """The code points of each string, stand-ins included."""
    return json.dumps(value)


def test_stand_ins_stay_where_other_text_is_added():
    text = "<|" + MARKS.marked(" user <") + "|>"
    assert MARKS.shielded(text) == "<| \uffff\uffff\uffff\uffff \uffff|>"
    assert MARKS.shielded(text.strip("<|>")) == " \uffff\uffff\uffff\uffff "


def test_an_alphabet_larger_than_the_stand_ins_marks_its_first_characters():
    alphabet = "".join(map(chr, range(0x4E00, 0x4E00 + len(STAND_INS) + 9)))
    text = marked_kind(alphabet).marked(alphabet)
    assert text == alphabet
    assert marked_kind(alphabet).shielded(text).count("\uffff") == len(STAND_INS)
