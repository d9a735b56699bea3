"""Tables on the standard output."""

from __future__ import annotations

from rich.console import Console

WIDE = 1000


def console() -> Console:
    """As wide as the terminal; a file, or another program, gets tables as wide as they are, with nothing cut off."""
    wide = Console(highlight=False, soft_wrap=True)
    if not wide.is_terminal:
        wide.width = WIDE
    return wide
