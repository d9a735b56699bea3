from __future__ import annotations

import gzip
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.pipeline.build import build_dataset
from data_prep.pipeline.estimate import estimate_build
from data_prep.progress import SilentReporter
from data_prep.settings import BuildSettings


@pytest.fixture
def texts(make_text: Callable[[int, int], str], tmp_path: Path) -> Path:
    folder = tmp_path / "texts"
    folder.mkdir()
    for n in range(8):
        (folder / f"{n}.txt").write_text(make_text(n, 400))
    return folder


def test_the_estimate_is_near_what_the_build_then_makes(texts: Path, tmp_path: Path) -> None:
    settings = BuildSettings.from_options((str(texts),), tmp_path / "out", vocab_size=600, max_document_bytes=4000)
    found = estimate_build(settings)
    assert not settings.out.exists()
    splits = build_dataset(settings, progress=SilentReporter())["splits"].values()
    for name in ("documents", "tokens", "text_bytes"):
        real = sum(split[name] for split in splits)
        assert getattr(found, name) == pytest.approx(real, rel=0.1), name
    disk = sum(path.stat().st_size for path in settings.out.glob("*-0*"))
    assert found.disk_bytes == pytest.approx(disk, rel=0.1)
    assert (found.files, found.guessed) == (8, False)
    assert found.seconds > 0


def test_the_estimate_follows_the_rules_of_the_build_that_would_resume(texts: Path, tmp_path: Path) -> None:
    changes = {"vocab_size": 600, "max_document_bytes": 4000, "document_per": "paragraph"}
    settings = BuildSettings.from_options((str(texts),), tmp_path / "out", **changes)
    earlier = replace(settings, reading=replace(settings.reading, reading_rules=1))
    splits = build_dataset(earlier, progress=SilentReporter())["splits"].values()
    assert estimate_build(settings).documents == pytest.approx(sum(split["documents"] for split in splits), rel=0.1)


def test_packed_files_are_guesses_and_a_large_vocabulary_is_no_obstacle(texts: Path, tmp_path: Path) -> None:
    packed = tmp_path / "a.txt.gz"
    packed.write_bytes(gzip.compress((texts / "0.txt").read_bytes()))
    found = estimate_build(BuildSettings.from_options((str(packed),), tmp_path / "out", vocab_size=60_000))
    assert found.guessed
    assert found.tokens > 0


def test_standard_input_and_empty_sources_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dry-run does not work with standard input"):
        estimate_build(BuildSettings.from_options(("-",), tmp_path / "out"))
    (tmp_path / "a.txt").write_text(" \n \n")
    with pytest.raises(UserError, match="contains no text"):
        estimate_build(BuildSettings.from_options((str(tmp_path / "a.txt"),), tmp_path / "out"))
