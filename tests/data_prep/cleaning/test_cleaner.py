from __future__ import annotations

import json
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep.cleaning.cleaner import Cleaner, CleaningReport, StepReport, without_control_characters
from data_prep.settings import CleaningSettings

PROSE = "The keeper of the lighthouse went to sleep with the lamp and never woke that night, though be it said"
GOOD = f"{PROSE} in truth.\nAfterwards a boat came from the mainland, and two men climbed the stairs to have a look.\n"

idle_or_control = ["\u200b", "\u200d", "\u00ad", "\ufeff", "\x00", "\x0c", "\x85", "\r", "\n", "\t"]
composing = ["a", " ", "e\u0301", "\u0301", "é", "ﬁ", "ﷺ", "\u0345", "\u1100", "\u1161", "\u212b", "\u3000"]
awkward = st.sampled_from([*idle_or_control, *composing])
awkward_text = st.one_of(st.text(max_size=30), st.lists(awkward, max_size=20).map("".join))
EVERY_CHARACTER = [chr(code) for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]


def cleaned(text: str, settings: CleaningSettings) -> tuple[str | None, CleaningReport]:
    cleaner = Cleaner(settings)
    return cleaner.clean(text), cleaner.report


@given(text=awkward_text, form=st.sampled_from(["", "NFC", "NFKC", "NFD", "NFKD"]), controls=st.booleans())
def test_cleaning_again_changes_nothing_and_counts_nothing(text: str, form: str, controls: bool) -> None:
    settings = CleaningSettings(unicode_form=form, control_characters=controls)
    once, _ = cleaned(text, settings)
    if once is not None:
        again, report = cleaned(once, settings)
        assert again == once
        assert report.steps == {}


@given(text=awkward_text, form=st.sampled_from(["NFC", "NFKC", "NFD", "NFKD"]))
def test_the_text_has_the_form_also_where_a_removed_character_stood_between(text: str, form: str) -> None:
    result, _ = cleaned(text, CleaningSettings(unicode_form=form, control_characters=True))
    assert result is None or unicodedata.is_normalized(form, result)


def test_the_removed_characters_are_controls_and_format_characters_and_no_others() -> None:
    gone = set(EVERY_CHARACTER) - set(without_control_characters("".join(EVERY_CHARACTER))[0])
    removed = {c for c in gone if without_control_characters(f"a{c}b")[0] == "ab"}
    lines = sorted(c for c in gone if without_control_characters(f"a{c}b")[0] == "a\nb")
    assert len(removed) + len(lines) == len(gone)
    assert lines == ["\x0b", "\x0c", "\r", "\x85"]
    controls = {c for c in EVERY_CHARACTER if unicodedata.category(c) == "Cc"}
    assert {c for c in removed if c in controls} == controls - {"\n", "\t", *lines}
    assert {unicodedata.category(c) for c in removed if c not in controls} == {"Cf"}
    for stays in "\u200c\u200d\u200e\u200f\u061c\u2066\u2069\u0600\u06dd\U000e0067\U000e007f\u00a0\u3000":
        assert stays not in removed
    for idle in "\u00ad\u200b\u2060\ufeff":
        assert idle in removed


def test_no_unicode_form_brings_a_removed_character_back() -> None:
    text = without_control_characters("\t".join(EVERY_CHARACTER))[0]
    for form in ("NFC", "NFKC", "NFD", "NFKD"):
        formed = unicodedata.normalize(form, text)
        assert without_control_characters(formed)[0] is formed


def test_words_do_not_grow_together_where_a_line_ended() -> None:
    assert without_control_characters("one\r\ntwo\x0cthree\x00")[0] == "one\ntwo\nthree"


def test_without_a_step_a_text_stays_as_it_is_and_the_cleaner_is_idle() -> None:
    cleaner = Cleaner(CleaningSettings(duplicates="exact"))
    assert not cleaner.active
    assert cleaner.clean("e\u0301\x00") == "e\u0301\x00"
    assert Cleaner(CleaningSettings(min_characters=1)).active


@pytest.mark.parametrize(
    ("settings", "text", "step", "reason"),
    [
        (CleaningSettings(min_characters=4), "äöü", "length", "3 characters < 4"),
        (CleaningSettings(max_characters=2), "äöü", "length", "3 characters > 2"),
        (CleaningSettings(quality=True), "too few", "quality", "2 words < 50"),
        (CleaningSettings(repetition=True), "a\na\n", "repetition", "repeated lines 0.50 > 0.3"),
        (CleaningSettings(language=("de", "fr")), GOOD, "language", "language en"),
        (CleaningSettings(control_characters=True), "\x00 \u200b", "control characters", "nothing left"),
    ],
)
def test_each_step_removes_with_a_reason_and_counts_bytes(
    settings: CleaningSettings, text: str, step: str, reason: str
) -> None:
    result, report = cleaned(text, settings)
    assert result is None
    size = len(text.encode())
    example = {"text": text[:200], "reason": reason}
    assert report.steps == {step: StepReport(removed_documents=1, removed_bytes=size, examples=[example])}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (CleaningSettings(min_characters=3, max_characters=3), "äöü"),
        (CleaningSettings(min_characters=1, max_characters=0), "x" * 100_000),
        (CleaningSettings(language=("de", "en")), GOOD),
    ],
)
def test_a_text_within_the_limits_stays(settings: CleaningSettings, text: str) -> None:
    assert cleaned(text, settings) == (text, CleaningReport())


SENTENCES = {
    "en": "The weather was fine this morning, so we walked along the river to the old mill.",
    "de": "Das Wetter war heute Morgen schön, also gingen wir am Fluss entlang zur alten Mühle.",
    "fr": "Il faisait beau ce matin, alors nous avons marché le long de la rivière jusqu'au moulin.",
    "es": "Hacía buen tiempo esta mañana, así que caminamos junto al río hasta el viejo molino.",
    "it": "Stamattina il tempo era bello, così abbiamo camminato lungo il fiume fino al vecchio mulino.",
    "ru": "Сегодня утром была хорошая погода, и мы пошли вдоль реки к старой мельнице.",
    "zh": "今天早上天气很好，所以我们沿着河走到了那座老磨坊。",
    "ja": "今朝は天気が良かったので、川沿いを歩いて古い水車小屋まで行きました。",
}


def test_the_language_of_a_sentence_is_told() -> None:
    for language in SENTENCES:
        cleaner = Cleaner(CleaningSettings(language=(language,)))
        assert [name for name, sentence in SENTENCES.items() if cleaner.clean(sentence)] == [language]


def test_a_document_that_shares_words_with_an_evaluation_text_is_removed(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(json.dumps({"text": PROSE}) + "\n")
    settings = CleaningSettings(decontaminate=(str(tmp_path / "test.jsonl"),))
    result, report = cleaned(GOOD, settings)
    assert result is None
    (example,) = report.steps["evaluation texts"].examples
    assert example["reason"] == (
        'shares a run of words with "The keeper of the lighthouse went to sleep with the" of test.jsonl'
    )
    assert cleaned(GOOD, CleaningSettings(decontaminate=settings.decontaminate, decontaminate_ngram=50))[0] is None
    assert cleaned(GOOD[20:], CleaningSettings(decontaminate=settings.decontaminate, decontaminate_ngram=50))[0]


def test_changes_are_counted_with_the_size_before_and_removals_see_the_changed_text() -> None:
    settings = CleaningSettings(unicode_form="NFC", control_characters=True, min_characters=2)
    cleaner = Cleaner(settings)
    assert [cleaner.clean(text) for text in ("e\x00\u0301x", "e\u0301", "ab")] == ["éx", None, "ab"]
    steps = cleaner.report.steps
    assert list(steps) == ["control characters", "unicode form", "length"]
    assert (steps["control characters"].changed_documents, steps["control characters"].changed_bytes) == (1, 5)
    assert (steps["unicode form"].changed_documents, steps["unicode form"].changed_bytes) == (2, 4 + 3)
    assert (steps["length"].removed_documents, steps["length"].removed_bytes) == (1, 2)


@given(sizes=st.lists(st.integers(0, 9), max_size=20), cut=st.integers(0, 20))
def test_reports_of_parts_merge_into_the_report_of_the_whole_and_survive_json(sizes: list[int], cut: int) -> None:
    settings = CleaningSettings(min_characters=3, control_characters=True)
    texts = [("\x00" if size % 2 else "") + "x" * size for size in sizes]
    whole, first, second = Cleaner(settings), Cleaner(settings), Cleaner(settings)
    for place, text in enumerate(texts):
        whole.clean(text)
        (first if place < cut else second).clean(text)
    merged = CleaningReport()
    for part in (first, second):
        merged.merge(CleaningReport.from_json(json.loads(json.dumps(part.report.to_json()))))
    assert merged == whole.report
    assert all(len(step.examples) <= 3 for step in merged.steps.values())


def test_an_example_is_the_beginning_of_a_text() -> None:
    _, report = cleaned("long " * 100, CleaningSettings(max_characters=9))
    assert report.steps["length"].examples[0]["text"] == "long " * 40
