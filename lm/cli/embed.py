"""``kindling embed``: embed texts as vectors."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.tables import counted
from data_prep.files import output_ending, require_new_file
from lm.cli.options import checkpoint_option, columns_of, columns_options, device_option, reading_options, run_argument
from lm.config.settings import VECTOR_FILES

if TYPE_CHECKING:
    from lm.inference.embedding import Vectors


@click.command(cls=FriendlyCommand, short_help="Turn texts into vectors.")
@run_argument
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE|-|hf:NAME[:SPLIT]",
    help="Texts: .jsonl, .json, .csv, .tsv, .parquet, or .txt with one text per line; - reads JSON lines from stdin.",
)
@click.option(
    "--output", required=True, metavar="FILE|-", help="Output file, .npy or .jsonl; - for JSON lines on stdout."
)
@columns_options("text", "text_pair")
@reading_options
@click.option("--normalize", is_flag=True, help="Scale each vector to length 1, for cosine similarity.")
@device_option
@checkpoint_option
def embed(
    run: Path,
    source: str,
    output: str,
    reads: str | None,
    pooling: str | None,
    layer: int,
    normalize: bool,
    device: str,
    which: str,
    **columns: str | None,
) -> None:
    """Embed each text of a file: write the hidden states of RUN, pooled over the text, as a vector.

    Input is streamed, so files of any size work. Texts longer than the model's context are cut; their number is
    printed at the end.
    """
    from lm.config.recipes import require_language_model, run_config
    from lm.data.examples import check_first_example, stream_examples

    require_language_model(run, run_config(run))
    output_ending(output, VECTOR_FILES)
    if output != "-":
        require_new_file(Path(output))
    check_first_example(source, "classification", columns_of(columns), labeled=False)
    from lm import api
    from lm.inference.embedding import reading_of, vectors_of, write_lines, write_vectors
    from lm.runs.directory import open_run

    opened = open_run(run)
    reading = reading_of(opened.config, reads, pooling, layer, normalize=normalize)
    model = api.load_model(opened, checkpoint=which, device=device)
    texts = (each.texts for each in stream_examples(source, "classification", columns_of(columns)))
    counts = {"texts": 0, "cut": 0}

    def embedded() -> Iterator[Vectors]:
        for vectors, cut in vectors_of(model, texts, reading):
            counts["texts"] += len(vectors)
            counts["cut"] += cut
            yield vectors

    width = model.model.config.hidden_size
    if output == "-":
        for vectors in embedded():
            write_lines(sys.stdout.buffer, vectors)
            sys.stdout.buffer.flush()
    else:
        write_vectors(Path(output), embedded(), width)
    cut = f"; {counts['cut']:,} were cut to {model.context_length} tokens" if counts["cut"] else ""
    click.echo(
        f"{counted(counts['texts'], 'text')}, {width} numbers each: read {reading.reads}, {reading.pooling} of layer "
        f"{reading.layer if reading.layer >= 0 else len(model.model.blocks)}{cut}",
        err=True,
    )
