"""``kindling report`` and ``kindling compare``: pages about runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from data_prep.cli.errors import FriendlyCommand
from lm.cli.options import checkpoint_option, json_option, run_argument


@click.command(cls=FriendlyCommand)
@run_argument
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to show the continuation of; may be repeated. Default: the recipe's prompts.",
)
@click.option(
    "--fill",
    "fills",
    multiple=True,
    help="Text with [MASK] to show filled; may be repeated. Default: the recipe's fills.",
)
@checkpoint_option
def report(run: Path, prompts: tuple[str, ...], fills: tuple[str, ...], which: str) -> None:
    """Write RUN/report.html: losses, curves, samples, settings, environment; one file that needs no network."""
    from lm.reports.run_report import write_report
    from lm.runs.directory import open_run, saved_evaluation

    opened = open_run(run)
    defaults, saved = opened.config.report, opened.checkpoint(which)
    evaluation = saved_evaluation(opened, saved)
    path = write_report(opened, evaluation, prompts or defaults.prompts, fills or defaults.fills, saved)
    click.echo(str(path))


@click.command(cls=FriendlyCommand)
@click.argument("runs", metavar="RUN_A RUN_B [MORE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out",
    default="compare.html",
    show_default=True,
    type=click.Path(path_type=Path),
    help="Page to write: the numbers, the curves over one another, the settings that differ; it needs no network.",
)
@json_option
def compare(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Put runs beside one another: where they stand, what differs in their settings, their curves in one picture.

    Runs that are still training can be compared too.
    """
    from lm.reports.comparison import compare as compare_runs
    from lm.reports.comparison import differences, open_entries, rows, write_comparison

    entries = open_entries(runs)
    comparison = compare_runs(entries)
    write_comparison(entries, comparison, out)
    if as_json:
        click.echo(json.dumps(comparison))
        return
    from rich.table import Table
    from rich.text import Text

    from lm.cli.tables import console

    header, *numbers = rows(comparison)
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(header):
        table.add_column(Text(name), no_wrap=number == 0, overflow="fold")
    for row in numbers:
        table.add_row(*map(Text, row))
    for row in differences(comparison):
        table.add_row(*map(Text, row), style="dim")
    printer = console()
    printer.print(table)
    for remark in comparison["remarks"]:
        printer.print(remark, markup=False)
    click.echo(str(out), err=True)
