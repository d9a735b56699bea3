"""``kindling sweep``: train a recipe with several values of some settings, and compare what each reaches."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.help import Section
from data_prep.errors import UserError
from data_prep.files import LOCK, only_writer_of
from lm.cli.options import given_settings, json_option, seeds_of, settings_options
from lm.cli.train import is_one_of_several
from lm.config.settings import Config, pretraining_settings

if TYPE_CHECKING:
    from lm.evaluation.sweep import Sweep


@click.command(
    cls=FriendlyCommand,
    short_help="Try several values of settings, in a run each.",
    sections=(
        Section("Sweep", "axes out trials seeds measure", "sampler as_json"),
        Section("Settings of all points", "data context_length batch_tokens steps device"),
    ),
)
@click.argument("recipe", metavar="RECIPE")
@click.option(
    "--set",
    "axes",
    multiple=True,
    metavar="NAME=VALUE,VALUE",
    help="A setting with the values to try; repeat it for more settings. With --trials also a range, as in "
    "learning_rate=0.001..0.1:log (:log for numbers that vary by factors).",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the sweep, with a run directory for each point. Default: sweeps/NAME-OF-THE-RECIPE.",
)
@click.option(
    "--trials", type=int, metavar="N", help="Search N points with Optuna instead of trying every combination."
)
@click.option(
    "--sampler",
    type=click.Choice(["tpe", "random"]),
    default="tpe",
    show_default=True,
    help="How a search chooses points: tpe learns from the points before, the first ten of which are random.",
)
@click.option("--seeds", default="", metavar="N,N", help="Train each point with each of these seeds, as in 0,1,2.")
@click.option(
    "--measure",
    default="",
    metavar="NAME",
    help="What to compare at the last validation: for text bits_per_byte (the default, the mean over the readouts) or "
    "a readout such as next_token, for its bits per byte; for images knn_accuracy (the default with classes) or loss.",
)
@json_option
@settings_options(pretraining_settings())
def sweep(
    recipe: str,
    axes: tuple[str, ...],
    out: Path | None,
    trials: int | None,
    sampler: str,
    seeds: str,
    measure: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Train RECIPE with every combination of some settings' values, or search for good ones.

    \b
    kindling sweep tiny --data data/mine --set learning_rate=0.003,0.01 --set weight_decay=0.1,0.3
    kindling sweep tiny --data data/mine --trials 20 --set learning_rate=0.001..0.1:log

    Each point is an ordinary run directory. OUT/sweep.html shows the results, best first, and OUT/table.json has them.
    The same command continues a sweep that was stopped. The settings below are those of all points.
    """
    given = given_settings(settings)
    numbers = seeds_of(seeds) if seeds else []
    if is_one_of_several():
        raise UserError("a sweep trains in one process: start it without torchrun")
    if numbers and "seed" in given:
        raise UserError("--seeds names the seeds of every point: leave out --seed")
    if trials is not None and trials < 1:
        raise UserError(f"--trials must be at least 1, not {trials}")
    from lm.config.sweep_axes import parse_axes
    from lm.config.sweep_plan import Plan, require_optuna

    fixed = {name: f"--{name.replace('_', '-')}" for name in given} | ({"seed": "--seeds"} if numbers else {})
    parsed = parse_axes(axes, fixed, searching=trials is not None)
    place = out or Path("sweeps") / Path(recipe).stem
    if place.is_file():
        raise UserError(f"{place} is a file: choose another --out")
    plan = Plan(recipe, given, parsed, place, numbers, trials or 0, sampler, measure)
    plan.configs()  # before PyTorch is imported
    if trials is not None:
        require_optuna()
    from lm.evaluation.sweep import Sweep, check

    plan = replace(plan, measure=check(plan))
    place.mkdir(parents=True, exist_ok=True)
    with only_writer_of(place / LOCK, f"another process is working on {place}: wait for it, or choose another --out"):
        opened = Sweep(plan)
        _train_all(opened)
    _print(opened, as_json)


def _train_all(sweep: Sweep) -> None:
    import torch

    from lm import api
    from lm.reports.sweep_report import write_sweep

    def train(config: Config, path: Path) -> None:
        if config.training.compile:  # the compiler refuses a ninth model in one process
            torch.compiler.reset()
        api.train(config, run=path)

    def note(text: str) -> None:
        click.echo(text, err=True)

    sweep.run(train, note, lambda: write_sweep(sweep.plan.out, sweep.table()))
    write_sweep(sweep.plan.out, sweep.table())


def _print(sweep: Sweep, as_json: bool) -> None:
    from lm.evaluation.sweep import PAGE

    table = sweep.table()
    if as_json:
        click.echo(json.dumps(table))
    else:
        from data_prep.cli.tables import print_table
        from lm.reports.sweep_report import rows, verdict

        header, *lines = rows(table)
        print_table(header, lines, verdict(table))
    click.echo(str(sweep.plan.out / PAGE), err=True)
    if not any(point["status"] == "finished" for point in table["points"]):
        raise UserError("no point has finished: the table says why")
