from __future__ import annotations

import hashlib
import re
import string
import unicodedata

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning import ngrams
from data_prep.cleaning.ngrams import WordHashes, ngram_hashes, ngram_hashes_of_lengths, plain_words

some_words = st.lists(st.sampled_from(["a", "b", "c", "ä", "a b"]), max_size=30)
ascii_text = st.text(st.sampled_from([chr(code) for code in range(128)]), max_size=60)


@given(st.one_of(ascii_text, st.text(max_size=60)))
def test_words_are_runs_of_word_characters_of_the_composed_text_in_lower_case(text: str) -> None:
    assert plain_words(text) == re.findall(r"\w+", unicodedata.normalize("NFC", text).lower())


@given(st.text(st.sampled_from(string.ascii_letters + "äéñ 'ー!"), max_size=40))
def test_words_are_the_same_for_both_spellings_of_a_letter(text: str) -> None:
    assert plain_words(unicodedata.normalize("NFD", text)) == plain_words(text)


@given(some_words, st.integers(1, 6))
def test_runs_of_words_are_equal_just_where_their_hashes_are(words: list[str], length: int) -> None:
    hashes = ngram_hashes(WordHashes().of(words), length).tolist()
    runs = [tuple(words[i : i + length]) for i in range(len(words) - length + 1)]
    assert len(hashes) == len(runs)
    assert len(set(zip(hashes, runs, strict=True))) == len(set(hashes)) == len(set(runs))


@given(some_words, st.sets(st.integers(1, 8), min_size=1))
def test_several_lengths_at_once_are_the_lengths_one_by_one(words: list[str], lengths: set[int]) -> None:
    hashes = WordHashes().of(words)
    together = list(ngram_hashes_of_lengths(hashes, lengths))
    assert len(together) == len(lengths)
    for found, length in zip(together, sorted(lengths), strict=True):
        assert np.array_equal(found, ngram_hashes(hashes, length))


def test_a_run_of_one_word_is_its_hash_and_more_are_a_polynomial() -> None:
    first, second = (int.from_bytes(hashlib.blake2b(w, digest_size=8).digest(), "little") for w in (b"one", b"two"))
    hashes = WordHashes().of(["one", "two"])
    assert ngram_hashes(hashes, 1).tolist() == [first, second]
    assert ngram_hashes(hashes, 2).tolist() == [(first * 0x9E3779B97F4A7C15 + second) % 2**64]


def test_the_words_remembered_are_bounded_and_forgetting_changes_no_hash(monkeypatch) -> None:
    monkeypatch.setattr(ngrams, "MOST_WORDS_KEPT", 10)
    hashes = WordHashes()
    words = [f"word{number}" for number in range(100)] + ["x" * 1000]
    assert np.array_equal(hashes.of(words + words), np.tile(WordHashes().of(words), 2))
    assert len(hashes) <= 10
    assert "x" * 1000 not in hashes
