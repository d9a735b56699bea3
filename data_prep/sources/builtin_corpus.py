"""A corpus that needs no download: the prose in Python's standard library and a few installed packages.

It consists of the triple-quoted strings (mostly documentation) in the source files of ``PACKAGES``. The files are read,
never imported. Size and content depend on the installed versions; a dataset records the checksum.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import re
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# The order of the corpus. The first is Python's standard library.
STANDARD_LIBRARY = "python"
PACKAGES = (STANDARD_LIBRARY, "torch", "sympy", "networkx", "numpy")

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "testing", "site-packages", "dist-packages", "__pycache__"}
TOPICS = "pydoc_data/topics.py"

# Matches comments and all kinds of strings, so that a quote inside one of them does not start another.
# A triple-quoted string is in group "double" or "single", its prefix in "prefix".
PYTHON_STRINGS = re.compile(
    r"""
      \#[^\n]*
    | (?P<prefix>[A-Za-z]{0,2})
      (?: \"\"\"(?P<double>[^"\\]*(?:(?:\\.|"(?!""))[^"\\]*)*)\"\"\"
        | \'\'\'(?P<single>[^'\\]*(?:(?:\\.|'(?!''))[^'\\]*)*)\'\'\'
        | "[^"\\\n]*(?:\\.[^"\\\n]*)*"
        | '[^'\\\n]*(?:\\.[^'\\\n]*)*'
      )
    """,
    re.VERBOSE | re.DOTALL,
)

NOT_LETTERS = re.compile(r"[^\w\s]|[\d_]")
CODE_LINE_ENDS = re.compile(r"[;{}]$", re.MULTILINE)


@cache
def builtin_documents() -> tuple[tuple[str, str], ...]:
    """Return every document as ``(name, text)``: one per source file with prose, named like ``torch/nn/functional.py``.

    A string that occurs in several files is kept only once, in the first.
    """
    seen: set[bytes] = set()
    documents = []
    for name, path in _source_files():
        text = "\n\n".join(_unseen(_prose_of_file(name, path), seen))
        if text:
            documents.append((name, text))
    return tuple(documents)


def _source_files() -> Iterator[tuple[str, Path]]:
    """Yield the source files of all installed packages, by package and then by path."""
    for package in PACKAGES:
        root = _package_folder(package)
        if root is None:
            continue
        paths = (path.relative_to(root) for path in root.rglob("*.py"))
        for path in sorted(paths, key=lambda path: path.parts):
            if not SKIPPED_FOLDERS.intersection(path.parts):
                yield f"{package}/{path.as_posix()}", root / path


def _package_folder(package: str) -> Path | None:
    if package == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    specification = importlib.util.find_spec(package)  # finds a top-level package without running its code
    return Path(specification.origin).parent if specification and specification.origin else None


def _prose_of_file(name: str, path: Path) -> Iterator[str]:
    try:
        source = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):  # a few library files deliberately use other encodings
        return
    if name.endswith(TOPICS):
        yield from _topics(source)
        return
    if '"""' not in source and "'''" not in source:
        return
    for match in PYTHON_STRINGS.finditer(source):
        text = match["double"] or match["single"]
        if text and match["prefix"].lower() in ("", "r", "u"):
            text = inspect.cleandoc(text)
            if is_prose(text):
                yield text


def _topics(source: str) -> Iterator[str]:
    """Yield the language reference shown by ``help()``: a dictionary of strings in a style different from the rest."""
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from (inspect.cleandoc(text) for text in ast.literal_eval(node.value).values())


def is_prose(text: str) -> bool:
    """Return whether a string reads like natural language.

    It does if it has over 80 characters, over 8 spaces, at least three quarters letters and whitespace (which excludes
    tables and ASCII art), and at most one line in five that ends like C++ or CUDA code (which excludes torch
    templates).
    """
    if len(text) <= 80 or text.count(" ") <= 8:
        return False
    code_lines = len(CODE_LINE_ENDS.findall(text))
    return len(NOT_LETTERS.findall(text)) <= len(text) / 4 and code_lines <= (text.count("\n") + 1) / 5


def _unseen(texts: Iterator[str], seen: set[bytes]) -> Iterator[str]:
    for text in texts:
        key = hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            yield text
