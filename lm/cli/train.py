"""``kindling train``: pretrain a model from a recipe."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.errors import USER_ERROR_STATUS, UserError
from lm.cli.options import given_settings, json_option, settings_options
from lm.config.settings import Config, FinetuneConfig, ReportConfig, pretraining_settings


def is_one_of_several() -> bool:
    """Whether torchrun started several processes with this command; asks no PyTorch, unlike ``distributed``."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@click.command(
    cls=FriendlyCommand,
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True, "max_content_width": 110},
)
@click.argument("recipe", metavar="[RECIPE]", required=False)
@click.option(
    "--run",
    "run_path",
    type=click.Path(path_type=Path),
    help="Run directory to write. Default: runs/NAME-OF-THE-RECIPE.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Resume the run even if training settings have changed (its shape and data cannot); without a RECIPE, with "
    "the run's own settings. An unchanged command resumes without this option.",
)
@click.option(
    "--plan",
    "plan_only",
    is_flag=True,
    help="Print what the run would need (parameters, memory by part, speed of a dry step, total time) and write "
    "nothing. Without --data, give --vocab-size.",
)
@json_option
@settings_options(pretraining_settings())
@click.pass_context
def train(
    context: click.Context,
    recipe: str | None,
    run_path: Path | None,
    resume: bool,
    plan_only: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Pretrain a model: RECIPE is a TOML file such as configs/tiny.toml, or the name of one that comes with Kindling.

    Every setting of a recipe is also an option here; the defaults below apply to settings that are not in the recipe.
    The same command resumes a run that was stopped.
    """
    try:
        config, run_path, before = _config_and_run(recipe, run_path, settings, context.args)
    except UserError:
        if is_one_of_several():  # every process finds the same mistake, and one reports it
            from lm.training.distributed import leave_unless_first

            leave_unless_first(USER_ERROR_STATUS)
        raise
    if plan_only:
        _print_plan(config, before, as_json)
        return

    from lm.reports.run_report import write_report
    from lm.runs.directory import saved_evaluation
    from lm.training.pretraining import train as train_run
    from lm.training.terminal import TerminalProgress

    run = train_run(config, run_path, TerminalProgress(), accept_changes=resume)
    if is_one_of_several() and os.environ["RANK"] != "0":
        return
    report, newest = run_path / "report.html", run.latest()
    if newest and not (report.exists() and report.stat().st_mtime >= newest.path.stat().st_mtime):
        write_report(run, saved_evaluation(run, newest), run.config.report.prompts, run.config.report.fills)
    if as_json:
        last = [line for line in run.metrics() if "validation" in line][-1:]
        click.echo(json.dumps({"run": str(run_path), **(last[0] if last else {})}))
    click.echo(f"{run_path} is ready, with {report}; next: python evaluate.py {run_path}", err=True)


def _config_and_run(
    recipe: str | None, run_path: Path | None, settings: dict[str, Any], extra_arguments: list[str]
) -> tuple[Config, Path, Config | None]:
    """The settings that a command line of ``train`` asks for, the run directory, and the run's settings so far.

    Raises:
        UserError: a setting or an argument is wrong, or there is nothing to resume.
    """
    from lm.config.recipes import find_recipe, load_config

    if recipe is None and run_path is None:
        raise UserError(
            "name a recipe to train (for example configs/tiny.toml), or a run to resume: --run RUN --resume"
        )
    extras = [*([recipe] if recipe and recipe.startswith("-") else []), *extra_arguments]
    unknown = tuple(extra.split("=")[0] for extra in extras if extra.startswith("-"))
    if recipe in extras:
        recipe = None  # an unknown option before the recipe was taken for it
    if run_path is None:
        run_path = Path("runs") / Path(str(recipe)).stem
    saved = run_path / "config.toml"
    before = load_config(saved) if saved.is_file() else None
    # The rows of a micro-batch may have been chosen for another batch: they are kept only if they still fit.
    base = before and before.replace(micro_batch_rows=0)
    if base is None and settings["init_from"]:
        base = _like(settings["init_from"])
    if recipe is None and base is None and not unknown:
        raise UserError(
            f"{run_path} is not a run directory yet: name a recipe to start it (for example configs/tiny.toml)"
        )
    given = given_settings(settings)
    config = load_config(find_recipe(recipe) if recipe else None, given, unknown_options=unknown, base=base)
    if config.is_finetuning:
        raise UserError(f"{run_path} is a fine-tuning run: finetune.py resumes it")
    if extras:
        raise UserError(f"unexpected argument {extras[0]!r}")
    return config, run_path, before


def _like(run: str) -> Config:
    """The initial settings of a run with ``init_from``: those of that run, except for data and report."""
    from lm.runs.directory import open_run

    return dataclasses.replace(open_run(run).config, report=ReportConfig(), finetune=FinetuneConfig()).replace(
        data=(), micro_batch_rows=0
    )


def _print_plan(config: Config, before: Config | None, as_json: bool) -> None:
    from lm.cli.tables import print_table
    from lm.training.plan import plan_run
    from lm.training.trainer import explain_out_of_memory

    with explain_out_of_memory():
        plan = plan_run(config, before)
    if as_json:
        click.echo(json.dumps(plan.as_dict()))
    else:
        print_table((), plan.table())
