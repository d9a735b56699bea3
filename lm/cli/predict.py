"""``kindling predict``: the predictions of a fine-tuned run for new texts or images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import tee
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_prep.cli.errors import FriendlyCommand
from data_prep.cli.help import Section
from data_prep.errors.wording import counted
from data_prep.files import output_ending, require_new_file
from lm.cli.options import (
    best_checkpoint_option,
    columns_options,
    device_option,
    given_settings,
    pictures_shown,
    run_argument,
)
from lm.config.settings import ANSWER_FILES

if TYPE_CHECKING:
    from lm.data.image_files import Picture


@click.command(
    cls=FriendlyCommand,
    short_help="Predict with a fine-tuned model.",
    extra_hint="name a file as --input FILE",
    sections=(
        Section("Files", "source output with_text"),
        Section("Columns", "text_column", "text_pair_column choices_column words_column"),
        Section("Model", "which device"),
    ),
)
@run_argument
@click.option(
    "--input",
    "source",
    required=True,
    metavar="FILE|DIR|-|hf:NAME[:SPLIT]",
    help="Texts or images. Texts, in the columns that RUN was fine-tuned with: .jsonl, .json, .csv, .tsv, .parquet, or "
    ".txt, a text per line; - reads JSON lines from standard input. Images: a folder, a file, a .tar or .zip, a "
    ".parquet, or a dataset made by data_prep images.",
)
@click.option(
    "--output",
    default="-",
    show_default=True,
    metavar="FILE|-",
    help="File for the answers: .jsonl, .csv or .tsv; - writes JSON lines to stdout. There is one answer per text or "
    "image, in order.",
)
@click.option("--with-text", is_flag=True, help="Repeat each text in its answer.")
@columns_options("text", "text_pair", "choices", "words", default="as in fine-tuning")
@best_checkpoint_option
@device_option
def predict(
    run: Path, source: str, output: str, with_text: bool, which: str, device: str, **columns: str | None
) -> None:
    """Predict for each text of a file what RUN was fine-tuned on: its label with all probabilities, or a number.

    \b
    kindling predict runs/task --input new.jsonl --output answers.csv
    \f
    There is one answer for each text, in the same order; the probabilities are in the order of the labels, which are
    sorted. Input is streamed, so files of any size work.

    If RUN reads images, each answer begins with the name of the image, and the accuracy is printed for images in
    folders named after the classes. Images that cannot be read are left out and named at the end.
    """
    from lm.config.recipes import require_no_text_options, require_task_head, run_config
    from lm.data.examples import check_first_example, columns_of

    config = run_config(run)
    require_task_head(run, config)
    output_ending(output, ANSWER_FILES)
    if output != "-":
        require_new_file(Path(output))
    if config.reads_images:
        require_no_text_options({"with_text": with_text, **columns})
        predict_images(run, source, output, which, device)
        return
    named = dataclasses.replace(config.finetune, **given_settings(columns))
    check_first_example(source, named.task, columns_of(named), labeled=False)
    from lm import api
    from lm.finetuning.predict import parts_of, read_inputs, write_answers
    from lm.finetuning.predict import predict as answers_to

    predictor = api.load_task_model(run, checkpoint=which, device=device)
    cut, task = 0, predictor.config.finetune

    def answered() -> Iterator[dict[str, Any]]:
        nonlocal cut
        examples, asked = tee(read_inputs(predictor, source, given_settings(columns)))
        for example, (answer, was_cut) in zip(examples, answers_to(predictor, asked), strict=True):
            cut += was_cut
            yield parts_of(task.task, example) | answer if with_text else answer

    written = write_answers(answered(), output)
    how = "were split into windows of" if task.long_texts == "window" else "were truncated to"
    more = f"; {cut:,} {how} {predictor.config.data.context_length} tokens" if cut else ""
    click.echo(f"{counted(written, 'answer')}{more}", err=True)


def predict_images(run: Path, source: str, output: str, which: str, device: str) -> None:
    """Classify the images of a source with a run that was fine-tuned on images."""
    from lm.data.image_files import Unread, has_validation, pictures_of

    has_validation(source)  # the source is there and has images
    from lm import api
    from lm.data.labels import class_name
    from lm.finetuning.predict import predict_images, write_answers

    predictor = api.load_task_model(run, checkpoint=which, device=device)
    unread, right, judged, others = Unread(), 0, 0, 0

    def answered(pictures: Iterator[Picture]) -> Iterator[dict[str, Any]]:
        nonlocal right, judged, others
        pictures, shown = tee(pictures)
        answers = predict_images(predictor, (picture.pixels for picture in shown))
        for picture, answer in zip(pictures, answers, strict=True):
            label = picture.label and class_name("label", picture.label, predictor.answers.labels)
            judged += label in predictor.answers.labels
            others += label is not None and label not in predictor.answers.labels
            right += label == answer["label"]
            yield {"image": picture.name, **answer}

    with pictures_shown(pictures_of(source, predictor.run.image_format, unread), source, output) as pictures:
        written = write_answers(answered(pictures), output)
    found = f"; accuracy {right / judged:.4f}" if judged else ""
    if judged and others:
        found += f" of {counted(judged, 'image')}, without {others:,} of classes that {run} does not know"
    click.echo(f"{counted(written, 'answer')}{found}{f'; {unread}' if unread.count else ''}", err=True)
