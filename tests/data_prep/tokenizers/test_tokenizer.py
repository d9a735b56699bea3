from __future__ import annotations

import hashlib
import json
import random
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from data_prep.errors import UserError
from data_prep.settings import END_OF_TEXT, KINDS, MASK, PADDING, TokenizerSettings
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.report import tokenizer_report
from data_prep.tokenizers.tokenizer import BYTE_CHARACTERS, BYTE_OF_CHARACTER, Tokenizer
from data_prep.tokenizers.training import train_tokenizer

STEMS = ["cat", "mat", "the", "other", "there", "walk", "talk", "sing", "onset", "mathematic", "wander", "light"]
TEXTS = [
    " ".join(f"{stem} {stem}s, {stem}ed and {stem}ing" for stem in STEMS * 2) + "\n\n",
    "naïve café – 12 + 345 = 357\tübung " * 4,
]
VOCABULARY = 275

any_text = st.text(st.characters(exclude_categories=["Cs"]))
awkward_text = st.text(st.sampled_from(list(" \t\n\r\x0b\x1c\x1f\x85\xa0\u2028\u3000'sdt1a é▁Ġ<|>\U0001f469\u200d\0")))


@cache
def trained(kind: str) -> Tokenizer:
    size = 256 + VOCABULARY if kind == "wordpiece" else VOCABULARY  # it has every byte twice
    return train_tokenizer(iter(TEXTS), TokenizerSettings(tokenizer_kind=kind, vocab_size=size))


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(request.param)


def test_special_tokens_have_the_first_ids_and_the_kind_is_known(tokenizer: Tokenizer) -> None:
    assert (tokenizer.end_of_text_id, tokenizer.padding_id, tokenizer.mask_id) == (0, 1, 2)
    assert tokenizer.decode([0, 1, 2]) == END_OF_TEXT + PADDING + MASK
    assert tokenizer.decode_bytes([0, 1, 2]) == b""


@given(text=st.one_of(any_text, awkward_text), kind=st.sampled_from(KINDS))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_unchanged(text: str, kind: str) -> None:
    tokenizer = trained(kind)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(3 <= token < tokenizer.vocab_size for token in ids)
    assert b"".join(tokenizer.decode_bytes([token]) for token in ids) == text.encode()


AWKWARD = {
    "spaces": "   a  b   ",
    "crlf": "a\r\nb\rc\n\r",
    "joined emoji": "👩\u200d👩\u200d👧 🏳️\u200d🌈",
    "byte token": "<0x41><0xFF>",
    "special tokens": f"{END_OF_TEXT}{PADDING}{MASK} <unk></s>",
    "metaspace": "▁a▁",
    "byte characters": "ĠĊé" + "".join(BYTE_CHARACTERS),
    "nul": "\0a\0",
    "long run": "a" * 5000,
    "long spaces": " " * 5000 + "a",
    "empty": "",
}


@pytest.mark.parametrize("text", AWKWARD.values(), ids=AWKWARD.keys())
def test_awkward_text_comes_back_unchanged(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert min(ids, default=3) >= 3, "a text became a special token"


def test_a_cut_sequence_gives_the_bytes_of_a_cut_text(tokenizer: Tokenizer) -> None:
    text = "日本語 👩\u200d👩 naïve"
    ids = tokenizer.encode(text)
    for stop in range(len(ids)):
        assert text.encode().startswith(tokenizer.decode_bytes(ids[:stop]))
        tokenizer.decode(ids[:stop])  # may replace, must not fail


def test_batches_encode_like_single_texts(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS) == [tokenizer.encode(text) for text in TEXTS]


def test_byte_characters_are_those_of_the_library() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in "aé日\U0001f469\n \0":
        seen = byte_level.pre_tokenize_str(character)[0][0]
        assert bytes(BYTE_OF_CHARACTER[c] for c in seen) == character.encode()
    assert sorted(BYTE_OF_CHARACTER.values()) == list(range(256))


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = load_tokenizer(path)
    assert loaded.sha256 == tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.kind == tokenizer.kind
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_scores_are_rounded_to_what_the_library_reads_exactly() -> None:
    rng = random.Random(0)
    pieces = [(f"w{n}", -20 * rng.random()) for n in range(3000)]
    tokenizer = Tokenizer.from_json(Backend(models.Unigram(pieces, unk_id=0)).to_str())
    kept = json.loads(tokenizer.to_json())["model"]["vocab"]
    assert [score for _, score in kept] == [round(score, 9) for _, score in pieces]


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"not json"])
def test_a_damaged_tokenizer_file_is_a_user_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(path)


def test_a_missing_tokenizer_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no tokenizer file"):
        load_tokenizer(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="not a tokenizer"):
        load_tokenizer(tmp_path)


def foreign(words: list[str]) -> str:
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend.to_str()


def test_special_tokens_of_other_tokenizers_are_found() -> None:
    tokenizer = Tokenizer.from_json(foreign(["[UNK]", "[PAD]", "hello", "[SEP]", "[MASK]"]))
    assert (tokenizer.end_of_text_id, tokenizer.padding_id, tokenizer.mask_id) == (3, 1, 4)
    assert (tokenizer.vocab_size, tokenizer.kind) == (5, "wordlevel")
    assert tokenizer.encode("hello there") == [2, 0]


def test_special_tokens_that_lack_are_added_at_the_end() -> None:
    tokenizer = Tokenizer.from_json(foreign(["[UNK]", "hello", "world"]))
    assert (tokenizer.end_of_text_id, tokenizer.padding_id, tokenizer.mask_id) == (3, 4, 5)
    assert tokenizer.vocab_size == 6
    assert tokenizer.decode_bytes([1, 3, 2]) == b"hello world"
    assert Tokenizer.from_json(tokenizer.to_json()).sha256 == tokenizer.sha256


def test_padding_and_truncation_of_a_foreign_file_are_ignored() -> None:
    backend = Backend.from_str(foreign(["[UNK]", "hello"]))
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    assert Tokenizer.from_json(backend.to_str()).encode("hello hello hello") == [1, 1, 1]


def test_added_words_of_a_foreign_byte_level_file_keep_their_bytes() -> None:
    backend = Backend(models.BPE(vocab={c: i for i, c in enumerate(BYTE_CHARACTERS)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(["two words"])
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer.decode_bytes(tokenizer.encode("a two words é")) == "a two words é".encode()


def test_token_text_is_readable_on_one_line() -> None:
    tokenizer = trained("bytes")
    shown = [tokenizer.token_text(tokenizer.encode(c)[0]) for c in ("a", " ", "\n", "é")]
    assert shown == ["a", " ", "\\n", "\\xc3"]
    assert tokenizer.token_text(2) == MASK


def test_bytes_cut_from_any_text_decode_to_themselves() -> None:
    for kind in KINDS:
        tokenizer = trained(kind)
        table = {tokenizer.decode_bytes([token]): token for token in reversed(range(tokenizer.vocab_size))}
        assert {bytes([byte]) for byte in range(256)} <= table.keys()
        content = bytes(range(256)) + b"\xff\xfe\xed\xa0\x80"  # no UTF-8 in any way
        assert tokenizer.decode_bytes([table[bytes([byte])] for byte in content]) == content


def test_tokens_of_other_characters_in_a_byte_level_file_are_their_own_text() -> None:
    vocabulary = {c: i for i, c in enumerate([*BYTE_CHARACTERS, "日本"])}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.decoder = decoders.ByteLevel()
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer.decode_bytes([256]) == "日本".encode() == tokenizer.decode([256]).encode()


def test_the_report_counts_what_can_be_counted_by_hand() -> None:
    tokenizer = train_tokenizer(iter(["ab日"]), TokenizerSettings(tokenizer_kind="characters", vocab_size=262))
    found = tokenizer_report(tokenizer, ["ab ba", "日é"])
    assert found["special_tokens"] == {END_OF_TEXT: 0, PADDING: 1, MASK: 2}
    assert (found["texts"], found["words"], found["text_bytes"]) == (2, 3, 10)
    # a, b and 日 are tokens; the space and the two halves of é are bytes
    assert found["tokens"] == 8
    assert found["bytes_per_token"] == 10 / 8
    assert found["tokens_per_word"] == 8 / 3
    assert (found["fallback_bytes"], found["fallback_share"]) == (2, 0.2)
    assert found["unused_tokens"] == 259 - 6
    assert found["unused_share"] == 253 / 259
    assert found["longest_tokens"][0] == "日"
    assert found["unknown_tokens"] == 0


def test_the_report_counts_what_a_foreign_tokenizer_loses() -> None:
    tokenizer = Tokenizer.from_json(foreign(["[UNK]", "[PAD]", "hello", "[SEP]", "[MASK]"]))
    assert tokenizer_report(tokenizer, ["hello you there"])["unknown_tokens"] == 2
    assert tokenizer_report(tokenizer, [])["bytes_per_token"] is None
