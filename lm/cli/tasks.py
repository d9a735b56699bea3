"""``kindling tasks``: what pretraining bought, as one table per task."""

from __future__ import annotations

import dataclasses
import itertools
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.help import Section
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
from lm.config.finetune_settings import FinetuneConfig
from lm.config.settings import finetuning_settings

if TYPE_CHECKING:
    import torch

    from lm.evaluation.task_table import Cell, Examples, Task
    from lm.inference.embedding import Reading
    from lm.runs.directory import Run

# Settings that the rows determine, or another option here.
LEFT_OUT = ("method", "weights", "seed", "device", "threads", "reads", "pooling")
ONE_TASK = ("task", "train", "validation", "test", "labels")
SETTINGS = [
    dataclasses.replace(setting, default=FinetuneConfig.epochs) if setting.name == "epochs" else setting
    for setting in finetuning_settings()
    if setting.name not in LEFT_OUT
]


@click.command(
    cls=FriendlyCommand,
    short_help="Measure what pretraining bought, task by task.",
    sections=(
        Section("Task", "task train validation test text_column label_column", "labels file"),
        Section("Table", "out rows seeds", "keep_runs reads pooling layer"),
        Section("Fine-tuned rows", "epochs batch_examples learning_rate"),
    ),
)
@run_argument
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for the tables; it is created.")
@click.option(
    "--tasks",
    "file",
    type=click.Path(path_type=Path),
    help="TOML file with several tasks (docs/tasks.md), instead of --task, --train and --test.",
)
@click.option("--test", default="", help="Examples that the table reports on. --validation only chooses the best step.")
@click.option(
    "--labels",
    type=float,
    metavar="SHARE",
    help="Share of the training examples to use, of each class, drawn by the seed: 0.1 for a tenth. [default: all]",
)
@click.option("--rows", default="", metavar="NAME,NAME", help="Rows of the table; all by default.")
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
    labels: float | None,
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
    """What did pretraining buy? A table per task: baselines without RUN, probes of frozen RUN, and fine-tuned RUN.

    \b
    kindling tasks runs/mine --task classification \\
      --train train.jsonl --test test.jsonl --out tables
    \f
    The same command resumes where it was stopped, and computes again only what has changed. OUT/report.html shows the
    tables with charts, confusion matrices and the worst errors. The settings below apply to the fine-tuned rows.

    If RUN reads images: --task image_classification, and --train and --test are folders with a folder for each class,
    or datasets of images.
    """
    numbers = seeds_of(seeds)
    if out.is_file():
        raise UserError(f"{out} is a file: choose another --out")
    from lm.config.recipes import read_toml

    given = given_settings(settings)
    of_table: dict[str, Any] = {"test": test, **({} if labels is None else {"labels": labels})}
    if file is not None:
        of_task = given | of_table
        if one_task := [f"--{name}" for name in of_task if name in ONE_TASK and of_task[name] not in ("", None)]:
            raise UserError(f"--tasks names the tasks: leave out {', '.join(one_task)}")
        read_toml(file, "the tasks")
    from lm.evaluation.task_table import read_task
    from lm.inference.embedding import reading_of
    from lm.model.device import choose_device
    from lm.runs.directory import open_run

    opened, where = open_run(run), choose_device(device)
    images = opened.config.reads_images
    if images and (wrong := [f"--{name}" for name, value in (("reads", reads), ("pooling", pooling)) if value]):
        raise UserError(f"{wrong[0]} is for texts: the features of an image are the mean over its patches")
    chosen = _rows(rows, images=images)
    given |= {name: value for name, value in (("reads", reads), ("pooling", pooling)) if value}
    form = opened.image_format if images else None
    examples = [read_task(task, form) for task in _named_tasks(opened, file, of_table, given)]
    for note in dict.fromkeys(note for each in examples for note in each.notes):
        click.echo(note, err=True)
    reading = reading_of(opened.config, reads, pooling, layer)
    which = given.get("checkpoint", "newest")
    cells = _compute(opened, where, reading, examples, chosen, numbers, out, which=which, keep_runs=keep_runs)
    _print_tables(out, examples, cells, as_json)


def _named_tasks(run: Run, file: Path | None, of_table: dict[str, Any], given: dict[str, Any]) -> list[Task]:
    """The tasks of ``--tasks``, or the one of the other options."""
    from lm.evaluation.task_file import make_task, read_tasks

    if file is None:
        name = Path(given.get("train", "")).parent.name or "task"
        return [make_task(run, name, {}, {}, of_table, given)]
    return read_tasks(run, file, given)


def _compute(
    run: Run,
    device: torch.device,
    reading: Reading,
    examples: list[Examples],
    rows: list[str],
    seeds: list[int],
    out: Path,
    *,
    which: str,
    keep_runs: bool,
) -> list[Cell]:
    """Compute the cells of all tasks from the checkpoint ``which``, printing each, and write the report."""
    from lm.config.recipes import require_no_task_head
    from lm.evaluation.frozen_features import ImageFeatures, TextFeatures
    from lm.evaluation.task_table import CellMaker
    from lm.evaluation.tuned_rows import Tuner
    from lm.reports.task_report import write_task_report

    saved = run.checkpoint(which)
    features: ImageFeatures | TextFeatures
    if run.config.reads_images:
        require_no_task_head(run.path, run.config)
        features = ImageFeatures(run, run.load_image_model(device, saved), reading.layer)
        read = "features are the mean over an image's patches"
    else:
        features = TextFeatures(run, run.load_model(device, saved), reading)
        read = f"texts read {reading.reads}, pooled by {reading.pooling}"
    maker = CellMaker(features, saved.weights_sha256, Tuner(run, device), out, keep_runs=keep_runs)
    cells = []
    for each, row, seed in itertools.product(examples, rows, seeds):
        cell = maker.cell(each, row, seed)
        result = f"{each.task.judged_by} {cell.metrics[each.task.judged_by]:.3f} in {cell.seconds:.1f} s"
        click.echo(f"{each.task.name}  {row}  seed {seed}  {result}  {cell.note}".rstrip(), err=True)
        cells.append(cell)
    lead = f"{features.model.describe()}; step {saved.step:,}; {read}."
    write_task_report(out / "report.html", run.path.name, lead, examples, cells)
    return cells


def _rows(text: str, *, images: bool) -> list[str]:
    from lm.evaluation.task_table import IMAGE_ROWS, ROWS

    known = IMAGE_ROWS if images else ROWS
    rows = [row.strip() for row in text.split(",")] if text else list(known)
    if unknown := [row for row in rows if row not in known]:
        raise UserError(f'there is no row "{unknown[0]}": choose from {", ".join(known)}')
    return [row for row in known if row in rows]


def _print_tables(out: Path, examples: list[Examples], cells: list[Cell], as_json: bool) -> None:
    from lm.evaluation.task_table import findings, summarize
    from lm.reports.task_report import table

    summaries = summarize(cells)
    if as_json:
        click.echo(json.dumps([asdict(summary) for summary in summaries]))
        return
    from data_prep.cli.tables import print_table

    for each in examples:
        own = [summary for summary in summaries if summary.task == each.task.name]
        header, lines = table(own, each.task.judged_by)
        sentences = findings(own, each.task.judged_by)
        print_table((each.task.name, *header[1:]), lines, "\n".join([*sentences, ""]))
    click.echo(f"charts and errors: {out / 'report.html'}", err=True)
