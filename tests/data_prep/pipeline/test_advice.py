from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.errors import UserError
from data_prep.settings import BuildSettings
from data_prep.shards.tokens import open_dataset
from tests.data_prep.pipeline.conftest import build, settings_for


def notes_of(tmp_path: Path, **options: Any) -> list[str]:
    notes: list[str] = []
    settings = BuildSettings.from_options(
        (str(tmp_path / "a.txt"),), tmp_path / "out", tokenizer_kind="bytes", **options
    )
    build(settings, notes)
    return [note for note in notes if note.startswith("note: ")]


def test_few_long_documents_and_separators_that_never_occur_are_told(
    make_text: Callable[[int, int], str], tmp_path: Path
) -> None:
    text = make_text(1, 300)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (long,) = notes_of(tmp_path, max_document_bytes=10_000)
    assert re.fullmatch(
        r"note: text files gave \d documents of \d KB on average; --document-per paragraph would give 300", long
    )
    shutil.rmtree(tmp_path / "out")
    assert notes_of(tmp_path, document_per="paragraph") == []
    assert sum(s["documents"] for s in open_dataset(tmp_path / "out").manifest["splits"].values()) == 300
    shutil.rmtree(tmp_path / "out")
    assert notes_of(tmp_path, document_per="END", max_document_bytes=10_000) == [
        'note: --document-per "END" never occurs in the text files, so they were split by size'
    ]


def test_a_step_that_removes_few_documents_but_most_of_the_text_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["word " * 9] * 8 + ["x" * 400] * 2), encoding="utf-8")
    (told,) = notes_of(tmp_path, document_per="paragraph", max_characters=100, validation_fraction=0)
    assert told.startswith('note: the step "length" removed 2 of 10 documents, 69% of the text (400 characters > 100')


def test_a_vocabulary_that_is_too_large_because_of_cleaning_is_explained(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["the a1 b2 c3"] * 12 + [f"x{n} of words" * 9 for n in range(9)]))
    settings = settings_for(tmp_path / "a.txt", tmp_path / "out", document_per="paragraph", min_characters=50)
    with pytest.raises(UserError, match=r"yields only .* or add text; the step \"length\" removed 12 of 21 documents"):
        build(settings)


def test_a_step_that_removes_most_documents_is_told(make_text: Callable[[int, int], str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\n\n".join(["word " * 9] * 8 + ["x" * 400] * 2), encoding="utf-8")
    (told,) = notes_of(tmp_path, document_per="paragraph", min_characters=100, validation_fraction=0)
    assert (
        told == 'note: the step "length" removed 8 of 10 documents, 31% of the text (45 characters < 100, for example)'
    )
    for name, sentence in (
        ("validation_fraction", 'only one document .the step "length" removed 9 of 10 documents'),
        ("quality", 'contain no text: the step "quality", which is meant for English prose, removed 10 of 10'),
    ):
        (tmp_path / "a.txt").write_text("\n\n".join(["word " * 9] * 9 + ["x" * 400]), encoding="utf-8")
        more: dict[str, Any] = {"quality": True} if name == "quality" else {"min_characters": 100}
        settings = BuildSettings.from_options(
            (str(tmp_path / "a.txt"),), tmp_path / name, tokenizer_kind="bytes", document_per="paragraph", **more
        )
        with pytest.raises(UserError, match=sentence):
            build(settings)
    with pytest.raises(UserError, match=r"--quality keeps only English prose .* --language is de: leave one"):
        build(settings_for(tmp_path / "a.txt", tmp_path / "new", quality=True, language=("en", "de")))
