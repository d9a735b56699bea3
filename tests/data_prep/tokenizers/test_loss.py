from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from data_prep.settings import KINDS, TokenizerSettings
from data_prep.tokenizers.loss import Loss, loss_of
from data_prep.tokenizers.report import tokenizer_report
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import train_tokenizer

TEXT = "The café sold 7 naïve FISH.\n\n  And  ①!"
# The change of a byte-level tokenizer, and the characters of TEXT that do not come back.
NORMALIZERS: dict[str, tuple[Any, str]] = {
    "lower case": (normalizers.Lowercase(), "TFISHA"),
    "no accents": (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "éï"),
    "one space": (normalizers.Replace(Regex(r"\s+"), " "), "\n\n  "),
    "no space": (normalizers.Replace(Regex(r"\s"), ""), " " * 9 + "\n\n"),
    "NFKC": (normalizers.NFKC(), "①"),
    "NFC": (normalizers.NFC(), ""),
    "strip": (normalizers.Strip(), ""),
    "none": (None, ""),
}


@cache
def byte_level(change: str) -> Tokenizer:
    backend = Backend.from_str(train_tokenizer(iter([]), TokenizerSettings("bytes")).to_json())
    backend.normalizer = NORMALIZERS[change][0]
    return Tokenizer(backend)


@pytest.mark.parametrize("change", NORMALIZERS)
def test_what_a_normalizer_drops_is_lost(change: str) -> None:
    tokenizer, lost = byte_level(change), NORMALIZERS[change][1]
    found = loss_of(tokenizer, TEXT, tokenizer.encode(TEXT))
    assert found == Loss(len(lost.encode()), 0)
    assert tokenizer.is_lossless == (change == "none")
    report = tokenizer_report(tokenizer, [TEXT, TEXT])
    assert (report["lost_bytes"], report["lost_share"]) == (2 * found.lost_bytes, found.lost_bytes / len(TEXT.encode()))


def with_unknown(kind: str, *, special: bool) -> Tokenizer:
    """A tokenizer that knows the letters a to e and the space."""
    entries = ["<unk>", "a", "b", "c", "d", "e", "▁"]
    if kind == "unigram":
        model: models.Model = models.Unigram([(entry, -2.0) for entry in entries], unk_id=0)
    elif kind == "bpe":
        model = models.BPE(vocab={entry: n for n, entry in enumerate(entries)}, merges=[], unk_token="<unk>")
    else:
        model = models.WordLevel({entry: n for n, entry in enumerate(entries)}, unk_token="<unk>")
    backend = Backend(model)
    backend.normalizer = normalizers.Replace(" ", "▁")
    if kind == "wordlevel":
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    if special:
        backend.add_special_tokens([AddedToken("<unk>", special=True)])
    return Tokenizer(backend)


@given(text=st.text(st.sampled_from("abcde xéß日😀<unk>"), max_size=30))
@settings(max_examples=100, deadline=None)
@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ["unigram", "bpe", "wordlevel"])
def test_unknown_characters_are_lost_to_the_byte(kind: str, special: bool, text: str) -> None:
    tokenizer = with_unknown(kind, special=special)
    ids = tokenizer.encode(text)
    found = loss_of(tokenizer, text, ids)
    assert found.lost_bytes == sum(len(c.encode()) for c in text if c not in "abcde ")
    assert found.unknown_tokens == ids.count(0)


@given(text=st.text(st.characters(exclude_categories=["Cs"])), kind=st.sampled_from(KINDS))
@settings(max_examples=60, deadline=None)
def test_tokenizers_trained_here_lose_nothing(text: str, kind: str) -> None:
    tokenizer = trained(kind)
    assert tokenizer.is_lossless
    assert loss_of(tokenizer, text, tokenizer.encode(text)) == Loss()


@cache
def trained(kind: str) -> Tokenizer:
    size = TokenizerSettings(kind).smallest_vocabulary
    return train_tokenizer(iter(["a text"]), TokenizerSettings(kind, size))
