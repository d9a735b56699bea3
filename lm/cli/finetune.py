"""``kindling finetune``: fine-tune a pretrained run on a task."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.help import Section
from data_prep.errors import UserError
from lm.cli.options import (
    given_settings,
    json_option,
    run_argument,
    seeds_of,
    settings_options,
    usual_command,
)
from lm.config.settings import finetuning_settings

if TYPE_CHECKING:
    from lm.config.settings import Config
    from lm.finetuning.finetune import Finetuned


@click.command(
    cls=FriendlyCommand,
    short_help="Fine-tune a model on a task.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    sections=(
        Section("Task", "task train validation text_column label_column"),
        Section("Run", "out resume device", "recipe seeds"),
        Section("Training", "method epochs batch_examples learning_rate patience"),
    ),
)
@run_argument
@click.option(
    "--run",
    "out",
    type=click.Path(path_type=Path),
    required=True,
    help="Run directory to write. With --seeds, the folder for one run per seed.",
)
@click.option(
    "--recipe", type=click.Path(path_type=Path), help="TOML file with settings, in the format of config.toml."
)
@click.option(
    "--seeds",
    default="",
    help="Seeds, for example 0,1,2: train --run/seed_0 and so on, and print the mean of their metrics.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Resume the run even if settings of its training have changed. An unchanged command always resumes.",
)
@json_option
@settings_options(finetuning_settings())
@click.pass_context
def finetune(
    context: click.Context,
    run: Path,
    out: Path,
    recipe: Path | None,
    seeds: str,
    resume: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Fine-tune the pretrained RUN on a task: classify texts, pairs of texts or images, predict a number, tag words,
    choose among answers, follow instructions, or embed sentences.

    \b
    kindling finetune runs/mine --task classification \\
      --train train.jsonl --validation validation.jsonl --run runs/task
    \f
    The same command resumes a run that was stopped. The checkpoint with the best validation is kept, and predict uses
    it.
    """
    from lm.config.recipes import finetuning_config, require_examples, run_config

    unknown = tuple(argument.split("=")[0] for argument in context.args if argument.startswith("-"))
    config = finetuning_config(run, run_config(run), given_settings(settings), recipe, unknown_options=unknown)
    if context.args and not unknown:
        raise UserError(f"unexpected argument {context.args[0]!r}")
    require_examples(config)
    runs = _runs(config, out, seeds)
    for _, path in runs:
        if (path / "config.toml").is_file() and not run_config(path).is_finetuning:
            raise UserError(f"{path} is a pretrained run, not one of fine-tuning: choose another --run")
    _check_files(config)
    from lm import api

    done = [api.finetune(each, run=path, resume=resume) for each, path in runs]
    _print_results(done, as_json)


def _check_files(config: Config) -> None:
    """Raise UserError for what names of images, or beginnings of files of examples, show, before PyTorch loads."""
    from lm.data.examples import check_first_example, columns_of
    from lm.data.image_files import has_validation

    if config.reads_images:
        for source in filter(None, (config.finetune.train, config.finetune.validation)):
            has_validation(source)
        return
    task, columns = config.finetune, columns_of(config.finetune)
    check_first_example(task.train, task.task, columns)
    if task.validation:
        check_first_example(task.validation, "regression" if task.task == "contrastive" else task.task, columns)


def _runs(config: Config, out: Path, seeds: str) -> list[tuple[Config, Path]]:
    """The settings and the run directory of each seed."""
    if not seeds:
        return [(config, out)]
    return [(config.replace(seed=seed), out / f"seed_{seed}") for seed in seeds_of(seeds)]


def _print_results(done: list[Finetuned], as_json: bool) -> None:
    import statistics

    names = list(done[0].scores)
    mean = {name: statistics.fmean(each.scores[name] for each in done) for name in names}
    spread = {name: statistics.stdev(each.scores[name] for each in done) for name in names} if done[1:] else {}
    if as_json:
        runs = [
            {
                "run": str(each.path),
                "step": each.step,
                "metrics": each.scores,
                "parameters": each.trained_parameters,
            }
            for each in done
        ]
        click.echo(json.dumps({"runs": runs, "mean": mean, "sd": spread}))
    else:
        steps = dict.fromkeys(f"{each.step:,}" for each in done)
        click.echo(f"step  {', '.join(steps)}")
        for name in names:
            more = f" ± {spread[name]:.4f} over {len(done)} seeds" if spread else ""
            click.echo(f"{name}  {mean[name]:.4f}{more}")
    ready = f"{done[0].path} is ready; {'best' if names else 'last'} step: {done[0].step:,}"
    click.echo(f"{ready}; next: {usual_command(done[0].path, done[0].config)}", err=True)
