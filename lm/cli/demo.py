"""``kindling demo``: the whole pipeline on text that is already on the machine."""

from __future__ import annotations

import shlex
import subprocess
import sys

import click

from data_prep.cli.errors import FriendlyCommand

DATA, RUN = "data/demo", "runs/demo"
STAGES = (
    f"prep build builtin --out {DATA} --vocab-size 8192 --validation-fraction 0.02 --word-split gpt2",
    f"train demo --data {DATA} --run {RUN}",
    f"evaluate {RUN}",
    f"sample {RUN} --max-new-tokens 80 --temperature 0.7 --top-p 0.95 "
    "--prompt 'Return the' --prompt 'This function computes' --prompt Parameters",
    f"sample {RUN} --fill 'Return the [MASK] of the array.' "
    "--fill 'If the argument is [MASK], an exception is raised.' --fill 'The default value is [MASK].'",
    f"report {RUN}",
)


@click.command(cls=FriendlyCommand, short_help="The whole pipeline on this machine's docstrings, in a few minutes.")
def demo() -> None:
    """Run the whole pipeline: text, tokenizer, shards, training, evaluation, samples, report.

    The text is the documentation in Python and the installed packages, so nothing is downloaded. Each command is shown
    before it runs; data/demo and runs/demo are written to the current folder. It takes a few minutes on two cores, and
    the same command resumes if it was stopped.
    """
    for stage in STAGES:
        click.echo(f"$ kindling {stage}")
        if status := _run(shlex.split(stage)):
            sys.exit(status)
    click.echo(f"next: kindling serve {RUN}, or your own text: kindling prep build YOUR_TEXT --out data/mine", err=True)


def _run(arguments: list[str]) -> int:
    """Run a command in a process of its own, as a user would, and return its exit status."""
    program = "import sys; sys.argv[0] = 'kindling'; from lm.cli.main import main; main()"
    sys.stdout.flush()
    process = subprocess.Popen([sys.executable, "-P", "-c", program, *arguments])
    while True:
        try:
            status = process.wait()
        except KeyboardInterrupt:  # the command has received it too, and saves what it has
            continue
        return status if status >= 0 else 128 - status
