from __future__ import annotations

import random
from functools import cache

import pytest

from data_prep.settings import TokenizerSettings
from data_prep.tokenizers import fast_bpe, training
from data_prep.tokenizers.encoder_probes import PROBES
from data_prep.tokenizers.fast_bpe import _last_occurs, _train, fast_merges, is_installed
from data_prep.tokenizers.text_spool import TextSpool
from data_prep.tokenizers.training import train_tokenizer

needs_gigatoken = pytest.mark.skipif(not is_installed(), reason="gigatoken is not installed")


@cache
def texts() -> list[str]:
    rng = random.Random(1)
    syllables = ["ka", "to", "mi", "ren", "sol", "ver", "a", "qui", "den", "é", "ß", "ha", "日", "'s", "7", "  ", "\n"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 5))) for _ in range(3000)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    spelled = ["<|mask|> and <|endoftext|>, <|endoftext|><|pad|>"] * 50  # special tokens are only text in training
    return [" ".join(rng.choices(words, weights, k=300)) for _ in range(120)] + spelled + list(PROBES)


@pytest.fixture(autouse=True)
def small_texts_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "SMALLEST_TEXT_BYTES", 1)


@needs_gigatoken
@pytest.mark.parametrize("vocab_size", [259, 1200])
def test_both_trainers_give_the_same_file(vocab_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    extra_tokens = ("<|x|>",) if vocab_size > 259 else ()
    settings = TokenizerSettings(vocab_size=vocab_size, word_split="gpt2", extra_tokens=extra_tokens)
    with TextSpool(texts()) as spool:
        assert fast_merges(spool, vocab_size - len(settings.special_tokens), 2) is not None
    fast = train_tokenizer(iter(texts()), settings)
    monkeypatch.setattr(training, "is_installed", lambda: False)
    assert train_tokenizer(iter(texts()), settings).to_json() == fast.to_json()


@needs_gigatoken
def test_the_number_of_threads_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    with TextSpool(texts()) as spool:
        for threads in ("1", "2", "3"):
            monkeypatch.setenv("RAYON_NUM_THREADS", threads)
            found.append(_train(spool.path, 1200))
    assert found[0]
    assert found[0] == found[1] == found[2]


@needs_gigatoken
def test_a_vocabulary_that_only_pairs_seen_once_could_fill_is_refused() -> None:
    with TextSpool(texts()) as spool:
        assert fast_merges(spool, 3500, 2) is None
        assert fast_merges(spool, 3500, 1) is not None


def test_a_merge_is_counted_where_it_is_made() -> None:
    # "bc" is in every text, but where an "a" stands before it the merge of "ab" comes first
    merges = [("a", "b"), ("b", "c")]
    with TextSpool(["abc abc", "abc bc"]) as spool:
        assert _last_occurs(merges, spool, 1)
        assert not _last_occurs(merges, spool, 2)


@pytest.mark.parametrize("answer", [None, [("x", "y")]])
def test_a_library_that_fails_or_differs_on_the_sample_is_not_used(
    answer: list[tuple[str, str]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fast_bpe, "_train", lambda path, size: answer)
    monkeypatch.setattr(training, "is_installed", lambda: True)
    with TextSpool(texts()) as spool:
        assert fast_merges(spool, 300, 2) is None
    used = train_tokenizer(iter(texts()), TokenizerSettings(vocab_size=300, word_split="gpt2"))
    monkeypatch.setattr(training, "is_installed", lambda: False)
    assert used.sha256 == train_tokenizer(iter(texts()), TokenizerSettings(vocab_size=300, word_split="gpt2")).sha256


def test_a_child_that_dies_is_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_bpe, "PROGRAM", "raise SystemExit(1)")
    with TextSpool(texts()) as spool:
        assert fast_merges(spool, 300, 2) is None


def test_small_texts_are_left_to_tokenizers_and_need_no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(len(text.encode()) for text in texts())
    asked = []
    monkeypatch.setattr(training, "is_installed", lambda: True)
    monkeypatch.setattr(training, "fast_merges", lambda spool, *_: asked.append(list(spool.texts())))
    hashes = set()
    for smallest in (size + 1, size, size - len(texts()[-1].encode())):
        monkeypatch.setattr(training, "SMALLEST_TEXT_BYTES", smallest)
        hashes.add(train_tokenizer(iter(texts()), TokenizerSettings(vocab_size=300, word_split="gpt2")).sha256)
    assert asked == [texts()]  # only the last time was there a text beyond
    assert len(hashes) == 1
