"""Tables on standard output."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

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
    """Print a table, numbers to the right, and an explanation below it; an empty header is left out.

    On a narrow terminal, the widest column wraps.
    """
    from rich.table import Table
    from rich.text import Text

    cells, names = [list(row) for row in rows], list(header)
    table = Table(box=None, pad_edge=False, show_header=bool(names))
    for number, name in enumerate(names):
        numeric = number > 0 and any(cell[:1].isdigit() for cell in (row[number] for row in cells))
        table.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    out = console()
    with out.capture() as printed:
        out.print(table)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())
    if explanation:
        out.print(explanation, markup=False)
