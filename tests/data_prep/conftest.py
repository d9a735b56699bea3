"""What the tests of several modules share: some text, a command to call, and a folder's content to compare."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from data_prep.cli.main import main


def english_like(seed: int, paragraphs: int) -> str:
    """Paragraphs of invented words, the short ones frequent, with some characters outside ASCII."""
    rng = random.Random(seed)
    syllables = ["ka", "to", "mi", "ren", "sol", "ver", "a", "qui", "den", "é", "ß", "ha", "lor", "in"]
    words = ["".join(rng.choices(syllables, k=rng.randint(1, 4))) for _ in range(300)]
    weights = [1 / (rank + 1) for rank in range(len(words))]
    lines = []
    for _ in range(paragraphs):
        chosen = rng.choices(words, weights, k=rng.randint(10, 60))
        lines.append(" ".join(chosen).capitalize() + rng.choice([".", "?", "!", ", 1984."]))
    return "\n\n".join(lines) + "\n"


@pytest.fixture(scope="session")
def make_text() -> Callable[[int, int], str]:
    return english_like


@pytest.fixture
def prep() -> Callable[..., Result]:
    """Call ``prep`` in this process, as the command line would."""

    def call(*arguments: object, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments], input=stdin)

    return call


def content_of(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


@pytest.fixture
def tree() -> Callable[[Path], dict[str, bytes]]:
    """The bytes of every file in a folder."""
    return content_of


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make an installed package look as if it were not."""
    return lambda name: monkeypatch.setitem(sys.modules, name, None)
