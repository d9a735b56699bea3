"""The command line: ``kindling train``, ``sample``, ``evaluate``, … Each command is a file of ``lm.commands``."""

from __future__ import annotations

import click

from data_prep.cli import main as prep
from data_prep.command_line import FriendlyGroup
from lm import __version__
from lm.commands.embed import embed
from lm.commands.evaluate import evaluate
from lm.commands.export import export, import_run, merge_run
from lm.commands.finetune import finetune
from lm.commands.harness import harness
from lm.commands.predict import predict
from lm.commands.report import compare, report
from lm.commands.sample import sample
from lm.commands.serve import serve
from lm.commands.tasks import tasks
from lm.commands.train import train


@click.group(cls=FriendlyGroup)
@click.version_option(__version__, prog_name="kindling")
def main() -> None:
    """Pretrain a small language model on your own text, and use it."""


main.add_command(prep, "prep")
for command in (
    train,
    sample,
    serve,
    finetune,
    predict,
    evaluate,
    embed,
    tasks,
    harness,
    report,
    compare,
    export,
    import_run,
    merge_run,
):
    main.add_command(command)
