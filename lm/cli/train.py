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
from lm.config.recipes import find_recipe, load_config
from lm.config.settings import Config, FinetuneConfig, ReportConfig, pretraining_settings


def is_one_of_several() -> bool:
    """Whether torchrun started several processes with this command (``distributed``, which needs PyTorch)."""
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
    help="Go on with the run even if settings of its training have changed (not its shape or data); "
    "without a RECIPE, with the settings it has. An unchanged command goes on by itself.",
)
@click.option(
    "--plan",
    "plan_only",
    is_flag=True,
    help="Print what the run would need (parameters, memory by part, a dry step's speed, time to the end) and write "
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

    Any setting of the recipe can be given here by its name; the defaults below hold where the recipe says nothing. The
    same command goes on where a run was stopped.
    """
    try:
        config, run_path = _config_and_run(recipe, run_path, settings, context.args)
    except UserError:
        if is_one_of_several():  # all meet the same mistake, and one tells it
            from lm.training.distributed import leave_unless_first

            leave_unless_first(USER_ERROR_STATUS)
        raise
    if plan_only:
        _print_plan(config, run_path, as_json)
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
) -> tuple[Config, Path]:
    """The settings that a command line of ``train`` asks for, and where their run lies.

    Raises:
        UserError: a setting or an argument is wrong, or there is nothing to go on with.
    """
    if recipe is None and run_path is None:
        raise UserError("name a recipe to train (configs/tiny.toml, say), or a run to go on with: --run RUN --resume")
    extras = [*([recipe] if recipe and recipe.startswith("-") else []), *extra_arguments]
    unknown = tuple(extra.split("=")[0] for extra in extras if extra.startswith("-"))
    if recipe in extras:
        recipe = None  # an unknown option stood before the recipe and took its place
    if run_path is None:
        run_path = Path("runs") / Path(str(recipe)).stem
    saved = run_path / "config.toml"
    before = load_config(saved) if saved.is_file() else None
    # The rows of a micro-batch may have been chosen, for the batch as it was: the run goes on with them if they fit.
    base = before and before.replace(micro_batch_rows=0)
    if base is None and settings["init_from"]:
        base = _like(settings["init_from"])
    if recipe is None and base is None and not unknown:
        raise UserError(
            f"{run_path} is not a run directory yet: name a recipe to begin it with (configs/tiny.toml, say)"
        )
    config = load_config(
        find_recipe(recipe) if recipe else None, given_settings(settings), unknown_options=unknown, base=base
    )
    if config.is_finetuning:
        raise UserError(f"{run_path} is a fine-tuning: finetune.py goes on with it")
    if extras:
        raise UserError(f"unexpected argument {extras[0]!r}")
    return config, run_path


def _like(run: str) -> Config:
    """Where the settings of a run with ``init_from`` begin: at those of that one, data and report aside."""
    from lm.runs.directory import open_run

    return dataclasses.replace(open_run(run).config, report=ReportConfig(), finetune=FinetuneConfig()).replace(
        data=(), micro_batch_rows=0
    )


def _print_plan(config: Config, run_path: Path, as_json: bool) -> None:
    from lm.training.plan import plan_run
    from lm.training.trainer import explain_out_of_memory

    saved = run_path / "config.toml"
    with explain_out_of_memory():
        plan = plan_run(config, load_config(saved) if saved.is_file() else None)
    if as_json:
        click.echo(json.dumps(plan.as_dict()))
        return
    width = max(len(name) for name, _ in plan.table())
    for name, value in plan.table():
        click.echo(f"{name:{width}}  {value}")
