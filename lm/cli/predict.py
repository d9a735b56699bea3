"""``kindling predict``: a fine-tuned run's answers to new texts."""

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
    help="Texts, in the columns that RUN was fine-tuned with: .jsonl, .csv, .tsv or .parquet, .txt with a text a line, "
    "- for JSON lines from standard input.",
)
@click.option(
    "--output",
    default="-",
    show_default=True,
    metavar="FILE|-",
    help="Where the answers go: .jsonl, .csv or .tsv, one for each text, in order; - for JSON lines on stdout.",
)
@best_checkpoint_option
@device_option
def predict(run: Path, source: str, output: str, which: str, device: str) -> None:
    """Answer for each text of a file what RUN was fine-tuned for: its label with the probabilities of all, or a number.

    Texts are taken as they come and not held, however many there are.
    """
    from lm.finetuning.predict import open_predictor, read_inputs, write_answers
    from lm.finetuning.predict import predict as answers_to
    from lm.model.device import choose_device

    predictor = open_predictor(run, choose_device(device), which)
    cut = 0

    def counted() -> Iterator[dict[str, Any]]:
        nonlocal cut
        for answer, was_cut in answers_to(predictor, read_inputs(predictor, source)):
            cut += was_cut
            yield answer

    written = write_answers(counted(), output)
    how = "were read in windows of" if predictor.config.finetune.long_texts == "window" else "were cut to"
    more = f"; {cut:,} {how} {predictor.config.data.context_length} tokens" if cut else ""
    click.echo(f"{written:,} answers{more}", err=True)
