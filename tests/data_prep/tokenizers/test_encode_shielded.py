"""Special tokens where a text may have them, and the pieces of a text."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data_prep.tokenizers.tokenizer import Tokenizer

WORDS = ["the", "▁the", "▁", "t", "h", "e", "a", "▁a", "x", "m", "<", ">", "the▁", "thea"]
TEXTS = st.lists(st.sampled_from(["the", " ", "a", "<x>", "<m>", " <m> ", "<", "x>"]), max_size=7).map("".join)


def tokenizer_with(prefix: str) -> Tokenizer:
    """A Unigram vocabulary with a space before the first word of a text, or before none."""
    entries = [("<unk>", -9.0), *((word, -1.0 - len(word) / 9) for word in WORDS)]
    backend = Backend(models.Unigram(entries, 0, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prefix, split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme=prefix, split=False)
    backend.add_special_tokens([AddedToken("<x>", normalized=False), AddedToken("<m>", lstrip=True, rstrip=True)])
    return Tokenizer(backend)


TOKENIZERS = {prefix: tokenizer_with(prefix) for prefix in ("first", "never")}


def names_of(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [tokenizer._backend.id_to_token(token) for token in ids]


@pytest.mark.parametrize("prefix", TOKENIZERS)
@given(text=TEXTS, places=st.lists(st.integers(0, 30), max_size=3))
def test_no_token_extends_over_a_cut(prefix, text, places):
    tokenizer = TOKENIZERS[prefix]
    cuts = sorted(min(place, len(text)) for place in places)
    pieces = tokenizer.encode_shielded(text, text, cuts)
    said = ["".join(names_of(tokenizer, piece)).replace("▁", "") for piece in pieces]
    spans = itertools.pairwise([0, *cuts, len(text)])
    if "m>" not in text and "x>" not in text:
        assert said == [text[start:stop].replace(" ", "") for start, stop in spans]
    assert "".join(said) == text.replace(" ", "")
    (whole,) = tokenizer.encode_shielded(text, text)
    special = {tokenizer.special_tokens[name] for name in ("<x>", "<m>")}
    assert [t for t in itertools.chain(*pieces) if t in special] == [t for t in whole if t in special]


@pytest.mark.parametrize("prefix", TOKENIZERS)
@given(text=TEXTS)
def test_what_is_shielded_is_text(prefix, text):
    tokenizer = TOKENIZERS[prefix]
    assert tokenizer.encode_shielded(text, "\uffff" * len(text)) == [tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("prefix", "text", "cuts", "pieces"),
    [
        ("first", "the", [], [["▁the"]]),
        ("first", "thethe", [3], [["▁the"], ["the"]]),  # only the first word gets a space
        ("first", "the", [2], [["▁", "t", "h"], ["e"]]),
        ("first", "the a", [3], [["▁the"], ["▁a"]]),
        ("first", "<x>a<x>a", [3, 4], [["<x>"], ["a"], ["<x>", "a"]]),
        ("first", "the  <m>  a", [4], [["▁the", "<m>"], ["a"]]),  # the spaces belong to the special token
        ("first", "the  <m>  a", [10], [["▁the", "<m>"], ["a"]]),
        ("never", "a<x>a", [2], [["a", "<x>"], ["a"]]),
        ("never", "aa", [0, 0, 2], [[], [], ["a", "a"], []]),
    ],
)
def test_pieces_are_encoded_as_parts_of_their_text(prefix, text, cuts, pieces):
    tokenizer = TOKENIZERS[prefix]
    found = tokenizer.encode_shielded(text, text, cuts)
    assert [[name.strip() for name in names_of(tokenizer, piece)] for piece in found] == pieces
