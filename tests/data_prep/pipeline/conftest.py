"""What the tests of builds share: a corpus, and what was built from it."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_prep.pipeline.build import build_dataset
from data_prep.progress import SilentReporter
from data_prep.settings import BuildSettings
from data_prep.shards.tokens import open_dataset


@pytest.fixture
def ray() -> Iterator[None]:
    """Skip a test if Ray is not installed, and undo that Ray handles SIGTERM."""
    pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="session")
def corpus(make_text: Callable[[int, int], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 120 KB: texts of several lengths, two of them equal, and records."""
    folder = tmp_path_factory.mktemp("corpus")
    for n in range(12):
        (folder / f"{n:02}.txt").write_text(make_text(n, 4 + 4 * n), encoding="utf-8")
    (folder / "copy.md").write_text(make_text(3, 16), encoding="utf-8")
    records = [json.dumps({"text": make_text(100 + n, 2)}) for n in range(40)]
    (folder / "records.jsonl").write_text("\n".join([*records, "broken"]), encoding="utf-8")
    return folder


def settings_for(corpus: Path, out: Path, **changes: Any) -> BuildSettings:
    small = {"vocab_size": 400, "shard_tokens": 4000, "max_document_bytes": 3000, "validation_fraction": 0.2}
    return BuildSettings.from_options((str(corpus),), out, **(small | {"part_bytes": 40_000, "workers": 1} | changes))


def build(settings: BuildSettings, notes: list[str] | None = None) -> dict[str, Any]:
    """Build quietly; ``notes`` collects what is reported."""
    reporter = SilentReporter()
    if notes is not None:
        reporter.note = notes.append  # type: ignore[method-assign]
    return build_dataset(settings, progress=reporter)


class KilledError(BaseException):
    """Stands for a kill: nothing in the program expects it."""


def ends_before_file(count: int, run: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> bool:
    """Run something that dies just before file number ``count`` gets its name; whether it ended before that."""
    rename, left = Path.replace, count

    def rename_or_die(path: Path, target: Path) -> Path:
        nonlocal left
        if left == 0:
            raise KilledError
        left -= 1
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", rename_or_die)
        try:
            run()
        except KilledError:
            return False
    return True


@pytest.fixture(scope="session")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    build(settings_for(corpus, out))
    return out


def decoded(out: Path, split: str) -> list[str]:
    dataset = open_dataset(out)
    texts, start = [], 0
    for length in dataset.split(split).document_lengths():
        texts.append(dataset.tokenizer.decode_bytes(dataset.split(split).read(start, start + length)).decode())
        start += int(length)
    return texts
