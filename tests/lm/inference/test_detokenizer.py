from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.settings import TokenizerSettings
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import train_tokenizer
from lm.inference.detokenizer import Detokenizer
from tests.conftest import sentences


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    return train_tokenizer(iter([]), TokenizerSettings("bytes"))


def pieces_of(tokenizer: Tokenizer, tokens: list[int], **settings) -> list[str]:
    """What is given out, empty pieces aside."""
    stream = Detokenizer(tokenizer, **settings)
    pieces = [stream.add(token) for token in tokens] + [stream.finish()]
    return [piece for piece in pieces if piece]


@given(st.text(st.characters(codec="utf-8"), max_size=20))
def test_streamed_pieces_are_whole_characters_and_add_up_to_the_text(byte_tokenizer, text):
    pieces = pieces_of(byte_tokenizer, (byte_tokenizer.encode(text)))
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    assert len(pieces) == len(text)  # one token is a byte, so each piece is one character


def test_an_emoji_arrives_in_one_piece(byte_tokenizer):
    assert (pieces_of(byte_tokenizer, (byte_tokenizer.encode("a🎉é")))) == ["a", "🎉", "é"]


def test_special_tokens_have_no_text(byte_tokenizer):
    ids = [byte_tokenizer.end_of_text_id, *byte_tokenizer.encode("a"), byte_tokenizer.mask_id]
    assert (pieces_of(byte_tokenizer, (ids))) == ["a"]


def test_a_character_that_was_never_finished_is_shown_as_unreadable(byte_tokenizer):
    tokens = byte_tokenizer.encode("ok 🎉")[:-1]
    assert "".join(pieces_of(byte_tokenizer, tokens)) == "ok \ufffd"


def test_unreadable_bytes_do_not_swallow_the_character_after_them():
    tokenizer = train_tokenizer(iter([]), TokenizerSettings("bytes"))
    of_byte = {tokenizer.decode_bytes([i]): i for i in range(3, tokenizer.vocab_size)}
    for content in (b"\xf0\x9f" + "😀".encode(), b"a\xc3" + "é".encode() + b"\xff", b"\xe2\x82b"):
        tokens = [of_byte[bytes([byte])] for byte in content]
        assert "".join(pieces_of(tokenizer, tokens)) == content.decode("utf-8", "replace")


def expected_cut(text: str, stops: tuple[str, ...]) -> str:
    """The text before the stop string that is complete first, character by character."""
    for end in range(len(text) + 1):
        if complete := [stop for stop in stops if text[:end].endswith(stop)]:
            return text[: end - max(map(len, complete))]
    return text


@given(text=st.text("abcé", max_size=14), stops=st.lists(st.text("abcé", min_size=1, max_size=4), max_size=3))
def test_text_ends_before_the_first_stop_string_however_it_arrives(byte_tokenizer, text, stops):
    stream = Detokenizer(byte_tokenizer, stops)
    shown = ""
    for token in byte_tokenizer.encode(text):
        shown += stream.add(token)
        assert expected_cut(text, tuple(stops)).startswith(shown)  # nothing has to be taken back
    shown += stream.finish()
    assert shown == expected_cut(text, tuple(stops))
    assert stream.stopped == any(stop in text for stop in stops)


@pytest.mark.parametrize(("kind", "size"), [("wordpiece", 600), ("unigram", 300), ("characters", 300), ("bpe", 300)])
def test_spaces_and_characters_come_as_the_whole_text_has_them(kind, size):
    text = sentences(60, 0)
    tokenizer = train_tokenizer(iter([text]), TokenizerSettings(tokenizer_kind=kind, vocab_size=size))
    ids = tokenizer.encode(text[:400])
    whole = tokenizer.decode_bytes(ids).decode()
    for cut in (0, 1, 7, 30):
        before = tokenizer.decode_bytes(ids[:cut]).decode()
        assert before + "".join(pieces_of(tokenizer, ids[cut:], after=ids[:cut])) == whole


def test_tokens_whose_text_depends_on_neighbours_keep_their_spaces():
    """As sentencepiece's tokenizers have them: the space before a word is dropped only at the start of the text."""
    description = json.loads(train_tokenizer(iter([sentences(60, 0)]), TokenizerSettings(vocab_size=300)).to_json())
    vocab = {"<|endoftext|>": 0, "<|pad|>": 1, "<|mask|>": 2, "▁one": 3, "▁two": 4, "s": 5}
    vocab |= {f"<0x{byte:02X}>": 6 + n for n, byte in enumerate("é".encode())}
    description["model"] |= {"vocab": vocab, "merges": [], "byte_fallback": True}
    description["added_tokens"] = description["added_tokens"][:3]
    description["pre_tokenizer"] = description["normalizer"] = None
    description["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    tokenizer = Tokenizer.from_json(json.dumps(description))
    assert not tokenizer.has_bytes
    assert pieces_of(tokenizer, [3, 4, 5, 6, 7, 4]) == ["one", " two", "s", "é", " two"]
    assert pieces_of(tokenizer, [4, 5], after=[3, 3]) == [" two", "s"]
    assert pieces_of(tokenizer, [4, 6], after=[3])[-1] == "\ufffd"
