"""``kindling harness``: evaluate a run with lm-evaluation-harness."""

from __future__ import annotations

import json
from pathlib import Path

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.errors import UserError
from lm.cli.options import checkpoint_option, device_option, json_option, run_argument


@click.command(cls=FriendlyCommand, short_help="Evaluate with lm-evaluation-harness.")
@run_argument
@click.option("--tasks", required=True, metavar="NAME,NAME", help="Tasks of the harness or from --include-path.")
@click.option(
    "--include-path",
    type=click.Path(path_type=Path),
    help="Folder with your own task files (YAML); see docs/harness for examples.",
)
@click.option(
    "--readout", default="", help="Readout that scores: next_token or a masked one. [default: the run's first]"
)
@click.option("--num-fewshot", type=int, default=None, help="Solved examples before each question.")
@click.option("--limit", type=int, default=None, help="Evaluate only this many examples per task, for a quick test.")
@checkpoint_option
@device_option
@json_option
def harness(
    run: Path,
    tasks: str,
    include_path: Path | None,
    readout: str,
    num_fewshot: int | None,
    limit: int | None,
    which: str,
    device: str,
    as_json: bool,
) -> None:
    """Evaluate RUN on tasks of lm-evaluation-harness, which pip install "kindling-lm[harness]" installs.

    The tasks of the harness download their data; your own task files can read local data.
    """
    from lm.config.recipes import require_language_model, run_config

    require_language_model(run, run_config(run))
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
        from lm_eval.utils import make_table
    except ImportError:
        raise UserError('the harness needs the package "lm-eval": pip install "kindling-lm[harness]"') from None
    from lm.evaluation.lm_eval_harness import KindlingLM

    model = KindlingLM(str(run), readout, which, device)
    manager = TaskManager(include_path=include_path)
    names = tasks.split(",")
    if unknown := [name for name in names if not manager.match_tasks([name])]:
        raise UserError(f'the harness has no task "{unknown[0]}": choose one of its tasks, or one from --include-path')
    results = lm_eval.simple_evaluate(
        model, tasks=names, task_manager=manager, num_fewshot=num_fewshot, limit=limit, log_samples=False
    )
    assert results is not None
    if as_json:
        click.echo(json.dumps(results["results"], default=str))
        return
    click.echo(make_table(results))
    click.echo(f"scored by {model.readout}, step {model.step:,}; texts begin after an end-of-text token", err=True)
