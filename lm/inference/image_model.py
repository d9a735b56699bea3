"""A model that reads images, and the forms in which one is given images: a folder, paths, Pillow images, arrays."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from data_prep.errors import UserError
from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.data.image_files import Pixels, Unread, pictures_of, pixels_of
from lm.inference.embedding import Vectors
from lm.inference.image_embedding import image_vectors
from lm.model.image_transformer import ImageTransformer

Item = TypeVar("Item")


@dataclass(frozen=True)
class ImageEncoder:
    """A trained model, in evaluation mode, with what makes its inputs of pictures and the settings of its run."""

    model: ImageTransformer
    form: ImageFormat
    config: Config

    def embed(self, images: Any, *, layer: int = -1, normalize: bool = False) -> Vectors:
        """The features of images, the mean over their patches: float32 (images, hidden).

        Args:
            images: a folder (or anything else that ``data_prep images`` reads), whose images come in the order of
                their names; or a list of paths, Pillow images and uint8 arrays (height, width, channels) of any size.
            layer: 0 is the patch embedding, 1 the first block, -1 the last.
            normalize: scale vectors to length 1.

        Raises:
            UserError: an image cannot be read.
        """
        parts = (np.stack(part) for part in in_parts(pixels_of_all(images, self.form)))
        return image_vectors(self.model, self.form, parts, layer, normalize=normalize)


def pixels_of_all(images: Any, form: ImageFormat) -> Iterator[Pixels]:
    """Yield the pixels that a model reads of each image, uint8 (size, size, channels); arguments as of ``embed``."""
    if isinstance(images, str | Path):
        unread = Unread()
        for picture in pictures_of(str(images), form, unread):
            yield picture.pixels
            if unread.count:
                break
        if unread.count:
            raise UserError(unread.examples[0])
        return
    is_array = isinstance(images, np.ndarray)
    if (is_array and images.ndim != 4) or not (is_array or isinstance(images, Sequence)):
        raise UserError("give a folder, or a list of images, even if it is only one: [image]")
    for number, image in enumerate(images):
        yield pixels_of(image, form, f"image {number}")


def in_parts(images: Iterable[Item], at_once: int = 256) -> Iterator[list[Item]]:
    """Yield lists of at most ``at_once`` images."""
    part = []
    for each in images:
        part.append(each)
        if len(part) == at_once:
            yield part
            part = []
    if part:
        yield part
