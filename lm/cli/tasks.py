"""``kindling tasks``: what pretraining bought, in one table for each task."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.errors import UserError
from lm.cli.options import (
    device_option,
    given_settings,
    json_option,
    reading_options,
    run_argument,
    seeds_of,
    settings_options,
)
from lm.config.settings import finetuning_settings

if TYPE_CHECKING:
    from lm.evaluation.task_table import Cell, Examples

# The rows say these, or another option here.
LEFT_OUT = ("method", "weights", "seed", "device", "threads", "reads", "pooling")
WIDTH = 120  # of a table, also where the terminal is narrower
ONE_TASK = ("task", "train", "validation", "test")
SETTINGS = [setting for setting in finetuning_settings() if setting.name not in LEFT_OUT]


@click.command(cls=FriendlyCommand, context_settings={"max_content_width": 110})
@run_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder of the tables; it is made.")
@click.option(
    "--tasks",
    "file",
    type=click.Path(path_type=Path),
    help="TOML file with several tasks (docs/tasks.md), instead of --task, --train and --test.",
)
@click.option("--test", default="", help="Examples that the table reports on. --validation only chooses steps.")
@click.option("--rows", default="", metavar="NAME,NAME", help="Rows of the table, all of them if not given.")
@click.option("--seeds", default="0,1,2", show_default=True, help="Seeds of each row.")
@click.option("--keep-runs", is_flag=True, help="Keep the run directories of the fine-tuned rows, in --out/runs.")
@reading_options
@device_option
@json_option
@settings_options(SETTINGS)
def tasks(
    run: Path,
    out: Path,
    file: Path | None,
    test: str,
    rows: str,
    seeds: str,
    keep_runs: bool,
    reads: str | None,
    pooling: str | None,
    layer: int,
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """What did pretraining buy? A table for each task: what is reached without RUN, with it frozen, and fine-tuned.

    \b
    kindling tasks runs/mine --task classification --train train.jsonl --test test.jsonl --out tables

    The same command goes on where it was stopped, and does again only what has changed. OUT/report.html shows the
    tables with pictures, confusion matrices and the hardest errors. Settings below are those of the fine-tuned rows.
    """
    from lm.evaluation.task_file import make_task, read_tasks
    from lm.evaluation.task_table import Maker, read_task
    from lm.evaluation.tuned_rows import Tuner
    from lm.inference.embedding import reading_of
    from lm.model.device import choose_device
    from lm.model.transformer import describe
    from lm.reports.task_report import write_task_report
    from lm.runs.checkpoint import MODEL
    from lm.runs.directory import open_run

    opened, where = open_run(run), choose_device(device)
    chosen, numbers = _rows(rows), seeds_of(seeds)
    given = given_settings(settings)
    one_task = {name: value for name, value in (*given.items(), ("test", test)) if name in ONE_TASK and value}
    if file is not None and one_task:
        raise UserError(f"--tasks names the tasks: leave {', '.join(f'--{name}' for name in one_task)} out")
    given |= {name: value for name, value in (("reads", reads), ("pooling", pooling)) if value}
    if file is not None:
        named = read_tasks(opened, file, given)
    else:
        named = [make_task(opened, Path(given.get("train", "")).parent.name or "task", {}, {}, {"test": test}, given)]
    examples = [read_task(task) for task in named]
    saved = opened.newest()
    model = opened.load_model(where, saved)
    reading = reading_of(opened.config, reads, pooling, layer)
    weights = saved.state["sha256"][MODEL]
    maker = Maker(opened, model, weights, reading, Tuner(opened, where), out, keep_runs=keep_runs)
    cells = []
    for each in examples:
        for row in chosen:
            for seed in numbers:
                cell = maker.cell(each, row, seed)
                told = f"{each.task.judged_by} {cell.metrics[each.task.judged_by]:.3f} in {cell.seconds:.1f} s"
                click.echo(f"{each.task.name}  {row}  seed {seed}  {told}  {cell.note}", err=True)
                cells.append(cell)
    lead = f"{describe(model)}; step {saved.step:,}; texts read {reading.reads}, pooled by {reading.pooling}."
    write_task_report(out / "report.html", opened.path.name, lead, examples, cells)
    _tell(out, examples, cells, as_json)


def _rows(text: str) -> list[str]:
    from lm.evaluation.task_table import ROWS

    rows = [row.strip() for row in text.split(",")] if text else list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        raise UserError(f'there is no row "{unknown[0]}": choose of {", ".join(ROWS)}')
    return [row for row in ROWS if row in rows]


def _tell(out: Path, examples: list[Examples], cells: list[Cell], as_json: bool) -> None:
    from lm.evaluation.task_table import findings, summarise
    from lm.reports.task_report import table

    summaries = summarise(cells)
    if as_json:
        click.echo(json.dumps([asdict(summary) for summary in summaries]))
        return
    from rich.table import Table

    from lm.cli.tables import console

    printer = console()
    printer.width = max(printer.width, WIDTH)
    for each in examples:
        own = [summary for summary in summaries if summary.task == each.task.name]
        header, lines = table(own, each.task.judged_by)
        shown = Table(each.task.name, *header[1:], box=None, pad_edge=False)
        for line in lines:
            shown.add_row(*line)
        printer.print(shown)
        for sentence in findings(own, each.task.judged_by):
            printer.print(sentence, markup=False)
        printer.print()
    click.echo(f"{out / 'report.html'} shows more", err=True)
