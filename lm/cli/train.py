"""``kindling train``: pretrain a model from a recipe."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.help import Section
from data_prep.errors import USER_ERROR_STATUS, UserError
from data_prep.errors.command_names import command
from lm.cli.options import given_settings, json_option, settings_options, usual_command
from lm.config.settings import Config, pretraining_settings

if TYPE_CHECKING:
    from lm.runs.directory import Run


def is_one_of_several() -> bool:
    """Whether torchrun started several processes with this command; asks no PyTorch, unlike ``distributed``."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


@click.command(
    cls=FriendlyCommand,
    short_help="Pretrain a model on a dataset.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    sections=(
        Section("Run", "data run_path plan_only resume init_from device"),
        Section("Model", "num_layers hidden_size num_heads context_length objective"),
        Section("Training", "steps batch_tokens learning_rate validate_every"),
    ),
)
@click.argument("recipe", metavar="[RECIPE]", required=False)
@click.option(
    "--run",
    "run_path",
    type=click.Path(path_type=Path),
    help="Run directory to write; the default is runs/NAME-OF-THE-RECIPE.",
)
@click.option(
    "--resume",
    is_flag=True,
    help="Resume the run even if training settings have changed. Without a RECIPE, the run's own settings are used. "
    "The model's shape and the data cannot change. An unchanged command resumes without this option.",
)
@click.option(
    "--plan",
    "plan_only",
    is_flag=True,
    help="Print what the run would need, and write nothing. That is parameters, memory by part, speed of a dry step, "
    "total time. Without --data, give --vocab-size. The speed is also given as a share of the peak: of the rate at "
    "which this machine multiplies matrices.",
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
    """Pretrain a model: RECIPE is a TOML file, or the name of one that comes with Kindling, such as tiny.

    \b
    kindling train tiny --data data/mine --run runs/mine
    kindling train tiny --data data/mine --plan            # will it fit? how long?
    kindling train --resume --run runs/mine --steps 2000   # more steps
    \f
    Every setting of a recipe is also an option here; the defaults below apply to settings that are not in the recipe.
    The same command resumes a run that was stopped.
    """
    extras = [*([recipe] if recipe and recipe.startswith("-") else []), *context.args]
    unknown = tuple(extra.split("=")[0] for extra in extras if extra.startswith("-"))
    recipe = None if recipe in extras else recipe  # an unknown option before the recipe was taken for it
    from lm.config.recipes import pretraining_config

    try:
        given = given_settings(settings)
        config, run_path, before = pretraining_config(recipe, run_path, given, unknown_options=unknown)
        if extras:
            raise UserError(f"unexpected argument {extras[0]!r}")
        if before is None and (config.data.data or not plan_only):  # a run finds its own data, also after a move
            from lm.data.datasets import open_training_data, settled

            settled(config, open_training_data(config.data.data, config.data.access))
    except UserError:
        if is_one_of_several():  # every process finds the same mistake, and one reports it
            from lm.training.distributed import leave_unless_first

            leave_unless_first(USER_ERROR_STATUS)
        raise
    if plan_only:
        _print_plan(config, before, run_path, as_json)
        return
    from lm import api

    run = api.train(config, run=run_path, resume=resume)
    if is_one_of_several() and os.environ["RANK"] != "0":
        from lm.training.distributed import end_rank

        end_rank(0)
    last = [line for line in run.metrics() if "validation" in line][-1:]
    if as_json:
        click.echo(json.dumps({"run": str(run_path), **(last[0] if last else {})}))
    if last and config.readouts:
        _compare_with_bz2(run, last[0]["validation"])
    ready = f"{run_path} is ready, with {run_path / 'report.html'}"
    judged = config.readouts or config.reads_images
    then = f"{command('evaluate')} {run_path}" if judged else usual_command(run_path, config)
    click.echo(f"{ready}; next: {then}", err=True)


def _compare_with_bz2(run: Run, validation: dict[str, Any]) -> None:
    """Say which readouts, at the last validation, still predict the text worse than a compressor does."""
    from lm.evaluation.baselines import compressor_bits
    from lm.runs.run_data import open_text

    bits = compressor_bits(open_text(run))
    if worse := [name for name in run.config.readouts if validation[name]["bits_per_byte"] >= bits]:
        verb = "are" if worse[1:] else "is"
        click.echo(
            f"note: {' and '.join(worse)} {verb} still worse than bz2 -9 ({bits:.3f} bits/byte): train longer, or on "
            "more text",
            err=True,
        )


def _print_plan(config: Config, before: Config | None, run_path: Path, as_json: bool) -> None:
    from data_prep.cli.tables import print_table
    from lm.runs.directory import Run
    from lm.runs.run_data import located
    from lm.training.plan import plan_run
    from lm.training.trainer import explain_out_of_memory

    if before is not None:
        config = located(Run(run_path, config)).config
    with explain_out_of_memory():
        plan = plan_run(config, before)
    if as_json:
        click.echo(json.dumps(plan.as_dict()))
    else:
        print_table((), plan.table())
