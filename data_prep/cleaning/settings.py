"""The settings of cleaning: what is changed in a document, and which documents are left out."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import sha256_of_file

UNICODE_FORMS = ("NFC", "NFKC", "NFD", "NFKD")
KEEP, EXACT, NEAR = "keep", "exact", "near"
DUPLICATES = (KEEP, EXACT, NEAR)
INSTALL = 'pip install "kindling-lm[cleaning]"'


@dataclass(frozen=True)
class CleaningSettings:
    """What to clean. Every step is off unless said."""

    unicode_form: str = ""  # NFC, NFKC, NFD or NFKD; empty: as it is
    control_characters: bool = False  # remove control characters but \n and \t, and format characters that do no work
    min_characters: int = 0
    max_characters: int = 0  # 0: no limit
    repetition: bool = False  # Gopher's repetition filters (Rae et al. 2021, table A1)
    quality: bool = False  # Gopher's quality filters (Rae et al. 2021, A.1.1), for English
    language: tuple[str, ...] = ()  # keep only these, as ISO 639-1 codes
    duplicates: str = KEEP  # keep, exact or near
    near_threshold: float = 0.8  # Jaccard similarity of runs of 5 words from which on documents are near duplicates
    decontaminate: tuple[str, ...] = ()  # files of evaluation texts
    decontaminate_ngram: int = 13  # words in a run that must not be shared with an evaluation text

    def check(self) -> Iterator[str]:
        """One sentence for each setting that cannot be, with its mend."""
        if self.unicode_form and self.unicode_form not in UNICODE_FORMS:
            yield f'unknown Unicode form "{self.unicode_form}": choose one of {", ".join(UNICODE_FORMS)}'
        if self.duplicates not in DUPLICATES:
            yield f'unknown way to treat duplicates "{self.duplicates}": choose one of {", ".join(DUPLICATES)}'
        if self.min_characters < 0 or self.max_characters < 0:
            yield "a limit of characters must not be negative: leave it out for none"
        elif 0 < self.max_characters < self.min_characters:
            yield f"no text has {self.min_characters} characters or more and {self.max_characters} or fewer: change one"
        if not 0 < self.near_threshold <= 1:
            yield f"the similarity of near duplicates must be over 0 and at most 1, not {self.near_threshold:g}"
        if self.decontaminate_ngram < 1:
            yield f"a run of words to decontaminate by must have 1 word or more, not {self.decontaminate_ngram}"
        for name in self.decontaminate:
            if not Path(name).is_file():
                yield f'there is no evaluation file "{name}"'
        if self.duplicates == NEAR and not _version_of("rensa"):
            yield f"near duplicates need the package rensa: {INSTALL}"
        if self.language:
            yield from self._check_languages()

    def _check_languages(self) -> Iterator[str]:
        if not _version_of("py3langid"):
            yield f"the language filter needs the package py3langid: {INSTALL}"
            return
        known = _load_language_identifier().labels
        for language in self.language:
            if language not in known:
                yield f'unknown language "{language}": choose one of {", ".join(sorted(known))}'

    def identity(self) -> dict[str, Any]:
        """What decides the result, as JSON: the settings, files by name and SHA-256, versions of what is relied on.

        Raises ``UserError`` for an evaluation file that is not there.
        """
        found: dict[str, Any] = asdict(self)
        found["language"] = sorted(self.language)
        found["decontaminate"] = [{"name": Path(name).name, "sha256": _sha256(name)} for name in self.decontaminate]
        found["versions"] = {
            name: value
            for name, used, value in (
                ("unicode", bool(self.unicode_form), unicodedata.unidata_version),
                ("py3langid", bool(self.language), _version_of("py3langid")),
                ("rensa", self.duplicates == NEAR, _version_of("rensa")),
            )
            if used
        }
        return found


def _version_of(package: str) -> str:
    """The version of an installed package, or ""."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _sha256(name: str) -> str:
    try:
        return sha256_of_file(Path(name))
    except FileNotFoundError:
        raise UserError(f'there is no evaluation file "{name}"') from None


@cache
def _load_language_identifier() -> Any:
    """py3langid's own model, half a second to load; once in each process, and forked workers have it already."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier  # an extra

    return LanguageIdentifier.from_model_file(MODEL_FILE)
