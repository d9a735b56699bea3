from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Engine
from tokenizers import decoders, normalizers, pre_tokenizers

from data_prep import encoding
from data_prep.encoding import RUNS, FastEncoder, encode_in_order, splits_at_words
from data_prep.tokenizers import KINDS, Tokenizer, train_tokenizer

TEXTS = [
    "It's the cat's mat, isn't it?  They'll say  so...\n\n 12 34\t56 " * 3,
    "naïve   café\r\n\x1c\x85\u3000日本 语",
]


@cache
def trained(kind: str) -> Tokenizer:
    return train_tokenizer(iter(TEXTS), kind, 265)


def encode_with_engine(tokenizer: Tokenizer, texts: Sequence[str]) -> list[int]:
    return [token for text in texts for token in [*tokenizer.encode(text), tokenizer.end_of_text_id]]


any_text = st.text(st.characters(exclude_categories=["Cs"]))
awkward_text = st.text(
    st.sampled_from(list(" \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u200b\u2028\u3000\ufeff'sdtl1a.é²"))
)


@given(texts=st.lists(st.one_of(any_text, awkward_text, st.sampled_from(TEXTS))), kind=st.sampled_from(KINDS))
@settings(max_examples=400, deadline=None)
def test_word_by_word_gives_the_tokens_of_the_engine(texts: list[str], kind: str) -> None:
    tokenizer = trained(kind)
    assert splits_at_words(tokenizer)
    encoded = FastEncoder(tokenizer).encode(texts)
    assert encoded.tokens.tolist() == encode_with_engine(tokenizer, texts)
    assert encoded.lengths.tolist() == [len(tokenizer.encode(text)) + 1 for text in texts]
    assert encoded.words == [len(text.split()) for text in texts]


@given(text=st.one_of(any_text, awkward_text))
@settings(max_examples=300, deadline=None)
def test_no_word_of_the_engine_reaches_over_the_border_of_a_run(text: str) -> None:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    runs = list(RUNS.finditer(text))
    assert "".join(run[0] for run in runs) == text
    assert {run.start() for run in runs} <= {start for _, (start, _) in words}


def altered(change: str) -> Tokenizer:
    engine = Engine.from_str(trained("bpe").to_json())
    if change == "normalizer":
        engine.normalizer = normalizers.NFKC()
    elif change == "prefix space":
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "no words":
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif change == "other words":
        engine.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
    elif change == "added words":
        engine.add_tokens(["the cat"])
    engine.decoder = decoders.ByteLevel()
    return Tokenizer(engine)


@pytest.mark.parametrize("change", ["normalizer", "prefix space", "no words", "other words", "added words"])
def test_tokenizers_that_look_across_words_are_left_to_the_engine(change: str) -> None:
    tokenizer = altered(change)
    assert not splits_at_words(tokenizer)
    assert FastEncoder(tokenizer).encode(TEXTS).tokens.tolist() == encode_with_engine(tokenizer, TEXTS)


def test_a_full_cache_is_emptied_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "LARGEST_CACHE_CHARACTERS", 10)
    tokenizer = trained("bpe")
    encoder = FastEncoder(tokenizer)
    for _ in range(2):
        assert encoder.encode(TEXTS).tokens.tolist() == encode_with_engine(tokenizer, TEXTS)
        assert encoder._known == {}


def test_large_vocabularies_take_four_bytes() -> None:
    engine = Engine.from_str(trained("bytes").to_json())
    engine.add_special_tokens([f"<{n}>" for n in range(2**16)])
    assert FastEncoder(Tokenizer(engine)).encode(["abc"]).tokens.dtype == np.int32
    assert FastEncoder(trained("bytes")).encode(["abc"]).tokens.dtype == np.uint16


@pytest.mark.parametrize("workers", [1, 3])
def test_results_come_in_order_whatever_the_number_of_workers(workers: int) -> None:
    tokenizer = trained("bpe")
    batches = [(n, [f"text {n} " * (20 - n), "cat"]) for n in range(20)]
    results = list(encode_in_order(iter(batches), tokenizer, workers))
    assert [label for label, _ in results] == list(range(20))
    for (_, texts), (_, encoded) in zip(batches, results, strict=True):
        assert encoded.tokens.tolist() == encode_with_engine(tokenizer, texts)


def test_only_a_bounded_number_of_batches_waits() -> None:
    asked = 0

    def batches() -> object:
        nonlocal asked
        for n in range(40):
            asked += 1
            yield n, ["cat"]

    results = encode_in_order(batches(), trained("bytes"), 2)
    next(results)
    assert asked <= 5
    results.close()


def test_a_killed_worker_is_told_in_a_sentence() -> None:
    with pytest.raises(ChildProcessError, match="a worker process was killed"):
        for _ in encode_in_order(((n, ["cat"]) for n in range(100)), trained("bytes"), 2):
            for child in multiprocessing.active_children():
                child.kill()
