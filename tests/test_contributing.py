"""A newcomer's questions in CONTRIBUTING.md lead to files and names that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROWS = re.findall(r"^\| (.*\?) \| `(.*?)` \| `(\w+)` \|$", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M)


def names_defined_in(path: Path) -> set[str]:
    """The functions and classes at the top of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_at_least_ten_questions_are_answered():
    assert len(ROWS) >= 10
    assert len({question for question, _, _ in ROWS}) == len(ROWS)


@pytest.mark.parametrize(("question", "file", "name"), ROWS, ids=[question for question, _, _ in ROWS])
def test_the_answer_to_a_question_exists(question, file, name):
    assert name in names_defined_in(ROOT / file)
