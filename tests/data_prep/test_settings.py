"""The settings of a build: limits, identities, and what is said about wrong ones."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from data_prep import settings as settings_module
from data_prep.cleaning.cleaner import Cleaner
from data_prep.errors import UserError
from data_prep.settings import (
    KINDS,
    TOKEN_SETS,
    BuildSettings,
    CleaningSettings,
    ImageSettings,
    ReadSettings,
    TokenizerSettings,
    available_cores,
    control_groups,
    load_language_identifier,
    settings_of,
)
from data_prep.tokenizers.training import train_tokenizer


def test_names_are_unique_over_all_groups_and_each_is_explained() -> None:
    kinds = (ReadSettings, CleaningSettings, TokenizerSettings, BuildSettings)
    found = [each for kind in kinds for each in settings_of(kind)]
    assert len({each.name for each in found}) == len(found) == 28
    assert all(re.fullmatch(r"[A-Za-z].*[.)]", each.metadata["help"]) for each in found)


def test_options_fill_the_group_that_has_them(tmp_path: Path) -> None:
    made = BuildSettings.from_options(
        tmp_path, str(tmp_path), vocab_size=300, language="en", decontaminate=["a.txt"], errors="stop", workers=2
    )
    assert (made.sources, made.out, made.workers) == ((str(tmp_path),), tmp_path, 2)
    assert made.training == TokenizerSettings(vocab_size=300)
    assert made.reading == ReadSettings(errors="stop")
    assert made.cleaning == CleaningSettings(language=("en",), decontaminate=("a.txt",))


@pytest.mark.parametrize("given", ["a", Path("a"), ["a"], [Path("a")], (Path("a"),)])
def test_files_may_be_paths(given: Any) -> None:
    assert BuildSettings.from_options("builtin", "out", decontaminate=given).cleaning.decontaminate == ("a",)
    assert ImageSettings.from_options("builtin:digits", "out", 8, validation=given).validation == ("a",)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocabsize": 300}, 'there is no setting "vocabsize": did you mean vocab_size?'),
        ({"qqq": 1}, 'there is no setting "qqq": choose from max_document_bytes, document_per'),
        ({"vocab_size": "300"}, "vocab_size must be a whole number, not '300'"),
        ({"near_threshold": "high"}, "near_threshold must be a number, not 'high'"),
        ({"quality": "yes"}, "quality must be True or False, not 'yes'"),
        ({"extra_tokens": 3}, "extra_tokens must be a list of texts, not 3"),
        ({"extra_tokens": ["a", 3]}, "extra_tokens must be a list of texts, not ['a', 3]"),
    ],
)
def test_unknown_options_and_wrong_types_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        BuildSettings.from_options(["builtin"], "out", **options)


def test_there_is_at_least_one_core() -> None:
    assert available_cores() >= 1


@pytest.mark.parametrize(
    ("files", "generation", "cores"),
    [
        ({"cpu.max": "50000 100000\n"}, 2, 1),
        ({"cpu.max": "150000 100000\n"}, 2, 2),
        ({"cpu.max": "max 100000\n"}, 2, 64),
        ({}, 2, 64),
        ({"cpu.cfs_quota_us": "250000\n", "cpu.cfs_period_us": "100000\n"}, 1, 3),
        ({"cpu.cfs_quota_us": "-1\n", "cpu.cfs_period_us": "100000\n"}, 1, 64),
    ],
)
def test_the_quota_of_a_container_limits_the_cores(
    files: dict[str, str], generation: int, cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(
        settings_module, "control_groups", lambda controller: [(tmp_path / "none", 2), (tmp_path, generation)]
    )
    affinity = {"sched_getaffinity": lambda process: set(range(64))}
    monkeypatch.setattr(settings_module, "os", SimpleNamespace(**vars(os) | affinity))
    assert available_cores() == cores


def test_control_groups_of_both_versions_are_found_up_to_their_root(tmp_path: Path) -> None:
    (tmp_path / "membership").write_text("9:name=systemd:/\n4:cpu,cpuacct:/job/step\n1:cpuset:/\n0::/\n")
    groups = control_groups("cpu", tmp_path / "membership", tmp_path)
    assert list(groups) == [
        (tmp_path / "cpu" / "job" / "step", 1),
        (tmp_path / "cpu" / "job", 1),
        (tmp_path / "cpu", 1),
        (tmp_path, 2),
    ]
    assert list(control_groups("cpu", tmp_path / "none", tmp_path)) == []


def test_the_default_reading_settings_are_good_and_each_bad_one_has_its_sentence() -> None:
    assert list(ReadSettings().check()) == []
    assert list(ReadSettings(document_per="<|endoftext|>").check()) == []
    bad = ReadSettings(max_document_bytes=15, document_per="", text_field="", errors="ignore", part_bytes=0)
    assert len(list(bad.check())) == 5
    assert 'unknown --errors "ignore": choose one of skip, replace, stop' in list(bad.check())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (CleaningSettings(unicode_form="nfc"), 'unknown --unicode-form "nfc": choose one of NFC, NFKC, NFD, NFKD'),
        (CleaningSettings(duplicates="all"), 'unknown --duplicates "all": choose one of keep, exact, near'),
        (CleaningSettings(min_characters=-1), "-characters -1 must be at least 0"),
        (CleaningSettings(max_characters=-1), "-characters -1 must be at least 0"),
        (CleaningSettings(min_characters=9, max_characters=8), "no text has 9 characters or more and 8 or fewer"),
        (CleaningSettings(near_threshold=0), "--near-threshold must be above 0 and at most 1, not 0"),
        (CleaningSettings(near_threshold=80), "must be above 0 and at most 1, not 80"),
        (CleaningSettings(decontaminate_ngram=0), "--decontaminate-ngram 0 must be at least 1"),
        (CleaningSettings(decontaminate=("gone.txt",)), 'there is no evaluation file "gone.txt"'),
        (CleaningSettings(language=("en", "english")), 'unknown language "english": choose one of ace, af, am, '),
    ],
)
def test_each_wrong_cleaning_setting_has_its_sentence(settings: CleaningSettings, message: str) -> None:
    (sentence,) = settings.check()
    assert message in sentence


def test_all_wrong_cleaning_settings_are_reported_at_once_and_good_ones_are_not() -> None:
    assert len(list(CleaningSettings(unicode_form="x", duplicates="x", near_threshold=2).check())) == 3
    assert not list(CleaningSettings().check())
    assert not list(CleaningSettings("NFC", True, 1, 9, True, True, ("en",), "near", 0.5).check())


def test_a_missing_package_is_named_with_the_way_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings_module, "version_of", lambda package: "")
    found = list(CleaningSettings(language=("en",), duplicates="near").check())
    assert [sentence.split(":")[0] for sentence in found] == [
        "near duplicates need the package rensa",
        "the language filter needs the package py3langid",
    ]
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    load_language_identifier.cache_clear()
    with pytest.raises(UserError, match=r'py3langid: pip install "kindling-lm\[cleaning\]"'):
        Cleaner(CleaningSettings(language=("en",)))


def test_the_identity_of_cleaning_is_json_and_follows_settings_and_contents_but_no_folder(tmp_path: Path) -> None:
    def identity(folder: str, content: str, **changes: object) -> dict:
        path = tmp_path / folder / "test.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
        return CleaningSettings(decontaminate=(str(path),), **changes).identity()  # type: ignore[arg-type]

    first = identity("a", "one")
    assert first["decontaminate"] == [{"name": "test.txt", "sha256": hashlib.sha256(b"one").hexdigest()}]
    assert json.loads(json.dumps(first)) == first == identity("b", "one")
    others = [identity("a", "two"), identity("b", "one", quality=True), identity("b", "one", near_threshold=0.7)]
    assert first not in others
    assert "py3langid" in identity("a", "one", language=("en",))["versions"]
    assert "rensa" in identity("a", "one", duplicates="near")["versions"]
    one_order, other_order = (identity("a", "one", language=order) for order in (("en", "de"), ("de", "en")))
    assert one_order == other_order
    with pytest.raises(UserError, match='no evaluation file "gone"'):
        CleaningSettings(decontaminate=("gone",)).identity()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (TokenizerSettings("words"), 'unknown --tokenizer-kind "words": choose one of bpe, wordpiece'),
        (
            TokenizerSettings(word_split="gpt4"),
            'unknown --word-split "gpt4": choose one of auto, gpt2, llama3, qwen2, qwen35',
        ),
        (TokenizerSettings(digits="double"), 'unknown --digits "double": choose one of together, single'),
        (TokenizerSettings("unigram", digits="single"), 'only to --tokenizer-kind bpe, not to "unigram"'),
        (TokenizerSettings(train_bytes=0), "--train-bytes 0 must be from 1"),
        (TokenizerSettings(train_bytes=2**31), "--train-bytes 2147483648 must be"),
        (TokenizerSettings(extra_tokens=("user",)), '"user" cannot be a special token: write it as <|user|>'),
        (TokenizerSettings(extra_tokens=("<|mask|>",)), r'"<|mask|>" is listed 2 times'),
        (TokenizerSettings(extra_tokens=("chat", "<|user|>")), r'"<|user|>" is listed 2 times'),
    ],
)
def test_each_wrong_tokenizer_setting_has_its_sentence(wrong: TokenizerSettings, message: str) -> None:
    assert len(list(wrong.check())) == 1
    with pytest.raises(UserError, match=re.escape(message)):
        train_tokenizer(iter(["a text"]), wrong)


def test_all_wrong_tokenizer_settings_are_reported_at_once() -> None:
    assert len(list(TokenizerSettings("words", word_split="x", digits="y", extra_tokens=("z", "z")).check())) >= 5


def test_the_default_split_is_named_in_the_identity() -> None:
    assert TokenizerSettings().identity() == TokenizerSettings(word_split="qwen35").identity()
    for kind in ("wordpiece", "unigram", "characters"):  # which split as they always did
        assert TokenizerSettings(kind).identity()["word_split"] == "gpt2"


@pytest.mark.parametrize("kind", KINDS)
def test_the_identity_of_a_tokenizer_tells_settings_apart_and_is_plain_json(kind: str) -> None:
    named = TokenizerSettings(kind, extra_tokens=("infill",))
    assert json.loads(json.dumps(named.identity())) == named.identity()
    assert named.identity() == TokenizerSettings(kind, extra_tokens=TOKEN_SETS["infill"]).identity()
    assert named.identity() != TokenizerSettings(kind).identity()
