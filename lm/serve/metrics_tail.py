"""Read a run's metrics.jsonl while it grows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

READ_AT_ONCE = 1 << 20


def read_tail(path: Path, file: str, start: int) -> dict[str, Any]:
    """Read the complete lines from byte ``start`` on, at most about a megabyte.

    Returns:
        ``lines``, as objects, with None for NaN and infinite numbers; ``file`` and ``next``, the arguments of the call
        that continues; ``more``, whether there are more lines already; and ``whole``, true if the lines start at the
        beginning: because ``start`` is 0 or beyond the end, or the file is not the one that ``file`` identifies (a run
        that resumes from a checkpoint replaces its log by a shorter one).
    """
    try:
        opened = path.open("rb")
    except FileNotFoundError:
        return {"lines": [], "file": "", "next": 0, "more": False, "whole": True}
    with opened:
        status = os.fstat(opened.fileno())
        name = f"{status.st_dev:x}-{status.st_ino:x}"
        if name != file or start > status.st_size:
            start = 0
        opened.seek(start)
        data = opened.read(READ_AT_ONCE)
        data = data[: data.rfind(b"\n") + 1]
        end = start + len(data)
        return {
            "lines": [line for line in map(_parsed, data.splitlines()) if line is not None],
            "file": name,
            "next": end,
            "more": bool(data) and end < status.st_size,
            "whole": start == 0,
        }


def _parsed(text: bytes) -> dict[str, Any] | None:
    try:
        line = json.loads(text, parse_constant=lambda _: None)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None
