"""An entry of the setting ``data``: a folder or a URL, and perhaps its weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.files import is_remote, problem_of_url

if TYPE_CHECKING:
    from fractions import Fraction


def corpus_of(text: str) -> tuple[str, Fraction]:
    """Split an entry, ``PATH@WEIGHT`` or ``PATH`` (weight 1), into path and weight.

    A folder that exists under the whole name, such as ``v@2``, is that folder.
    """
    from fractions import Fraction  # here, because --help should be quick

    path, at, weight = text.rpartition("@")
    if not at or is_folder(text):
        return text, Fraction(1)
    try:
        return path, Fraction(weight)
    except (ValueError, ZeroDivisionError):
        return text, Fraction(1)  # the "@" is part of the path


def is_folder(location: str) -> bool:
    """Whether there is a folder at this path; False for a URL, which only its store knows."""
    return not is_remote(location) and Path(location).is_dir()


def problem_of_entry(text: str) -> str:
    """What is wrong with an entry, in one sentence, or "": that can be seen without its data."""
    location, weight = corpus_of(text)
    if is_remote(location) and (problem := problem_of_url(location)):
        return problem
    return "" if weight > 0 else f'the weight of "{text}" must be above 0'
