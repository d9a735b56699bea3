from __future__ import annotations

import io
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.sources.text_files import (
    boundary_at,
    cut_at_blank_lines,
    cut_at_separators,
    cut_by_size,
    decode,
    is_local,
    limited,
    normalize_newlines,
    separator_reach,
    wide_encoding,
)

any_bytes = st.one_of(st.binary(), st.text(st.sampled_from("ab é日😀\n\n\n\r")).map(str.encode))
text_with_lines = st.text(st.sampled_from("ab é日😀\n\n\n")).map(str.encode)


def in_blocks(content: bytes, size: int) -> list[bytes]:
    return [content[at : at + size] for at in range(0, len(content), size)]


@given(content=any_bytes, block=st.integers(1, 9), max_bytes=st.integers(16, 30))
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_bytes_and_fit_however_they_came(content: bytes, block: int, max_bytes: int) -> None:
    pieces = list(cut_by_size(in_blocks(content, block), max_bytes))
    assert b"".join(piece for _, piece in pieces) == content
    assert all(0 < len(piece) <= max_bytes for _, piece in pieces)
    assert all(content[offset:].startswith(piece) for offset, piece in pieces)
    assert [offset for offset, _ in pieces] == list(itertools.accumulate((len(p) for _, p in pieces[:-1]), initial=0))[
        : len(pieces)
    ]
    assert pieces == list(cut_by_size([content], max_bytes))


@given(content=text_with_lines, max_bytes=st.integers(16, 30))
@settings(max_examples=300, deadline=None)
def test_a_piece_ends_at_the_best_place_that_fits(content: bytes, max_bytes: int) -> None:
    pieces = [piece for _, piece in cut_by_size([content], max_bytes)]
    for piece, following in itertools.pairwise(pieces):
        if b"\n\n" in piece:
            assert piece.endswith(b"\n\n")
        elif b"\n" in piece:
            assert piece.endswith(b"\n")
        else:
            assert len(piece) + len(following.decode()[0].encode()) > max_bytes


@given(text=st.text(st.sampled_from("ab日\n\r"), max_size=120), max_bytes=st.integers(16, 30))
@settings(max_examples=300, deadline=None)
def test_no_cut_parts_a_windows_newline_or_a_character(text: str, max_bytes: int) -> None:
    pieces = [normalize_newlines(piece).decode() for _, piece in cut_by_size([text.encode()], max_bytes)]
    assert "".join(pieces) == text.replace("\r\n", "\n").replace("\r", "\n")


def test_the_cut_is_at_blank_line_then_line_end_then_character() -> None:
    def cut(text: str, max_bytes: int) -> list[str]:
        return [piece.decode() for _, piece in cut_by_size([text.encode()], max_bytes)]

    assert cut("one\n\ntwo\nthree\n\nfour and", 20) == ["one\n\ntwo\nthree\n\n", "four and"]
    assert cut("one\r\n\r\ntwo\r\nthree\r\n\r\nfour", 20) == ["one\r\n\r\n", "two\r\nthree\r\n\r\nfour"]
    assert cut("one\r\rtwo\rthree three", 16) == ["one\r\r", "two\rthree three"]
    assert cut("one\rtwo and three\r\nx", 18) == ["one\r", "two and three\r\nx"]
    assert cut("one\ntwo three four", 16) == ["one\n", "two three four"]
    assert cut("日本語日本語", 16) == ["日本語日本", "語"]


@given(content=any_bytes, max_bytes=st.integers(16, 30))
@settings(max_examples=300, deadline=None)
def test_borders_never_decrease_and_part_no_character_or_newline(content: bytes, max_bytes: int) -> None:
    file = io.BytesIO(content)
    borders = [boundary_at(file, nominal, max_bytes) for nominal in range(1, len(content) + 1)]
    assert borders == sorted(borders)
    assert all(nominal <= border <= len(content) for nominal, border in enumerate(borders, start=1))
    for border in borders:
        assert content[border - 1 : border + 1] != b"\r\n"
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    for border in borders:
        content[:border].decode()


def test_a_border_is_after_a_blank_line_then_a_newline_then_a_character() -> None:
    file = io.BytesIO("one\ntwo\n\nthree\r\n\r\n日".encode())
    assert boundary_at(file, 1, 16) == 9
    assert boundary_at(file, 10, 16) == 18
    assert boundary_at(file, 1, 5) == 4
    assert boundary_at(file, 19, 16) == 21


def expected_documents(content: bytes, separator: str) -> list[tuple[int, bytes]]:
    """From the definition: what ``re.split`` gives, with offsets; nothing after a separator that ends the file."""
    found, at = [], 0
    for match in re.finditer(re.escape(separator).replace("\\\n", "\r?\n").encode(), content):
        found.append((at, content[at : match.start()]))
        at = match.end()
    return [*found, (at, content[at:])] if at < len(content) else found


separators = st.sampled_from(["\n", "ab", "\nab", "<|x|>", "b\n"])


@given(
    content=st.lists(st.sampled_from(["a", "b", "\n", "\r\n", "日", "<|x|>", "\nab"]), max_size=60).map(
        lambda pieces: "".join(pieces).encode()
    ),
    separator=separators,
    block=st.integers(1, 20),
    borders=st.lists(st.integers(1, 80)),
    max_bytes=st.sampled_from([16, 1000]),
)
@settings(max_examples=500, deadline=None)
def test_separated_documents_are_the_same_for_all_spans(
    content: bytes, separator: str, block: int, borders: list[int], max_bytes: int
) -> None:
    raw = separator.encode()
    found = []
    for start, stop in itertools.pairwise([0, *sorted(b for b in borders if b < len(content)), len(content)]):
        blocks = in_blocks(content[max(0, start - separator_reach(raw)) :], block)
        found += list(cut_at_separators(blocks, raw, max_bytes, start=start, stop=stop))
    expected = [
        (offset + at, piece)
        for offset, document in expected_documents(content, separator)
        for at, piece in (list(cut_by_size([document], max_bytes)) or [(0, b"")])
    ]
    assert found == expected


@pytest.mark.parametrize(
    ("separator", "local"), [("\n", True), ("ab", True), ("\n\n", False), ("aba", False), ("---", False), ("<x>", True)]
)
def test_only_separators_that_cannot_overlap_themselves_are_local(separator: str, local: bool) -> None:
    assert is_local(separator.encode()) is local


def test_self_overlapping_separators_are_found_from_the_left() -> None:
    assert list(cut_at_separators([b"a\n", b"\n\nb"], b"\n\n", 100)) == [(0, b"a"), (3, b"\nb")]


@given(content=st.binary(), block=st.integers(1, 9), size=st.integers(1, 40))
def test_limited_blocks_are_the_first_bytes(content: bytes, block: int, size: int) -> None:
    assert b"".join(limited(in_blocks(content, block), size)) == content[:size]


@given(text=st.text(st.sampled_from("a\r\n")))
def test_newlines_become_equal(text: str) -> None:
    assert normalize_newlines(text.encode()).decode() == io.StringIO(text, newline=None).read()


@given(content=any_bytes)
def test_decoding_agrees_with_python_on_the_first_bad_byte(content: bytes) -> None:
    text, bad = decode(content, "replace")
    assert text == content.decode("utf-8", "replace")
    try:
        assert (content.decode(), -1) == decode(content, "skip")
    except UnicodeDecodeError as error:
        assert decode(content, "skip") == (None, error.start)
        assert bad == error.start


def test_byte_order_marks_of_wide_encodings_are_known() -> None:
    assert [wide_encoding("a".encode(name)) for name in ("utf-16", "utf-32", "utf-8", "utf-8-sig")] == [
        "UTF-16",
        "UTF-32",
        None,
        None,
    ]


@given(
    content=st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\n\n", b" ", b"\t", b" \n"]), max_size=40).map(
        b"".join
    ),
    block=st.integers(1, 9),
)
@settings(max_examples=300)
def test_paragraphs_are_the_same_however_the_bytes_came(content: bytes, block: int) -> None:
    blocks = [content[start : start + block] for start in range(0, len(content), block)]
    found = list(cut_at_blank_lines(blocks, 1000))
    assert found == list(cut_at_blank_lines([content], 1000))
    assert all(content[offset : offset + len(piece)] == piece for offset, piece in found)
    plain = re.split(rb"\n(?:[ \t]*\n)+", content.replace(b"\r\n", b"\n"))
    expected = [re.sub(rb"\A(?:[ \t]*\n)+|\n[ \t\n]*\Z", b"", each) for each in plain]
    assert [piece.replace(b"\r\n", b"\n") for _, piece in found if piece.strip()] == [e for e in expected if e.strip()]
