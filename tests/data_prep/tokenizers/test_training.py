from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from data_prep.errors import UserError
from data_prep.settings import SPECIAL_TOKENS, TOKEN_SETS, TokenizerSettings
from data_prep.tokenizers.encoder_probes import PROBES
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import (
    INSIDE_WORD,
    LLAMA3_WORDS,
    QWEN35_WORDS,
    train_tokenizer,
)

STEMS = ["cat", "mat", "the", "other", "there", "walk", "talk", "sing", "onset", "mathematic", "wander", "light"]
TEXTS = [
    " ".join(f"{stem} {stem}s, {stem}ed and {stem}ing" for stem in STEMS * 2) + "\n\n",
    "naïve café – 12 + 345 = 357\tübung " * 4,
]
VOCABULARY = 320
CHOICES = {
    "bpe": TokenizerSettings(vocab_size=VOCABULARY, word_split="gpt2"),
    "wordpiece": TokenizerSettings("wordpiece", 256 + VOCABULARY),  # it has every byte twice
    "unigram": TokenizerSettings("unigram", 275),
    "bytes": TokenizerSettings("bytes"),
    "characters": TokenizerSettings("characters", VOCABULARY),
    "single digits": TokenizerSettings(vocab_size=VOCABULARY, word_split="gpt2", digits="single"),
    "llama3": TokenizerSettings(vocab_size=VOCABULARY, word_split="llama3"),
    "qwen2": TokenizerSettings(vocab_size=VOCABULARY, word_split="qwen2"),
    "qwen35": TokenizerSettings(vocab_size=VOCABULARY),
    "chat": TokenizerSettings(vocab_size=VOCABULARY, extra_tokens=("chat", "infill", "<|x|>")),
    "unigram chat": TokenizerSettings("unigram", 279, extra_tokens=("chat",)),
    "wordpiece chat": TokenizerSettings("wordpiece", 256 + VOCABULARY, extra_tokens=("chat",)),
    "bytes chat": TokenizerSettings("bytes", extra_tokens=("chat",)),
    "characters chat": TokenizerSettings("characters", VOCABULARY, extra_tokens=("chat",)),
}

any_text = st.text(st.characters(exclude_categories=["Cs"]))
awkward_text = st.lists(
    st.sampled_from([*" \t\n\r\x0b\x1c\x85\xa0\u2028'sdt1a9é▁⁀#Ġ²<|>\U0001f469", "<|user|>", "<|mask|>"])
).map("".join)


@cache
def trained(choice: str) -> Tokenizer:
    return train_tokenizer(iter(TEXTS), CHOICES[choice])


@given(text=st.one_of(any_text, awkward_text), choice=st.sampled_from(sorted(CHOICES)))
@settings(max_examples=300, deadline=None)
def test_any_text_comes_back_unchanged_and_never_as_a_special_token(text: str, choice: str) -> None:
    tokenizer = trained(choice)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode_bytes(ids) == text.encode()
    assert all(len(CHOICES[choice].special_tokens) <= token < tokenizer.vocab_size for token in ids)


@pytest.mark.parametrize("choice", CHOICES)
def test_the_probes_come_back_unchanged(choice: str) -> None:
    tokenizer = trained(choice)
    first_ordinary = len(CHOICES[choice].special_tokens)
    for ids, probe in zip(tokenizer.encode_batch(PROBES), PROBES, strict=True):
        assert tokenizer.decode(ids) == probe
        assert min(ids, default=first_ordinary) >= first_ordinary


@pytest.mark.parametrize("choice", CHOICES)
def test_kind_size_and_special_tokens_are_as_asked(choice: str) -> None:
    tokenizer, asked = trained(choice), CHOICES[choice]
    assert tokenizer.kind == asked.tokenizer_kind
    specials = [*SPECIAL_TOKENS, *[t for name in asked.extra_tokens for t in TOKEN_SETS.get(name, (name,))]]
    assert tokenizer.special_tokens == {name: number for number, name in enumerate(specials)}
    alone = len(specials) + 256
    expected = {"bytes": alone, "characters": min(asked.vocab_size, alone + len(set("".join(TEXTS))))}
    assert tokenizer.vocab_size == expected.get(asked.tokenizer_kind, asked.vocab_size)


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


def test_wordpiece_takes_the_longest_piece_first() -> None:
    tokenizer = trained("wordpiece")
    vocabulary = json.loads(tokenizer.to_json())["model"]["vocab"]
    for word in ("cats", "therewith", "mathematician", "###", "walkingtalking", "q" * 64):
        expected, start = [], 0
        while start < len(word):
            mark = INSIDE_WORD if start else ""
            stop = next(stop for stop in range(len(word), start, -1) if mark + word[start:stop] in vocabulary)
            expected.append(vocabulary[mark + word[start:stop]])
            start = stop
        assert tokenizer.encode(word) == expected
    assert tokenizer.decode_bytes(tokenizer.encode("##a")) == b"##a"


def test_wordpiece_learns_the_pair_that_occurs_most() -> None:
    settings = TokenizerSettings("wordpiece", 515 + 2)
    tokenizer = train_tokenizer(iter(["xyz"] * 5 + ["ayz"] * 4 + ["qr"] * 2), settings)
    # y and z meet nine times inside words; then x and yz five times
    assert [tokenizer.token_text(token) for token in (515, 516)] == ["yz", "xyz"]
    assert [len(tokenizer.encode(word)) for word in ("xyz", "ayz", "qr")] == [1, 2, 2]


SPLIT_CASES = {
    # gpt2: a number is one word; single: each digit its own; llama3: up to three; qwen2: each its own
    "bpe": ["call", " 12345", " it", "'s", "\n\n", " x"],
    "single digits": ["call", " ", "1", "2", "3", "4", "5", " it", "'s", "\n\n", " x"],
    "llama3": ["call", " ", "123", "45", " it", "'s", "\n\n", " x"],
    "qwen2": ["call", " ", "1", "2", "3", "4", "5", " it", "'s", "\n\n", " x"],
    "qwen35": ["call", " ", "1", "2", "3", "4", "5", " it", "'s", "\n\n", " x", " हिन्दी", " שָׁלוֹם", "!\u0301"],
}


@pytest.mark.parametrize("choice", SPLIT_CASES)
def test_a_split_cuts_where_its_name_says(choice: str) -> None:
    words = SPLIT_CASES[choice]
    texts = ["".join(words)] * 50
    with pytest.raises(UserError) as caught:
        train_tokenizer(iter(texts), CHOICES[choice])
    largest = int(str(caught.value).split("choose at most ")[1].split(",")[0])
    # A vocabulary that can hold no more has every word whole, and no more than a word.
    tokenizer = train_tokenizer(iter(texts), replace(CHOICES[choice], vocab_size=largest))
    assert [tokenizer.decode([token]) for token in tokenizer.encode(texts[0])] == words


def test_single_digits_of_llama3_are_the_split_of_qwen2() -> None:
    single = TokenizerSettings(vocab_size=VOCABULARY, word_split="llama3", digits="single")
    assert train_tokenizer(iter(TEXTS), single).sha256 == trained("qwen2").sha256
    assert LLAMA3_WORDS.count("{1,3}") == 1


# llama.cpp, src/llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_QWEN35
LLAMA_CPP_QWEN35 = (
    r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
marked_text = st.lists(
    st.sampled_from(
        [*" \t\n\r.,'_!sStTléñ1²Ⅳ日", "न", "म", "ि", "\u094d", "\u200d", "१", "น", "\u0e31", "ב", "\u05b8", "\u0301"]
    )
).map("".join)


@given(text=marked_text)
@settings(max_examples=300, deadline=None)
def test_the_words_of_qwen35_are_those_of_llama_cpp(text: str) -> None:
    words = pre_tokenizers.Split(Regex(QWEN35_WORDS), behavior="isolated").pre_tokenize_str(text)
    assert [word for word, _ in words] == regex.findall(LLAMA_CPP_QWEN35, text)
    assert trained("qwen35").description["pre_tokenizer"]["pretokenizers"][0]["pattern"] == {"Regex": QWEN35_WORDS}


HINDI = "मैं हिन्दी में किताबें पढ़ता हूँ और चित्रों को देखता हूँ। "


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"word_split": "gpt2"}, "which --word-split qwen35 does not do"),
        ({"word_split": "llama3"}, "which --word-split qwen35 does not do"),
        ({"tokenizer_kind": "unigram"}, "which --tokenizer-kind bpe --word-split qwen35 does not do"),
        ({"tokenizer_kind": "wordpiece"}, "which --tokenizer-kind bpe --word-split qwen35 does not do"),
        ({}, None),
    ],
)
def test_a_split_that_cuts_at_marks_is_named_as_the_cause(changes: dict[str, str], advice: str | None) -> None:
    with pytest.raises(UserError, match="too large for this text") as caught:
        train_tokenizer(iter([HINDI] * 9), TokenizerSettings(vocab_size=2000, **changes))
    assert (advice or "or add text") in str(caught.value)
    assert ("combining marks" in str(caught.value)) == (advice is not None)
    with pytest.raises(UserError) as caught:
        train_tokenizer(iter(["plain English, naïve café. "] * 9), TokenizerSettings(vocab_size=2000, **changes))
    assert "combining marks" not in str(caught.value)


def test_training_never_varies_with_runs_threads_or_hash_seeds() -> None:
    program = (
        "from data_prep.settings import TokenizerSettings\n"
        "from data_prep.tokenizers.training import train_tokenizer\n"
        "texts = [f'{w} {w[::-1]} is {n*n} to {w}s' for n, w in enumerate(['alpha', 'beta', 'gamma', 'delta'] * 50)]\n"
        "for kind, more in (('bpe', {}), ('bpe', {'word_split': 'llama3'}), ('wordpiece', {}), ('unigram', {}),\n"
        "                   ('characters', {})):\n"
        "    size = 560 if kind == 'wordpiece' else 300\n"
        "    print(train_tokenizer(iter(texts), TokenizerSettings(kind, size, **more)).sha256)\n"
    )
    outputs = set()
    for threads, seed in (("1", "1"), ("2", "2"), ("2", "3"), ("3", "4")):
        environment = os.environ | {"RAYON_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", program]
        outputs.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1
    assert len(set(outputs.pop().split())) == 5


def test_reading_stops_at_the_bytes_to_train_on() -> None:
    taken = []

    def texts() -> object:
        for n in range(1000):
            taken.append(n)
            yield "é" * 50

    train_tokenizer(texts(), TokenizerSettings("characters", 300, train_bytes=250))
    assert len(taken) == 3


def test_characters_keep_the_most_frequent_ones() -> None:
    tokenizer = train_tokenizer(iter(["aaabbc日日日日"]), TokenizerSettings("characters", 259 + 2))
    assert [len(tokenizer.encode(c)) for c in "a日bc"] == [1, 1, 1, 1]  # b and c fall back to their one byte
    assert tokenizer.decode_bytes([259, 260]) == "a日".encode()
    assert tokenizer.decode(tokenizer.encode("日b語")) == "日b語"


@pytest.mark.parametrize("kind", ["bpe", "wordpiece", "unigram"])
def test_too_large_a_vocabulary_is_refused_with_one_that_works(kind: str) -> None:
    with pytest.raises(UserError, match="--vocab-size 8192 is too large for this text") as caught:
        train_tokenizer(iter(TEXTS), TokenizerSettings(kind, 8192))
    proposed = int(str(caught.value).split("choose at most ")[1].split(",")[0])
    assert train_tokenizer(iter(TEXTS), TokenizerSettings(kind, proposed)).vocab_size == proposed


@pytest.mark.parametrize(("kind", "least"), [("bpe", 259), ("unigram", 259), ("characters", 259), ("wordpiece", 515)])
def test_a_vocabulary_below_the_bytes_is_refused(kind: str, least: int) -> None:
    with pytest.raises(UserError, match=f"need at least {least}"):
        train_tokenizer(iter(TEXTS), TokenizerSettings(kind, least - 1))
    tokenizer = train_tokenizer(iter([]), TokenizerSettings(kind, least))
    assert tokenizer.decode(tokenizer.encode("é")) == "é"
    with pytest.raises(UserError, match=f"7 special tokens need at least {least + 4}"):
        train_tokenizer(iter(TEXTS), TokenizerSettings(kind, least, extra_tokens=("chat",)))
