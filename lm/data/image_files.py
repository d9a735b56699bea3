"""Pictures from files, archives and tables, in the size that a run reads, with or without their classes.

A source is what ``data_prep.sources.images`` reads, or a dataset made by ``data_prep images``.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shards.images import ImageDataset, ImageFormat, holds_images, open_images
from data_prep.sources.images import BadImage, Columns, ImageEntry, decode, entries_of, list_images
from data_prep.sources.records import HUGGING_FACE
from lm.config.finetune_settings import FinetuneConfig
from lm.data.examples import Example
from lm.data.labels import class_name

READ_AT_ONCE = 256  # images of a dataset
SHOWN = 3  # images that cannot be read
TRAIN, VALIDATION = "train", "validation"

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Picture:
    """An image that was read: its name, its class or None, and its pixels, uint8 (size, size, channels)."""

    name: str
    label: str | None
    pixels: Pixels


@dataclass
class Unread:
    """The images that could not be read: how many, and the first of them with the reason."""

    count: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, name: str, error: BadImage) -> None:
        self.count += 1
        if len(self.examples) < SHOWN:
            self.examples.append(f"{name}: {error}")

    def __str__(self) -> str:
        """What to tell of them, or ""."""
        if not self.count:
            return ""
        more = f", and {self.count - len(self.examples):,} more" if self.count > len(self.examples) else ""
        what = "1 image was" if self.count == 1 else f"{self.count:,} images were"
        return f"{what} left out: {'; '.join(self.examples)}{more}"


def pictures_of(
    source: str, form: ImageFormat, unread: Unread, *, split: str = "", label_column: str = ""
) -> Iterator[Picture]:
    """Read the images of a source one by one, in the order of their names, and note those that cannot be read.

    Args:
        split: "train" or "validation": only these images, if the source has splits; "": all.
        label_column: the column of a table with the classes; "": find it.

    Raises:
        UserError: the source has no images, none that can be read, or is a dataset of images of another size.
    """
    if holds_images(source):
        yield from _of_dataset(open_images(source), form, split)
        return
    any_read = False
    for entry in _entries(source, split, label_column):
        try:
            pixels = form.pixels(decode(entry.read()))
        except BadImage as error:
            unread.add(entry.name, error)
        else:
            any_read = True
            yield Picture(entry.name, entry.label, pixels)
    if not any_read:
        raise UserError(f"no image of {source} can be read: {unread.examples[0]}" if unread.count else _none(source))


def pixels_of(image: Any, form: ImageFormat, name: str) -> Pixels:
    """The pixels of a path, a Pillow image, or an array uint8 (height, width) or (height, width, channels), as above.

    ``name`` stands for it in messages. UserError if it cannot be read.
    """
    from PIL import Image

    try:
        if isinstance(image, str | Path):
            name = str(image)
            image = decode(Path(image).read_bytes())
        elif isinstance(image, np.ndarray):
            image = Image.fromarray(_checked(image, name))
        elif not isinstance(image, Image.Image):
            raise UserError(f"{name} is of type {type(image).__name__}: give a path, a Pillow image or a uint8 array")
        return form.pixels(image)
    except (BadImage, OSError, ValueError) as error:  # ValueError: of modes that Pillow does not convert
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from None


def pixels_of_file(data: bytes, form: ImageFormat, most_pixels: int) -> Pixels:
    """The pixels of the bytes of an image file, as above. UserError if it cannot be read or has more pixels."""
    try:
        return form.pixels(decode(data, most_pixels))
    except BadImage as error:
        raise UserError(f"the image cannot be used: {error}") from None


def _checked(image: NDArray[Any], name: str) -> Pixels:
    """An array as Pillow takes it."""
    gray = image.ndim == 3 and image.shape[2] == 1
    if image.dtype != np.uint8 or not (image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))):
        raise UserError(
            f"{name} is an array of {image.dtype} with the shape {image.shape}: give uint8 (height, width, channels)"
        )
    return np.ascontiguousarray(image[:, :, 0] if gray else image)


def drawn_pictures(
    source: str, form: ImageFormat, most: int, *, split: str = "", label_column: str = ""
) -> tuple[Iterator[Picture], int | None]:
    """At most about ``most`` images from all over a source that is no dataset, in random order, the same every time.

    The rest as of ``pictures_of``, but images that cannot be read are left out.

    Returns:
        The images, and how many the source has; None if it must be read to know.

    Raises:
        UserError: the source has no images.
    """
    items = [item for item in list_images([source])[0].items if not split or item.split in (None, split)]
    count = sum(item.images for item in items) if all(item.images for item in items) else None
    draw = np.random.default_rng(0)
    share = most / count if count else 1

    def drawn() -> Iterator[Picture]:
        for number in draw.permutation(len(items)).tolist():
            for entry in entries_of(items[number], Columns(label=label_column)):
                if items[number].images == 1 or draw.random() < share:  # of a table's rows a share
                    with suppress(BadImage):
                        yield Picture(entry.name, entry.label, form.pixels(decode(entry.read())))

    return islice(drawn(), most), count


def _of_dataset(dataset: ImageDataset, form: ImageFormat, split: str) -> Iterator[Picture]:
    require_format(dataset, form)
    for name in [split] if split else [TRAIN, VALIDATION]:
        part = dataset.split(name)
        for first in range(0, part.count, READ_AT_ONCE):
            numbers = np.arange(first, min(first + READ_AT_ONCE, part.count))
            for number, pixels in zip(numbers.tolist(), part.read(numbers), strict=True):
                label = int(part.labels[number])
                yield Picture(part.source_of(number), dataset.classes[label] if label >= 0 else None, pixels)


def require_format(dataset: ImageDataset, form: ImageFormat) -> None:
    """Raise UserError if a dataset's images are not of the size and channels that a run reads."""
    if dataset.format.shape != form.shape:
        raise UserError(
            f"{dataset.directory} has images of {dataset.format.shape}, and the run reads {form.shape}: prepare them "
            f"with --size {form.size} --channels {form.channels}"
        )


def _entries(source: str, split: str, label_column: str) -> Iterator[ImageEntry]:
    (listing,) = list_images([source])
    for item in listing.items:
        if not split or item.split in (None, split):
            yield from entries_of(item, Columns(label=label_column))


def has_validation(source: str) -> bool:
    """Whether a source itself says which images are for validation. UserError if it has no images."""
    if holds_images(source):
        return open_images(source).split(VALIDATION).count > 0
    return any(item.split == VALIDATION for item in list_images([source])[0].items)


def count_of(source: str) -> int | None:
    """How many images a source lists; None if it must be read to know."""
    if holds_images(source):
        return sum(open_images(source).split(name).count for name in (TRAIN, VALIDATION))
    items = list_images([source])[0].items
    return len(items) if all(item.kind in ("file", "member") for item in items) else None


class LabeledImages(Sequence[Example]):
    """Images with their classes, as examples without texts; ``read`` gives the pixels.

    Attributes:
        digest: names the content of all images.
        notes: what to tell the user of them, one sentence each.
    """

    def __init__(
        self, examples: list[Example], read: Callable[[NDArray[np.int64]], Pixels], digest: str, notes: list[str]
    ) -> None:
        self._examples, self._read, self.digest, self.notes = examples, read, digest, notes

    def __len__(self) -> int:
        return len(self._examples)

    @overload
    def __getitem__(self, number: int) -> Example: ...
    @overload
    def __getitem__(self, number: slice) -> list[Example]: ...
    def __getitem__(self, number: Any) -> Any:
        return self._examples[number]

    def read(self, numbers: NDArray[np.int64]) -> Pixels:
        """These images, uint8 (n, size, size, channels); several threads may call it."""
        return self._read(numbers)

    def chosen(self, numbers: NDArray[np.int64]) -> LabeledImages:
        """Only these images, in this order."""
        examples = [self._examples[number] for number in numbers.tolist()]
        digest = hashlib.sha256(self.digest.encode() + numbers.tobytes()).hexdigest()
        return LabeledImages(examples, lambda some: self._read(numbers[some]), digest, self.notes)


def read_image_task(
    task: FinetuneConfig, form: ImageFormat, kept: Collection[str] = ()
) -> tuple[LabeledImages, LabeledImages]:
    """The training and validation images of a fine-tuning.

    Validation images are those of the source that the settings name, or those that the training source itself sets
    aside; there may be none. Labels in ``kept`` are spelled as they are.

    Raises:
        UserError: a source has no images, none of them can be read, or none has a class.
    """
    label = "" if task.label_column == FinetuneConfig.label_column else task.label_column
    own = has_validation(task.train)
    train = read_labeled(task.train, form, TRAIN if own else "", label, kept)
    source = task.validation or (task.train if own else "")
    if not source:
        return train, LabeledImages([], train.read, "", [])
    return train, read_labeled(source, form, VALIDATION if has_validation(source) else "", label, kept)


def read_labeled(
    source: str, form: ImageFormat, split: str = "", label_column: str = "", kept: Collection[str] = ()
) -> LabeledImages:
    """Read images with their classes; those without a class are left out. Arguments and errors as above."""
    what = f"{source} ({split})" if split else source
    if holds_images(source):
        return _labeled_of_dataset(open_images(source), form, split, kept, what)
    unread, examples, unlabeled, digest = Unread(), [], 0, hashlib.sha256()
    file = tempfile.TemporaryFile()  # noqa: SIM115 - of the pixels, which memory may not hold; gone when it is closed
    for picture in pictures_of(source, form, unread, split=split, label_column=label_column):
        if picture.label is None:
            unlabeled += 1
            continue
        examples.append(Example((), class_name("label", picture.label, kept), picture.name))
        data = picture.pixels.tobytes()
        digest.update(data)
        file.write(data)
    notes = [f"{what}: {unread}"] if unread.count else []
    notes += _without_class(what, unlabeled, len(examples))
    file.flush()
    pixels = np.memmap(file, np.uint8, "r", shape=(len(examples), form.size, form.size, form.channels))

    def read(numbers: NDArray[np.int64], _keep: Any = file) -> Pixels:
        return np.asarray(pixels[numbers])

    return LabeledImages(examples, read, digest.hexdigest(), notes)


def _labeled_of_dataset(
    dataset: ImageDataset, form: ImageFormat, split: str, kept: Collection[str], what: str
) -> LabeledImages:
    require_format(dataset, form)
    part = dataset.split(split or TRAIN)
    if not part.count:
        raise UserError(_none(what))
    labeled = np.flatnonzero(part.labels >= 0)
    names = [class_name("label", name, kept) for name in dataset.classes]
    notes = _without_class(what, part.count - len(labeled), len(labeled))
    examples = [Example((), names[part.labels[n]], part.source_of(n)) for n in labeled.tolist()]
    return LabeledImages(
        examples, lambda numbers: part.read(labeled[numbers]), f"{dataset.fingerprint} {part.name}", notes
    )


def _none(what: str) -> str:
    return f"{what} has no images"


def _without_class(what: str, unlabeled: int, labeled: int) -> list[str]:
    """A note on the images that have no class; UserError if all of them have none."""
    if not labeled:
        is_table = what.partition(" (")[0].endswith(".parquet") or what.startswith(HUGGING_FACE)
        raise UserError(
            f"the images of {what} have no classes: "
            + (
                "name their column with --label-column"
                if is_table
                else "put those of each class into a folder of its own"
            )
        )
    count = "1 image without a class was" if unlabeled == 1 else f"{unlabeled:,} images without a class were"
    return [f"{what}: {count} left out"] if unlabeled else []
