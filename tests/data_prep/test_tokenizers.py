from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, models, pre_tokenizers

from data_prep.errors import UserError
from data_prep.tokenizers import (
    BYTE_CHARACTERS,
    BYTE_OF_CHARACTER,
    END_OF_TEXT,
    KINDS,
    MASK,
    PADDING,
    SMALLEST_VOCABULARY,
    Tokenizer,
    train_tokenizer,
)

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
    return train_tokenizer(iter(TEXTS), kind, VOCABULARY)


@pytest.fixture(params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(request.param)


def test_special_tokens_have_the_first_ids_and_the_kind_is_known(tokenizer: Tokenizer) -> None:
    assert (tokenizer.end_of_text_id, tokenizer.padding_id, tokenizer.mask_id) == (0, 1, 2)
    assert tokenizer.decode([0, 1, 2]) == END_OF_TEXT + PADDING + MASK
    assert tokenizer.decode_bytes([0, 1, 2]) == b""


@pytest.mark.parametrize("kind", KINDS)
def test_kind_and_size_are_as_asked(kind: str) -> None:
    assert trained(kind).kind == kind
    expected = {"bpe": VOCABULARY, "unigram": VOCABULARY, "bytes": 259, "characters": 259 + len(set("".join(TEXTS)))}
    assert trained(kind).vocab_size == min(expected[kind], VOCABULARY)


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


def test_byte_characters_are_those_of_the_engine() -> None:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in "aé日\U0001f469\n \0":
        seen = byte_level.pre_tokenize_str(character)[0][0]
        assert bytes(BYTE_OF_CHARACTER[c] for c in seen) == character.encode()
    assert sorted(BYTE_OF_CHARACTER.values()) == list(range(256))


def test_bpe_applies_its_merges_in_the_order_they_were_learned() -> None:
    tokenizer = trained("bpe")
    model = json.loads(tokenizer.to_json())["model"]
    rank = {tuple(merge): i for i, merge in enumerate(model["merges"])}
    for word in ("cats", "there", "other", "mathematics", "onset"):
        parts = list(word)
        while True:
            pairs = [(rank[pair], i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in rank]
            if not pairs:
                break
            i = min(pairs)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        assert tokenizer.encode(word) == [model["vocab"][part] for part in parts]


def test_unigram_takes_the_most_probable_segmentation() -> None:
    tokenizer = trained("unigram")
    pieces = json.loads(tokenizer.to_json())["model"]["vocab"]
    score = dict(pieces[3:])
    for word in ("cats", "there", "other", "mathematics", "zzz"):
        best = [0.0]
        for stop in range(1, len(word) + 1):
            best.append(max(best[a] + score[word[a:stop]] for a in range(stop) if word[a:stop] in score))
        assert sum(pieces[token][1] for token in tokenizer.encode(word)) == pytest.approx(best[-1])


def test_training_never_varies_with_threads_or_hash_seeds() -> None:
    program = (
        "from data_prep.tokenizers import train_tokenizer\n"
        "texts = [f'{w} {w[::-1]} is {n*n} to {w}s' for n, w in enumerate(['alpha', 'beta', 'gamma', 'delta'] * 50)]\n"
        "for kind in ('bpe', 'unigram', 'characters'):\n"
        "    print(train_tokenizer(iter(texts), kind, 300).sha256)\n"
    )
    outputs = set()
    for threads, seed in (("1", "1"), ("3", "2")):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        outputs.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1
    assert len(set(outputs.pop().split())) == 3


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.sha256 == tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.kind == tokenizer.kind
    assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]


def test_scores_are_rounded_to_what_the_engine_reads_exactly() -> None:
    rng = random.Random(0)
    pieces = [(f"w{n}", -20 * rng.random()) for n in range(3000)]
    tokenizer = Tokenizer.from_json(Engine(models.Unigram(pieces, unk_id=0)).to_str())
    kept = json.loads(tokenizer.to_json())["model"]["vocab"]
    assert [score for _, score in kept] == [round(score, 9) for _, score in pieces]


def test_characters_keep_the_most_frequent_ones() -> None:
    tokenizer = train_tokenizer(iter(["aaabbc日日日日"]), "characters", SMALLEST_VOCABULARY + 2)
    assert [len(tokenizer.encode(c)) for c in "a日bc"] == [1, 1, 1, 1]  # b and c fall back to their one byte
    assert tokenizer.decode_bytes([259, 260]) == "a日".encode()
    assert tokenizer.decode(tokenizer.encode("日b語")) == "日b語"


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_too_large_a_vocabulary_is_refused_with_one_that_works(kind: str) -> None:
    with pytest.raises(UserError, match="--vocab-size 8192 is more than this text can give") as caught:
        train_tokenizer(iter(TEXTS), kind, 8192)
    proposed = int(str(caught.value).split("choose at most ")[1].split(",")[0])
    assert train_tokenizer(iter(TEXTS), kind, proposed).vocab_size == proposed


@pytest.mark.parametrize("kind", ["bpe", "unigram", "characters"])
def test_a_vocabulary_below_the_bytes_is_refused(kind: str) -> None:
    with pytest.raises(UserError, match="at least 259"):
        train_tokenizer(iter(TEXTS), kind, 258)
    assert train_tokenizer(iter([]), kind, 259).decode(train_tokenizer(iter([]), kind, 259).encode("é")) == "é"


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(UserError, match='unknown tokenizer kind "wordpiece"'):
        train_tokenizer(iter(TEXTS), "wordpiece", 300)


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b'{"model": {"type": "BPE"}}', b"\xff\xfe", b"not json"])
def test_a_damaged_tokenizer_file_is_a_user_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        Tokenizer.load(path)


def test_a_missing_tokenizer_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no tokenizer file"):
        Tokenizer.load(tmp_path / "nothing.json")
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)


def foreign(words: list[str]) -> str:
    engine = Engine(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    engine.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return engine.to_str()


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
    engine = Engine.from_str(foreign(["[UNK]", "hello"]))
    engine.enable_truncation(2)
    engine.enable_padding(length=5)
    assert Tokenizer.from_json(engine.to_str()).encode("hello hello hello") == [1, 1, 1]


def test_added_words_of_a_foreign_byte_level_file_keep_their_bytes() -> None:
    engine = Engine(models.BPE(vocab={c: i for i, c in enumerate(BYTE_CHARACTERS)}, merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    engine.add_tokens(["two words"])
    tokenizer = Tokenizer.from_json(engine.to_str())
    assert tokenizer.decode_bytes(tokenizer.encode("a two words é")) == "a two words é".encode()


def test_token_text_is_readable_on_one_line() -> None:
    tokenizer = trained("bytes")
    shown = [tokenizer.token_text(tokenizer.encode(c)[0]) for c in ("a", " ", "\n", "é")]
    assert shown == ["a", " ", "\\n", "\\xc3"]
    assert tokenizer.token_text(2) == MASK
