"""Tasks named in a file or on the command line, and the rows of their table that are fine-tuned.

A file of tasks (TOML) uses the names of ``finetune.py``'s settings, and ``test``, the examples that are reported on::

    [settings]                  # of all fine-tuned rows
    epochs = 3
    [rows.lora]                 # of one of them
    learning_rate = 0.004
    [tasks.sst2]                # paths count from the file's folder; a setting here is for this task
    task = "classification"
    train = "sst2/train.jsonl"
    validation = "sst2/validation.jsonl"
    test = "sst2/test.jsonl"
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.sources.records import HUGGING_FACE
from lm.config.settings import all_settings
from lm.data.examples import columns_of
from lm.evaluation.task_table import TUNED, Task
from lm.evaluation.tuned_rows import METHODS
from lm.finetuning.finetune import finetune_config
from lm.runs.directory import Run

# What a task is; other settings say how its rows are fine-tuned.
OF_TASK = ("task", "train", "validation", "judged_by", "text_column", "text_pair_column", "label_column")
SECTIONS = ("settings", "rows", "tasks")


def read_tasks(run: Run, path: Path, overrides: Mapping[str, Any]) -> list[Task]:
    """The tasks of a file; ``overrides`` are settings that hold for all, whatever the file says.

    Raises:
        UserError: the file cannot be read; or one line for each thing in it that is wrong.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the tasks {path}: {error}") from None
    problems = [f'unknown section "[{name}]" in {path}: there are {", ".join(SECTIONS)}' for name in content]
    problems = [problem for problem, name in zip(problems, content, strict=True) if name not in SECTIONS]
    by_row = content.get("rows", {})
    problems += [
        f'unknown row "[rows.{row}]" in {path}: those that are fine-tuned are {", ".join(TUNED)}'
        for row in by_row
        if row not in TUNED
    ]
    if not content.get("tasks"):
        problems.append(f"there are no tasks in {path}: name each in a section of its own, as [tasks.sst2]")
    tasks = []
    for name, given in content.get("tasks", {}).items():
        if Path(name).name != name:
            problems.append(f'[tasks."{name}"] cannot be the name of a folder: leave out what is no name')
        placed = {key: _placed(path.parent, key, value) for key, value in given.items()}
        try:
            tasks.append(make_task(run, name, content.get("settings", {}), by_row, placed, overrides))
        except UserError as problem:
            problems += [f"[tasks.{name}] {line}" for line in str(problem).splitlines()]
    if problems:
        raise UserError("\n".join(problems))
    return tasks


def _placed(folder: Path, key: str, value: Any) -> Any:
    """The setting of a file, with its path counted from where the file with the tasks is."""
    is_path = key in ("train", "validation", "test") and isinstance(value, str) and value
    return str(folder / value) if is_path and not value.startswith(HUGGING_FACE) else value


def make_task(
    run: Run,
    name: str,
    settings: Mapping[str, Any],
    by_row: Mapping[str, Mapping[str, Any]],
    of_task: Mapping[str, Any],
    overrides: Mapping[str, Any],
) -> Task:
    """A task, and the settings of each of its fine-tuned rows: later arguments hold before earlier ones.

    Raises:
        UserError: one line for each setting that is not as it should be.
    """
    given = {row: {**settings, **by_row.get(row, {}), **of_task, **overrides} for row in TUNED}
    test = next(iter(given.values())).get("test", "")
    problems: dict[str, None] = {}  # in order, each once
    known = {setting.name for setting in all_settings()}
    for row in TUNED:
        given[row].pop("test", None)
        unknown = [f"--{key.replace('_', '-')}" for key in given[row] if key not in known]
        settings = {key: value for key, value in given[row].items() if key in known}
        try:
            config = finetune_config(run, settings | METHODS[row], unknown_options=unknown)
        except UserError as problem:
            problems.update(dict.fromkeys(str(problem).splitlines()))
    if not problems:
        task = config.finetune
        missing = {"--train": task.train, "--test": test}
        problems.update({f"name the examples: {option} FILE": None for option, file in missing.items() if not file})
    if problems:
        raise UserError("\n".join(problems))
    own = {row: {key: value for key, value in given[row].items() if key not in OF_TASK} for row in TUNED}
    metric = "" if task.judged_by == "auto" else task.judged_by
    return Task(name, task.task, task.train, test, task.validation, metric, columns_of(task), own)
