from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as TokenizersTokenizer

from data_prep.errors import UserError
from data_prep.settings import TokenizerSettings
from data_prep.tokenizers import encoders
from data_prep.tokenizers.encoders import (
    ENCODERS,
    ENDS_OF_RUNS,
    PROBES,
    RUNS,
    Encoder,
    EncoderError,
    UnsuitableError,
    WordsEncoder,
    choose_encoder,
    make_encoder,
    recheck,
    runs_of,
)
from data_prep.tokenizers.tokenizer import Tokenizer
from data_prep.tokenizers.training import PATTERNS, train_tokenizer

TEXTS = [
    "It's the cat's mat, isn't it?  They'll say  so...\n\n 12 34\t56 " * 3,
    "naïve   café\r\n\x1c\x85\u3000日本 语 <|mask|>",
    "हिन्दी में हिन्दी, หน้าหน้า",
]
CHOICES = {
    "bpe": TokenizerSettings(vocab_size=265, word_split="gpt2"),
    "single digits": TokenizerSettings(vocab_size=265, word_split="gpt2", digits="single"),
    "llama3": TokenizerSettings(vocab_size=265, word_split="llama3"),
    "qwen2": TokenizerSettings(vocab_size=265, word_split="qwen2"),
    "qwen35": TokenizerSettings(vocab_size=275, word_split="qwen35"),
    "wordpiece": TokenizerSettings("wordpiece", 521),
    "unigram": TokenizerSettings("unigram", 265),
    "bytes": TokenizerSettings("bytes"),
    "characters": TokenizerSettings("characters", 280),
    "chat": TokenizerSettings(vocab_size=275, extra_tokens=("chat", "infill")),
}
INSTALLED = {name: importlib.util.find_spec(name) is not None for name in ("gigatoken", "splintr")}

any_text = st.text(st.characters(exclude_categories=["Cs"]))
awkward_text = st.text(
    st.sampled_from(
        " \t\n\r\x0b\x0c\x1c\x1d\x1e\x1f\x85\xa0\u1680\u180e\u200b\u2028\u3000\ufeff'sdtl1a.é²<|>"
        "\u0301ह\u093f\u094d\u200d१น\u0e31"
    )
)


@cache
def trained(choice: str) -> Tokenizer:
    return train_tokenizer(iter(TEXTS), CHOICES[choice])


@cache
def exact_encoders(choice: str) -> dict[str, Encoder]:
    found = {}
    for name in ENCODERS:
        try:
            found[name] = choose_encoder(trained(choice), TEXTS, name).encoder
        except UserError:
            continue
    return found


def texts_of(encoder: Encoder, texts: Sequence[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(texts)
    stops = np.cumsum(lengths)
    return [ids[stop - length : stop].tolist() for stop, length in zip(stops, lengths, strict=True)]


@given(
    texts=st.lists(st.one_of(any_text, awkward_text, st.sampled_from(TEXTS))),
    choice=st.sampled_from(sorted(CHOICES)),
)
@settings(max_examples=60, deadline=None)
def test_every_encoder_that_was_proven_gives_the_ids_of_tokenizers(texts: list[str], choice: str) -> None:
    expected = [trained(choice).encode(text) for text in texts]
    assert exact_encoders(choice).keys() >= {"tokenizers"}
    for name, encoder in exact_encoders(choice).items():
        assert texts_of(encoder, texts) == expected, name


# What each installed encoder can do; a version that does less, or silently something else, shows here.
EXPECTED = {
    "gigatoken": {"bpe", "llama3", "qwen2", "qwen35", "bytes", "characters", "chat"},
    "splintr": {"bpe", "llama3", "qwen2", "qwen35", "single digits", "chat"},
    "words": {"bpe", "llama3", "qwen2", "qwen35", "wordpiece", "unigram", "bytes", "characters", "chat"},
    "tokenizers": set(CHOICES),
}


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_are_exact_where_they_were(name: str) -> None:
    if not INSTALLED.get(name, True):
        pytest.skip(f"{name} is not installed")
    assert {choice for choice in CHOICES if name in exact_encoders(choice)} >= EXPECTED[name]


@pytest.mark.parametrize("choice", CHOICES)
def test_the_first_exact_encoder_is_chosen_and_the_others_have_reasons(choice: str) -> None:
    chosen = choose_encoder(trained(choice), TEXTS)
    assert chosen.encoder.short_name == next(iter(exact_encoders(choice)))
    names, outcomes = zip(*chosen.tried, strict=True)
    assert names[-1] == chosen.encoder.name
    assert outcomes[-1] == "exact"
    assert "exact" not in outcomes[:-1]
    assert len(names) == list(ENCODERS).index(chosen.encoder.short_name) + 1


@pytest.mark.parametrize("name", ENCODERS)
def test_arrays_are_of_the_shards_type_and_threads_change_nothing(name: str) -> None:
    if name not in exact_encoders("bpe"):
        pytest.skip(f"{name} is not installed")
    for texts in ([], ["", ""], TEXTS, ["a", "", "日"]):
        ids, lengths = make_encoder(name, trained("bpe")).encode(texts)
        assert (ids.dtype, lengths.dtype, lengths.shape) == (np.dtype("<u2"), np.dtype(np.int64), (len(texts),))
        threaded = make_encoder(name, trained("bpe"), threads=2).encode(texts)
        assert [part.tolist() for part in threaded] == [ids.tolist(), lengths.tolist()]


def test_large_vocabularies_take_four_bytes() -> None:
    encoder = TokenizersTokenizer.from_str(trained("bytes").to_json())
    encoder.add_tokens([f"word{n}" for n in range(70_000)])
    ids, _ = make_encoder("tokenizers", Tokenizer(encoder)).encode(["word69999"])
    assert (ids.dtype, ids.tolist()) == (np.dtype("<i4"), [259 + 69_999])


def altered(change: str) -> Tokenizer:
    encoder = TokenizersTokenizer.from_str(trained("bpe").to_json())
    if change == "normalizer":
        encoder.normalizer = normalizers.NFKC()
    elif change == "lower case":
        encoder.normalizer = normalizers.Lowercase()
    elif change == "prefix space":
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "no words":
        encoder.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif change == "other words":
        encoder.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    elif change == "added words":
        encoder.add_tokens(["the cat"])
    elif change == "another model":
        encoder = TokenizersTokenizer(models.WordLevel({"[UNK]": 0, "it": 1}, unk_token="[UNK]"))
        encoder.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    encoder.decoder = decoders.ByteLevel()
    return Tokenizer(encoder)


CHANGES = ["normalizer", "lower case", "prefix space", "no words", "other words", "added words", "another model"]


@pytest.mark.parametrize("change", CHANGES)
def test_foreign_tokenizers_get_an_exact_encoder_too(change: str) -> None:
    tokenizer = altered(change)
    chosen = choose_encoder(tokenizer, TEXTS)
    assert texts_of(chosen.encoder, [*PROBES, *TEXTS]) == tokenizer.encode_batch([*PROBES, *TEXTS])
    assert runs_of(tokenizer) is None
    with pytest.raises(UserError, match='the encoder "words" cannot be used here: this tokenizer does not cut'):
        choose_encoder(tokenizer, TEXTS, "words")


def test_gigatoken_is_caught_where_it_is_silently_wrong() -> None:
    if not INSTALLED["gigatoken"]:
        pytest.skip("gigatoken is not installed")
    merged_over_words = TokenizersTokenizer.from_str(trained("bpe").to_json())
    merged_over_words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    merged_over_words.model = models.BPE(
        vocab=merged_over_words.get_vocab() | {"aĠ": 265, "aĠb": 266}, merges=[("a", "Ġ"), ("aĠ", "b")]
    )
    with pytest.raises(UserError, match=r'the encoder "gigatoken" cannot be used here: token \d+ of .* should be'):
        choose_encoder(Tokenizer(merged_over_words), [], "gigatoken")


class Forgetful:
    """Loses the last token of every text that has a 7."""

    short_name = "words"
    name = "forgetful 1.0"

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        self._encoder = make_encoder("tokenizers", tokenizer)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._encoder.encode([text[:-1] if "7" in text else text for text in texts])


def test_an_encoder_that_is_wrong_for_the_sample_alone_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "PROBES", ())
    monkeypatch.setattr(encoders, "ENCODERS", {"forgetful": Forgetful, "tokenizers": ENCODERS["tokenizers"]})
    assert choose_encoder(trained("bpe"), ["abc"]).encoder.name == "forgetful 1.0"
    chosen = choose_encoder(trained("bpe"), ["abc", "a 7"])
    assert chosen.encoder.short_name == "tokenizers"
    token = trained("bpe").encode("a 7")[-1]
    assert chosen.tried[0] == ("forgetful 1.0", f"token 2 of 'a 7' is the end and should be {token}")


class Mistaken(Forgetful):
    """Reads every 7 as an 8: other tokens, as many."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        return self._encoder.encode([text.replace("7", "8") for text in texts])


@pytest.mark.parametrize("wrong", [Forgetful, Mistaken])
def test_the_probes_reveal_such_an_encoder(wrong: type[Forgetful], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "ENCODERS", {"wrong": wrong, "tokenizers": ENCODERS["tokenizers"]})
    assert choose_encoder(trained("bpe"), []).encoder.short_name == "tokenizers"


def test_a_difference_on_the_way_is_told_with_encoder_and_place() -> None:
    tokenizer = trained("bpe")
    recheck(make_encoder("words", tokenizer), tokenizer, TEXTS)
    recheck(make_encoder("words", tokenizer), tokenizer, [])
    recheck(Forgetful(tokenizer, 1), tokenizer, ["no seven here"])
    with pytest.raises(EncoderError, match=r"forgetful 1\.0 .* token 1 of '77' is the end .* --encoder tokenizers"):
        recheck(Forgetful(tokenizer, 1), tokenizer, ["fine", "77"])


class Panicking:
    """Ends like a panic in Rust, which is no ``Exception``."""

    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        raise BaseException("index out of bounds\nmore")


class Missing:
    def __init__(self, tokenizer: Tokenizer, threads: int) -> None:
        raise UnsuitableError('it is not installed ("pip install missing")')


def test_an_encoder_that_panics_or_is_missing_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {"panicking": Panicking, "missing": Missing, "tokenizers": ENCODERS["tokenizers"]}
    monkeypatch.setattr(encoders, "ENCODERS", table)
    chosen = choose_encoder(trained("bpe"), [])
    assert chosen.tried[:2] == [
        ("panicking", "it refuses: index out of bounds"),
        ("missing", 'it is not installed ("pip install missing")'),
    ]
    with pytest.raises(UserError, match='the encoder "missing" cannot be used here: it is not installed'):
        choose_encoder(trained("bpe"), [], "missing")
    with pytest.raises(UserError, match='the encoder "missing" cannot be used'):
        make_encoder("missing", trained("bpe"))


def test_an_unknown_encoder_is_refused() -> None:
    with pytest.raises(UserError, match='unknown encoder "fast": choose auto or one of gigatoken, splintr, words'):
        choose_encoder(trained("bpe"), TEXTS, "fast")


@given(text=st.one_of(any_text, awkward_text))
@settings(max_examples=300, deadline=None)
def test_no_word_of_the_patterns_reaches_over_the_border_of_a_run(text: str) -> None:
    runs = ENDS_OF_RUNS.split(text)
    assert "".join(runs) == text
    for pattern in PATTERNS.values():
        splitter = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        words = [word for run in runs if run for word, _ in splitter.pre_tokenize_str(run)]
        assert words == [word for word, _ in splitter.pre_tokenize_str(text)]


@given(text=st.one_of(any_text, awkward_text))
@settings(max_examples=300, deadline=None)
def test_no_word_of_the_encoder_reaches_over_the_border_of_a_run(text: str) -> None:
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    runs = list(RUNS.finditer(text))
    assert "".join(run[0] for run in runs) == text
    assert {run.start() for run in runs} <= {start for _, (start, _) in words}


def test_a_full_cache_is_emptied_and_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoders, "LARGEST_CACHE_CHARACTERS", 10)
    tokenizer = trained("bpe")
    encoder = WordsEncoder(tokenizer, 1)
    for _ in range(2):
        assert texts_of(encoder, TEXTS) == tokenizer.encode_batch(TEXTS)
        assert encoder._known == {}


def test_the_probes_hold_what_they_promise() -> None:
    joined = "".join(PROBES)
    assert len(set(PROBES)) == len(PROBES)
    assert "" in PROBES
    for part in (
        "\r\n",
        "\x85",
        "\u2028",
        "\u200d",
        "\ue000",
        "\U0010ffff",
        "<|endoftext|>",
        "'s",
        "'S",
        "\0",
        "हि",
        "\n\u0e31",
        "1\u0301",
    ):
        assert part in joined
    assert max(len(word) for word in joined.split()) >= 5000
