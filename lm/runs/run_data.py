"""The data that a run was trained on, found again from another working directory or after a move."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import StoreError, UserError
from data_prep.files import is_remote
from data_prep.shards.images import holds_images
from lm.config.corpus_entry import corpus_of, is_folder
from lm.config.finetune_settings import FinetuneConfig
from lm.data.corpora import Corpora
from lm.data.datasets import open_training_data
from lm.data.image_corpora import ImageCorpora, open_image_corpora
from lm.data.image_files import TRAIN, VALIDATION, Picture, drawn_pictures, has_validation, require_format
from lm.data.images import HeldOutImages
from lm.data.openings import Opening, openings
from lm.runs.directory import Run, sha256_key

DATA_HINT = ": --data says where it is now"
WORKING_DIRECTORY = "working_directory"  # key of a checkpoint's state: where relative paths counted from


def open_data(run: Run) -> Corpora | ImageCorpora:
    """Open the data that a run's settings name, as ``located`` finds it.

    Raises:
        UserError: as of ``open_training_data``; if a folder is missing, the message says where it was looked for.
    """
    found = located(run)
    try:
        return open_training_data(found.config.data.data, found.config.data.access)
    except UserError:
        paths = [corpus_of(entry)[0] for entry in found.config.data.data]
        missing = [path for path in paths if not is_remote(path) and not is_folder(path)]
        if not missing:
            raise
        trained, here = _state(run).get(WORKING_DIRECTORY), str(Path.cwd())
        elsewhere = f", nor in {trained}, where it was trained" if trained not in (None, here) else ""
        where = f"neither in {here}{elsewhere}, nor, with the same content, in a folder above the run"
        raise UserError(
            f'the data of {run.path} is missing: its config.toml names "{missing[0]}", which is '
            f"{'not there' if Path(missing[0]).is_absolute() else where}{DATA_HINT}"
        ) from None


def open_text(run: Run) -> Corpora:
    """As ``open_data``; UserError if the run was trained on images."""
    corpora = open_data(run)
    if isinstance(corpora, ImageCorpora):
        raise UserError(f"{run.path} was trained on images, not on text")
    return corpora


def openings_of(run: Run) -> list[Opening]:
    """The openings of some validation documents; none if the data is gone or has no validation text.

    Raises:
        StoreError: the data is in a store that cannot be read.
    """
    try:
        corpora = open_data(run)
    except StoreError:
        raise
    except UserError:
        return []
    if isinstance(corpora, ImageCorpora):
        return []
    return openings(corpora.split("validation"), corpora.tokenizer)


def training_pictures(run: Run, most: int) -> tuple[Iterator[Picture], int | None]:
    """At most about ``most`` of the images that a run was trained or fine-tuned on, in random order, with classes.

    Returns:
        The images, and how many there are; None if all must be read to know.

    Raises:
        UserError: they are gone.
    """
    form = run.image_format
    if not run.config.is_finetuning:
        corpora = open_data(run)
        assert isinstance(corpora, ImageCorpora)
    elif holds_images(source := _examples_of(run)):
        corpora = open_image_corpora([source], [Fraction(1)])
        require_format(corpora.datasets[0], form)
    else:
        split = TRAIN if has_validation(source) else ""
        label = run.config.finetune.label_column
        return drawn_pictures(
            source, form, most, split=split, label_column="" if label == FinetuneConfig.label_column else label
        )
    images = HeldOutImages(corpora, TRAIN)
    return drawn_of(images, most), images.count


def _examples_of(run: Run) -> str:
    """The source of a fine-tuned run's examples, if it is relative from where it was fine-tuned, unless it is here."""
    source, trained = run.config.finetune.train, _state(run).get(WORKING_DIRECTORY, "")
    there = Path(trained, source)
    return str(there) if not Path(source).exists() and there.exists() else source


def drawn_of(images: HeldOutImages, most: int) -> Iterator[Picture]:
    """At most ``most`` images of a split in random order, the same every time."""
    for number in np.random.default_rng(0).permutation(images.count)[:most]:
        label = int(images.labels[number])
        pixels = images.read(np.array([number]))[0]
        yield Picture(images.source_of(int(number)), images.classes[label] if label >= 0 else None, pixels)


def held_out_pictures(run: Run, most: int) -> list[Picture]:
    """Some held-out images of a run's data; none if the data is gone or has none."""
    try:
        corpora = open_data(run)
    except UserError:
        return []
    assert isinstance(corpora, ImageCorpora)
    return list(drawn_of(HeldOutImages(corpora, VALIDATION), most))


def located(run: Run) -> Run:
    """The run with relative paths of its data as they can be opened here.

    A path counts from the working directory, else from where the run was trained, else from a folder above the run,
    which moved along with its data. Elsewhere than in the working directory it must hold exactly what was trained on.
    """
    entries = run.config.data.data
    if all(is_remote(entry) or Path(entry).is_absolute() for entry in entries):
        return run
    state = _state(run)
    for place in _places(run, state) if state else ():
        there = tuple(entry if is_remote(entry) else str(Path(place, entry)) for entry in entries)
        if _holds_the_data(run, state, there):
            return replace(run, config=run.config.replace(data=there))
    return run


def _places(run: Run, state: dict[str, Any]) -> Iterator[str]:
    yield ""
    if state.get(WORKING_DIRECTORY):
        yield state[WORKING_DIRECTORY]
    yield from map(str, run.path.resolve().parents)


def _state(run: Run) -> dict[str, Any]:
    """The state of the newest checkpoint, if there is one."""
    newest = run.latest(lambda _: None)
    return newest.state if newest else {}


def _holds_the_data(run: Run, state: dict[str, Any], entries: Sequence[str]) -> bool:
    """Whether these are the datasets of the run: by their content, or after fine-tuning by their tokenizer."""
    try:
        corpora = open_training_data(entries, run.config.data.access)
    except StoreError:
        raise
    except UserError:
        return False
    if state.get("data_fingerprint") and not run.config.is_finetuning:
        return bool(corpora.fingerprint == state["data_fingerprint"])
    return bool(corpora.processor.sha256 == state.get(sha256_key(corpora.processor.file_name)))
