"""``kindling embed``: embed texts or images as vectors."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.help import Section
from data_prep.errors.wording import counted
from data_prep.files import output_ending, require_new_file
from lm.cli.options import (
    checkpoint_option,
    columns_of,
    columns_options,
    device_option,
    pictures_shown,
    reading_options,
    run_argument,
    whiten_option,
)
from lm.config.settings import VECTOR_FILES

if TYPE_CHECKING:
    from lm.data.image_files import Picture
    from lm.inference.embedding import Vectors


@click.command(
    cls=FriendlyCommand,
    short_help="Turn texts or images into vectors.",
    extra_hint="name a file as --input FILE",
    sections=(
        Section("Files", "source output text_column", "text_pair_column"),
        Section("Vectors", "reads pooling layer whiten normalize"),
        Section("Model", "which device"),
    ),
)
@run_argument
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE|DIR|-|hf:NAME[:SPLIT]",
    help="Texts or images. Texts: .jsonl, .json, .csv, .tsv, .parquet, or .txt with one text per line; - reads JSON "
    "lines from stdin. Images: a folder, a file, a .tar or .zip, a .parquet, or a dataset made by data_prep images.",
)
@click.option(
    "--output", required=True, metavar="FILE|-", help="Output file, .npy or .jsonl; - for JSON lines on stdout."
)
@columns_options("text", "text_pair")
@reading_options
@whiten_option
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
    whiten: str | None,
    normalize: bool,
    device: str,
    which: str,
    **columns: str | None,
) -> None:
    """Embed each text of a file: write the hidden states of RUN, pooled over the text, as a vector.

    \b
    kindling embed runs/mine --input texts.txt --output vectors.npy
    \f
    Input is streamed, so files of any size work. Texts longer than the model's context are cut; their number is
    printed at the end.

    If RUN reads images, the vector of an image is the mean over its patches. Images come in the order of their names.
    With F.npy comes F.txt, which has the name of each row's image in a line; in a .jsonl, the field "image" has it.
    Images that cannot be read are left out and named at the end.
    """
    from lm.config.recipes import require_image_model, require_no_text_options, require_text_model, run_config
    from lm.data.examples import check_first_example, unlabeled_texts

    config = run_config(run)
    output_ending(output, VECTOR_FILES)
    if output != "-":
        require_new_file(Path(output))
    if config.reads_images:
        require_image_model(run, config)
        require_no_text_options({"reads": reads, "pooling": pooling, "whiten": whiten, **columns})
        embed_images(run, source, output, layer, normalize, device, which)
        return
    require_text_model(run, config)
    for file in filter(None, (whiten, source)):
        check_first_example(file, "classification", columns_of(columns), labeled=False)
    from lm import api
    from lm.inference.embedding import reading_of, vectors_of, whitened, write_lines, write_vectors
    from lm.runs.directory import open_run

    opened = open_run(run)
    reading = reading_of(opened.config, reads, pooling, layer, normalize=normalize)
    model = api.load_model(opened, checkpoint=which, device=device)
    if whiten:
        reading = whitened(reading, model, unlabeled_texts(whiten, columns_of(columns)))
    counts = {"texts": 0, "cut": 0}

    def embedded() -> Iterator[Vectors]:
        for vectors, cut in vectors_of(model, unlabeled_texts(source, columns_of(columns)), reading):
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
    white = f", whitened by {whiten}" if whiten else ""
    cut = f"; {counts['cut']:,} were cut to {model.context_length} tokens" if counts["cut"] else ""
    click.echo(
        f"{counted(counts['texts'], 'text')}, {width} numbers each: read {reading.reads}, {reading.pooling} of layer "
        f"{reading.layer if reading.layer >= 0 else len(model.model.blocks)}{white}{cut}",
        err=True,
    )


def embed_images(run: Path, source: str, output: str, layer: int, normalize: bool, device: str, which: str) -> None:
    """Embed the images of a source with a run that reads images."""
    from lm.data.image_files import Unread, has_validation, pictures_of

    has_validation(source)  # the source is there and has images
    import numpy as np

    from lm import api
    from lm.inference.embedding import require_layer, write_lines
    from lm.inference.image_embedding import image_vectors, names_file, write_image_vectors
    from lm.inference.image_model import in_parts

    model = api.load_image_model(run, checkpoint=which, device=device)
    require_layer(model.model.config, layer)
    unread, written = Unread(), 0

    def embedded(pictures: Iterable[Picture]) -> Iterator[tuple[list[str], Vectors]]:
        nonlocal written
        for part in in_parts(pictures):
            pixels = np.stack([picture.pixels for picture in part])
            written += len(part)
            vectors = image_vectors(model.model, model.form, [pixels], layer, normalize=normalize)
            yield [picture.name for picture in part], vectors

    with pictures_shown(pictures_of(source, model.form, unread), source, output) as pictures:
        if output == "-":
            for names, vectors in embedded(pictures):
                write_lines(sys.stdout.buffer, vectors, names)
                sys.stdout.buffer.flush()
        else:
            write_image_vectors(Path(output), embedded(pictures), model.config.model.hidden_size)
    where = f"; their names are in {names_file(Path(output))}" if output.lower().endswith(".npy") else ""
    left_out = f"; {unread}" if unread.count else ""
    width = model.config.model.hidden_size
    click.echo(f"{counted(written, 'image')}, {width} numbers each{where}{left_out}", err=True)
