"""Tasks from a file or the command line, and the settings of their fine-tuned rows.

A file of tasks (TOML) uses the names of ``finetune.py``'s settings, ``test`` for the test examples, and ``labels`` for
the share of the training examples to use::

    [settings]                  # of all fine-tuned rows
    epochs = 3
    [rows.lora]                 # of one of them
    learning_rate = 0.004
    [tasks.sst2]                # paths are relative to this file; settings here apply to this task
    task = "classification"
    train = "sst2/train.jsonl"
    validation = "sst2/validation.jsonl"
    test = "sst2/test.jsonl"
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from lm.config.recipes import finetuning_config, read_toml
from lm.config.settings import Config, all_settings
from lm.data.examples import columns_of
from lm.evaluation.task_table import TUNED, Task
from lm.runs.directory import Run

# These settings describe a task; all others say how its rows are fine-tuned.
OF_TASK = ("task", "train", "validation", "judged_by", "text_column", "text_pair_column", "label_column")
SECTIONS = ("settings", "rows", "tasks")


Settings = Mapping[str, Any]


def read_tasks(run: Run, path: Path, overrides: Settings) -> list[Task]:
    """Read the tasks of a file; ``overrides`` are settings that take precedence over the file.

    Raise UserError if the file cannot be read, or has problems (one line for each).
    """
    content = read_toml(path, "the tasks")
    by_row = content.get("rows", {})
    sections, rows = ", ".join(SECTIONS), ", ".join(TUNED)
    problems = [f'unknown section "[{n}]" in {path}: the sections are {sections}' for n in content if n not in SECTIONS]
    problems += [
        f'unknown row "[rows.{n}]" in {path}: the fine-tuned rows are {rows}' for n in by_row if n not in TUNED
    ]
    if not content.get("tasks"):
        problems.append(f"there are no tasks in {path}: add a section for each, for example [tasks.sst2]")
    tasks = []
    for name, given in content.get("tasks", {}).items():
        if Path(name).name != name:
            problems.append(f'[tasks."{name}"] is not a valid folder name')
        for key in given.keys() & {"train", "validation", "test"}:  # paths are relative to the file
            if isinstance(file := given[key], str) and file and ":" not in file.partition("/")[0]:  # hf:, builtin:, s3:
                given[key] = str(path.parent / file)
        try:
            tasks.append(make_task(run, name, content.get("settings", {}), by_row, given, overrides))
        except UserError as problem:
            problems += [f"[tasks.{name}] {line}" for line in str(problem).splitlines()]
    if problems:
        raise UserError("\n".join(problems))
    return tasks


def make_task(
    run: Run, name: str, settings: Settings, by_row: Mapping[str, Settings], of_task: Settings, overrides: Settings
) -> Task:
    """A task with the settings of each of its fine-tuned rows; later arguments override earlier ones.

    Raise UserError if settings are invalid, with one line for each.
    """
    known = {setting.name for setting in all_settings()}
    problems: dict[str, None] = {}  # in order, without repetition
    given = {row: {**settings, **by_row.get(row, {}), **of_task, **overrides} for row in TUNED}
    test, labels = given["full"].get("test", ""), given["full"].get("labels", 1.0)
    configs: dict[str, Config] = {}
    for row, values in given.items():
        for name_of_table in ("test", "labels"):
            values.pop(name_of_table, None)
        unknown = [f"--{key.replace('_', '-')}" for key in values if key not in known]
        valid = {key: value for key, value in values.items() if key in known}
        try:
            configs[row] = finetuning_config(run.path, run.config, valid | TUNED[row], unknown_options=unknown)
        except UserError as problem:
            problems.update(dict.fromkeys(str(problem).splitlines()))
    if not problems:
        task = configs["full"].finetune  # the rows differ only in how they are fine-tuned
        missing = {"--train": task.train, "--test": test}
        problems.update({f"name the examples: {option} FILE": None for option, file in missing.items() if not file})
    if isinstance(labels, bool) or not isinstance(labels, (int, float)) or not 0 < labels <= 1:
        problems[f"labels is {labels!r}: choose a share of the training examples, above 0 and at most 1"] = None
    if problems:
        raise UserError("\n".join(problems))
    own = {row: {key: value for key, value in values.items() if key not in OF_TASK} for row, values in given.items()}
    metric = "" if task.judged_by == "auto" else task.judged_by
    return Task(name, task.task, task.train, test, task.validation, metric, columns_of(task), own, float(labels))
