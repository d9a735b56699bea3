"""Clean documents: each step changes a text or drops a document, has its own setting, and is counted.

    text -> control characters -> Unicode form -> length -> quality -> repetition -> evaluation texts -> language

Duplicates are found over the whole corpus afterwards (``duplicates``). The steps that change a text come first, and in
this order: removing a character can undo a Unicode form, but no form restores a removed character. Cleaning is
therefore idempotent.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from data_prep.cleaning.decontamination import EvaluationTexts
from data_prep.cleaning.gopher import quality_problem, repetition_problem
from data_prep.cleaning.ngrams import WordHashes
from data_prep.errors import UserError
from data_prep.settings import INSTALL, CleaningSettings, load_language_identifier

MOST_EXAMPLES = 3
EXAMPLE_CHARACTERS = 200
LANGUAGE_CHARACTERS = 1000  # the beginning of a text that determines its language

# Line endings other than \n: deleting them would join two words.
_LINE_ENDS = re.compile("\r\n|[\r\x0b\x0c\x85]")
# The other control characters; soft hyphen, zero-width space, word joiner, invisible operators, deprecated format
# characters, byte-order mark, interlinear annotation, language tag. Joiners (ZWJ, ZWNJ), directional marks and flag
# tags affect what a reader sees and are kept.
_REMOVED = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u2060-\u2064\u206a-\u206f\ufeff\ufff9-\ufffb\U000e0001]"
)


@dataclass
class StepReport:
    """What one step did. ``changed_bytes`` is the UTF-8 size of the changed documents before the change."""

    changed_documents: int = 0
    changed_bytes: int = 0
    removed_documents: int = 0
    removed_bytes: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)  # at most MOST_EXAMPLES, with "text" and "reason"

    def _show(self, text: str, reason: str) -> None:
        if len(self.examples) < MOST_EXAMPLES:
            self.examples.append({"text": text[:EXAMPLE_CHARACTERS], "reason": reason})

    def change(self, text: str, reason: str) -> None:
        """Count a changed document."""
        self.changed_documents += 1
        self.changed_bytes += len(text.encode("utf-8"))
        self._show(text, reason)

    def remove(self, text: str, reason: str) -> None:
        """Count a dropped document."""
        self.removed_documents += 1
        self.removed_bytes += len(text.encode("utf-8"))
        self._show(text, reason)

    def merge(self, other: StepReport) -> None:
        self.changed_documents += other.changed_documents
        self.changed_bytes += other.changed_bytes
        self.removed_documents += other.removed_documents
        self.removed_bytes += other.removed_bytes
        self.examples = (self.examples + other.examples)[:MOST_EXAMPLES]


@dataclass
class CleaningReport:
    """What each step did, by name. Merged in the order of the parts, it does not depend on the number of workers."""

    steps: dict[str, StepReport] = field(default_factory=dict)

    def step(self, name: str) -> StepReport:
        """Return the report of a step, initially empty."""
        return self.steps.setdefault(name, StepReport())

    def merge(self, other: CleaningReport) -> None:
        for name, step in other.steps.items():
            self.step(name).merge(step)

    def to_json(self) -> dict[str, Any]:
        return {name: asdict(step) for name, step in self.steps.items()}

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> CleaningReport:
        return cls({name: StepReport(**step) for name, step in found.items()})


class Cleaner:
    """Clean texts. Create it once per worker process, because it loads what its steps need.

    ``report`` accumulates counts and may be replaced by an empty one at any time. Raises ``UserError`` for an
    evaluation file that cannot be used.
    """

    def __init__(self, settings: CleaningSettings) -> None:
        self.report = CleaningReport()
        word_hashes = WordHashes()
        self._changes: list[tuple[str, Callable[[str], tuple[str, str]]]] = []
        self._filters: list[tuple[str, Callable[[str], str]]] = []
        if settings.control_characters:
            self._changes.append(("control characters", without_control_characters))
        if settings.unicode_form:
            self._changes.append(("unicode form", partial(in_unicode_form, form=settings.unicode_form)))
        if settings.min_characters or settings.max_characters:
            in_limits = partial(length_problem, fewest=settings.min_characters, most=settings.max_characters)
            self._filters.append(("length", in_limits))
        if settings.quality:
            self._filters.append(("quality", quality_problem))
        if settings.repetition:
            self._filters.append(("repetition", partial(repetition_problem, word_hashes=word_hashes)))
        if settings.decontaminate:
            files = [Path(name) for name in settings.decontaminate]
            texts = EvaluationTexts(files, settings.decontaminate_ngram, word_hashes)
            self._filters.append(("evaluation texts", partial(contamination_problem, texts=texts)))
        if settings.language:
            self._filters.append(("language", LanguageFilter(settings.language)))

    @property
    def active(self) -> bool:
        """False if ``clean`` would return every text unchanged."""
        return bool(self._changes or self._filters)

    def clean(self, text: str) -> str | None:
        """Return the cleaned text, or None to drop the document; ``report`` counts both."""
        for name, change in self._changes:
            changed, reason = change(text)
            if changed is not text:
                if not changed.strip():
                    self.report.step(name).remove(text, "nothing left")
                    return None
                self.report.step(name).change(text, reason)
                text = changed
        for name, problem in self._filters:
            if reason := problem(text):
                self.report.step(name).remove(text, reason)
                return None
        return text


def without_control_characters(text: str) -> tuple[str, str]:
    """Return the text without control and invisible format characters, and what was done.

    A text without such characters is returned unchanged (the same object). Line endings other than ``\\n`` become
    ``\\n``, so that words stay separate.
    """
    if text.replace("\n", " ").replace("\t", " ").isprintable():  # fast check: most texts have none
        return text, ""
    changed, line_ends = _LINE_ENDS.subn("\n", text)
    changed, removed = _REMOVED.subn("", changed)
    if not line_ends and not removed:
        return text, ""
    return changed, f"{removed} characters removed, {line_ends} ends of lines made equal"


def in_unicode_form(text: str, form: str) -> tuple[str, str]:
    """Return the text in a Unicode normalization form, and a remark; the same object if it already has that form."""
    known = cast(Literal["NFC", "NFD", "NFKC", "NFKD"], form)
    if unicodedata.is_normalized(known, text):
        return text, ""
    return unicodedata.normalize(known, text), f"not in {form}"


def length_problem(text: str, fewest: int, most: int) -> str:
    """Return why the text is too short or too long, in characters, or "". A ``most`` of 0 means no limit."""
    if len(text) < fewest:
        return f"{len(text)} characters < {fewest}"
    return f"{len(text)} characters > {most}" if 0 < most < len(text) else ""


def contamination_problem(text: str, texts: EvaluationTexts) -> str:
    """Return which evaluation text shares a run of words with this text, or ""."""
    found = texts.match(text)
    return f"shares a run of words with {found}" if found else ""


class LanguageFilter:
    """Drop texts in other languages, judging by the first ``LANGUAGE_CHARACTERS`` characters.

    Uses py3langid (Lui and Baldwin 2012, "langid.py: An Off-the-shelf Language Identification Tool", with a later model
    of 139 languages), which works offline. Raises ``UserError`` if it is not installed.
    """

    def __init__(self, languages: tuple[str, ...]) -> None:
        self._languages = frozenset(languages)
        try:
            self._identifier = load_language_identifier()
        except ImportError:
            raise UserError(f"the language filter needs the package py3langid: {INSTALL}") from None

    def __call__(self, text: str) -> str:
        """Return why to drop the text, or ""."""
        found, _ = self._identifier.classify(text[:LANGUAGE_CHARACTERS])
        return "" if found in self._languages else f"language {found}"
