"""``kindling demo``: the whole pipeline on text, or on images, that are already on the machine."""

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
IMAGES, IMAGES_RUN = "data/digits", "runs/digits"
IMAGE_STAGES = (
    f"prep images builtin:digits --out {IMAGES} --size 32 --channels 1 --validation-fraction 0.2",
    f"train images-demo --data {IMAGES} --run {IMAGES_RUN}",
    f"evaluate {IMAGES_RUN}",
    f"report {IMAGES_RUN}",
)


@click.command(cls=FriendlyCommand, short_help="The whole pipeline on text or images of this machine, in minutes.")
@click.option("--images", is_flag=True, help="Learn from the handwritten digits of scikit-learn instead of text.")
def demo(images: bool) -> None:
    """Run the whole pipeline: text, tokenizer, shards, training, evaluation, samples, report.

    The text is the documentation in Python and the installed packages, so nothing is downloaded. Each command is shown
    before it runs; data/demo and runs/demo are written to the current folder. It takes a few minutes on two cores, and
    the same command resumes if it was stopped.

    With --images, the same on pictures of digits: features are learned without the labels, then judged with them, in
    data/digits and runs/digits.
    """
    for stage in IMAGE_STAGES if images else STAGES:
        click.echo(f"$ kindling {stage}")
        if status := _run(shlex.split(stage)):
            sys.exit(status)
    if images:
        then = f"look at {IMAGES_RUN}/report.html, or your own: kindling prep images FOLDER --out data/mine --size 32"
    else:
        then = f"kindling serve {RUN}, or your own text: kindling prep build YOUR_TEXT --out data/mine"
    click.echo(f"next: {then}", err=True)


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
