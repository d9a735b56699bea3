"""``kindling predict``: the predictions of a fine-tuned run for new texts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from data_prep.cli.errors import FriendlyCommand
from lm.cli.options import best_checkpoint_option, device_option, run_argument


@click.command(cls=FriendlyCommand)
@run_argument
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE|-|hf:NAME[:SPLIT]",
    help="Texts, in the columns that RUN was fine-tuned with: .jsonl, .json, .csv, .tsv, .parquet, or .txt, a text per "
    "line; - reads JSON lines from standard input.",
)
@click.option(
    "--output",
    default="-",
    show_default=True,
    metavar="FILE|-",
    help="File for the answers, one per text and in order: .jsonl, .csv or .tsv; - writes JSON lines to stdout.",
)
@best_checkpoint_option
@device_option
def predict(run: Path, source: str, output: str, which: str, device: str) -> None:
    """Predict for each text of a file what RUN was fine-tuned on: its label with all probabilities, or a number.

    Input is streamed, so files of any size work.
    """
    from lm import api
    from lm.finetuning.predict import predict as answers_to
    from lm.finetuning.predict import read_inputs, write_answers

    predictor = api.load_task_model(run, checkpoint=which, device=device)
    cut = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal cut
        for answer, was_cut in answers_to(predictor, read_inputs(predictor, source)):
            cut += was_cut
            yield answer

    written = write_answers(counted(), output)
    how = "were split into windows of" if predictor.config.finetune.long_texts == "window" else "were truncated to"
    more = f"; {cut:,} {how} {predictor.config.data.context_length} tokens" if cut else ""
    click.echo(f"{written:,} answers{more}", err=True)
