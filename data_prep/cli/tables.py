"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

WIDE = 1000


def console() -> Console:
    """Return a console as wide as the terminal; files and other programs get full width, with nothing cut off."""
    from rich.console import Console  # a third of the time of a small command

    found = Console(highlight=False, soft_wrap=True)
    if not found.is_terminal:
        found.width = WIDE
    return found


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]], explanation: str = "") -> None:
    """Print a table and, below it, an explanation. On a narrow terminal, the first column wraps."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(Text(name), justify="right" if number else "left", no_wrap=number > 0, overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    out = console()
    out.print(table)
    if explanation:
        out.print(explanation, markup=False)
