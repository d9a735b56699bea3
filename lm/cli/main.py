"""The command line: ``kindling train``, ``sample``, ``evaluate``, …, with a file in ``lm.cli`` for each command.

The files import PyTorch and other large packages only inside their commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import click

from data_prep.cli.errors import FriendlyGroup
from data_prep.cli.main import main as prep
from lm import __version__
from lm.cli.demo import demo
from lm.cli.embed import embed
from lm.cli.evaluate import evaluate
from lm.cli.export import export, import_run, merge_run
from lm.cli.finetune import finetune
from lm.cli.harness import harness
from lm.cli.predict import predict
from lm.cli.report import compare, report
from lm.cli.sample import sample
from lm.cli.serve import serve
from lm.cli.sweep import sweep
from lm.cli.tasks import tasks
from lm.cli.train import train


@click.group(cls=FriendlyGroup)
@click.version_option(__version__, prog_name="kindling")
def main() -> None:
    """Pretrain a small language model on your own text, and use it."""


main.add_command(prep, "prep")
for command in (
    demo,
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
    sweep,
    export,
    import_run,
    merge_run,
):
    main.add_command(command)
