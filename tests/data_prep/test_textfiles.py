from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.textfiles import (
    BLOCK_BYTES,
    NotTextError,
    check_text_file,
    checked,
    cut_text,
    read_lines,
    read_text_blocks,
    with_equal_newlines,
)

any_text = st.text(st.characters(exclude_categories=["Cs"]))
text_with_lines = st.text(st.sampled_from("ab é日😀\n\n\n"))


@given(blocks=st.lists(st.one_of(any_text, text_with_lines)), max_bytes=st.integers(4, 30))
@settings(max_examples=300, deadline=None)
def test_pieces_join_to_the_text_and_fit_however_it_came(blocks: list[str], max_bytes: int) -> None:
    pieces = list(cut_text(blocks, max_bytes))
    assert "".join(pieces) == "".join(blocks)
    assert all(0 < len(piece.encode()) <= max_bytes for piece in pieces)
    assert pieces == list(cut_text(["".join(blocks)], max_bytes))


@given(text=text_with_lines, max_bytes=st.integers(4, 30))
@settings(max_examples=300, deadline=None)
def test_a_piece_ends_at_the_best_place_that_fits(text: str, max_bytes: int) -> None:
    pieces = list(cut_text([text], max_bytes))
    for piece, following in itertools.pairwise(pieces):
        if "\n\n" in piece:
            assert piece.endswith("\n\n")
        elif "\n" in piece:
            assert piece.endswith("\n")
        else:
            assert len((piece + following[0]).encode()) > max_bytes


def test_the_cut_is_at_blank_line_then_line_end_then_character() -> None:
    assert list(cut_text(["one\n\ntwo\nthree\n\nfour"], 15)) == ["one\n\n", "two\nthree\n\nfour"]
    assert list(cut_text(["one\ntwo three"], 10)) == ["one\n", "two three"]
    assert list(cut_text(["日本語"], 4)) == ["日", "本", "語"]


@given(content=st.one_of(st.binary(), any_text.map(str.encode)), block=st.integers(1, 7))
@settings(max_examples=300, deadline=None)
def test_the_check_agrees_with_python_on_the_first_bad_byte(content: bytes, block: int) -> None:
    try:
        content.decode("utf-8")
        bad = len(content)
    except UnicodeDecodeError as error:
        bad = error.start
    nul = content.find(b"\0")
    expected = min(bad, nul if nul >= 0 else bad)
    blocks = [content[at : at + block] for at in range(0, len(content), block)]
    try:
        assert b"".join(checked(blocks)) == content
        assert expected == len(content)
    except NotTextError as error:
        # Within one block NUL is looked for first, so it may be reported in place of an earlier bad byte.
        offset = int(str(error).split("offset ")[1].rstrip(")"))
        assert offset in (bad, nul)
        assert f"0x{content[offset]:02x}" in str(error)


@pytest.mark.parametrize("position", [0, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 5])
def test_a_bad_byte_is_found_at_any_offset(tmp_path: Path, position: int) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a" * position + b"\xff" + b"b" * 10)
    with pytest.raises(NotTextError, match=rf"is not UTF-8 text \(byte 0xff at offset {position}\)"):
        check_text_file(path)


def test_a_character_cut_off_at_the_end_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes("aé".encode()[:-1])
    with pytest.raises(NotTextError, match="byte 0xc3 at offset 1"):
        check_text_file(path)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_newlines_become_equal_even_across_blocks(tmp_path: Path, newline: str) -> None:
    lines = ["x" * 7] * (3 * BLOCK_BYTES // 8)
    path = tmp_path / "x.txt"
    path.write_bytes(newline.join(lines).encode())
    assert "".join(read_text_blocks(path)) == "\n".join(lines)
    assert with_equal_newlines(newline.join(lines)) == "\n".join(lines)


def test_only_newlines_and_the_byte_order_mark_change(tmp_path: Path) -> None:
    text = " a\tb\x0b\x0c\x1c\x85\u2028 \ufeff e\u0301 \n\n"
    path = tmp_path / "x.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert "".join(read_text_blocks(path)) == text
    assert list(read_lines(path)) == [text[:-1], "\n"]


def test_packed_files_read_like_plain_ones_and_damage_is_told(tmp_path: Path) -> None:
    text = "some text\n" * 20_000
    packed = tmp_path / "x.txt.gz"
    packed.write_bytes(gzip.compress(text.encode()))
    check_text_file(packed)
    assert "".join(read_text_blocks(packed)) == text
    whole = packed.read_bytes()
    for broken in (whole[:-20], whole[:100] + b"xxxx" + whole[104:], b"no gzip at all"):
        packed.write_bytes(broken)
        with pytest.raises(NotTextError, match="is damaged"):
            check_text_file(packed)
