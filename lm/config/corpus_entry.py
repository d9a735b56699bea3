"""An entry of the setting ``data``: a folder, and perhaps its weight."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fractions import Fraction


def corpus_of(text: str) -> tuple[str, Fraction]:
    """Split an entry, ``PATH@WEIGHT`` or ``PATH`` (weight 1), into path and weight.

    A folder that exists under the whole name, such as ``v@2``, is that folder.
    """
    from fractions import Fraction  # here, because --help should be quick

    path, at, weight = text.rpartition("@")
    if not at or Path(text).is_dir():
        return text, Fraction(1)
    try:
        return path, Fraction(weight)
    except (ValueError, ZeroDivisionError):
        return text, Fraction(1)  # the "@" is part of the path
