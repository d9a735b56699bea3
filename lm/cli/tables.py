"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDE = 1000


def console() -> Console:
    """Return a console as wide as the terminal; files and other programs get full width, with nothing cut off."""
    found = Console(highlight=False, soft_wrap=True)
    if not found.is_terminal:
        found.width = WIDE
    return found


def print_table(header: Iterable[str], rows: Iterable[Iterable[str]], explanation: str = "") -> None:
    """Print a table and, below it, an explanation. Without a header there is no header line."""
    names = [Text(name) for name in header]
    table = Table(box=None, pad_edge=False, show_header=bool(names))
    for name in names:
        table.add_column(name, overflow="fold")  # on a narrow terminal the widest column wraps
    for row in rows:
        table.add_row(*map(Text, row))
    out = console()
    out.print(table)
    if explanation:
        out.print(explanation, markup=False)
