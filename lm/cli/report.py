"""``kindling report`` and ``kindling compare``: HTML pages about runs."""

from __future__ import annotations

import json
from pathlib import Path

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.errors import UserError
from data_prep.files import require_new_file
from lm.cli.options import checkpoint_option, is_given, json_option, run_argument
from lm.config.sampling import problem_of_fill


@click.command(cls=FriendlyCommand, short_help="Write a page about a run.")
@run_argument
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    help="Text to show with its continuation; may be repeated. Default: the recipe's prompts, or openings of "
    "validation documents.",
)
@click.option(
    "--fill",
    "fills",
    multiple=True,
    help="Text with [MASK] to show filled; may be repeated. Default: the recipe's fills, or openings of "
    "validation documents.",
)
@checkpoint_option
def report(run: Path, prompts: tuple[str, ...], fills: tuple[str, ...], which: str) -> None:
    """Write RUN/report.html with losses, curves, samples, settings and environment, as one self-contained file.

    For a run on images the samples are pictures: the views it learned from, what it rebuilds, nearest neighbors and a
    map of its features. For a run that was fine-tuned on a task, they are its answers to the validation examples.
    """
    from lm.config.recipes import run_config

    if problems := [problem for text in fills if (problem := problem_of_fill(text))]:
        raise UserError("\n".join(problems))
    config = run_config(run)
    if (prompts or fills) and (config.reads_images or config.has_task_head):
        why = "reads images" if config.reads_images else f"is fine-tuned for {config.finetune.task}"
        raise UserError(f"{run} {why}: leave out --prompt and --fill")
    from lm.runs.directory import Run, saved_evaluation

    if config.has_task_head:
        from lm.reports.finetune_report import write_finetune_report

        click.echo(str(write_finetune_report(Run(run, config), which if is_given("which") else "best")))
        return
    from lm.reports.image_report import write_image_report
    from lm.reports.run_report import write_report

    opened = Run(run, config)
    defaults, saved = opened.config.report, opened.checkpoint(which)
    evaluation = saved_evaluation(opened, saved)
    if opened.config.reads_images:
        path = write_image_report(opened, evaluation, saved)
    else:
        path = write_report(opened, evaluation, prompts or defaults.prompts, fills or defaults.fills, saved)
    click.echo(str(path))


@click.command(cls=FriendlyCommand, short_help="Compare the losses and settings of runs.")
@click.argument("runs", metavar="RUN_A RUN_B [MORE]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--out",
    default="compare.html",
    show_default=True,
    type=click.Path(path_type=Path),
    help="HTML page to write, with the numbers, the curves in one chart and the settings that differ.",
)
@json_option
def compare(runs: tuple[Path, ...], out: Path, as_json: bool) -> None:
    """Compare runs: their progress, the settings that differ, and their curves in one chart.

    Runs that are still training can be compared too.
    """
    from lm.config.recipes import run_config

    if len(runs) < 2:
        raise UserError("name at least two runs to compare")
    for path in runs:
        run_config(path)
    require_new_file(out)
    from lm.reports.comparison import compare as compare_runs
    from lm.reports.comparison import differences, open_entries, rows, write_comparison

    entries = open_entries(runs)
    comparison = compare_runs(entries)
    write_comparison(entries, comparison, out)
    if as_json:
        click.echo(json.dumps(comparison))
        return
    from data_prep.cli.tables import print_table

    header, *numbers = rows(comparison)
    print_table(header, [*numbers, *differences(comparison)], "\n".join(comparison["remarks"]))
    click.echo(str(out), err=True)
