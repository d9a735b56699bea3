"""Search: the images of a set whose features are nearest to that of another image, by cosine."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_prep.shards.images import ImageFormat
from lm.data.image_files import Picture, Pixels
from lm.inference.embedding import Vectors
from lm.inference.image_embedding import image_vectors
from lm.inference.image_model import in_parts
from lm.model.image_transformer import ImageTransformer

AT_ONCE = 64  # images between two looks at the clock
LARGEST_SHOWN = 96  # pixels a side of the pictures that are kept


@dataclass(frozen=True)
class ImageBank:
    """Images to find neighbors in.

    Attributes:
        vectors: float32 (images, hidden), their features, scaled to length 1.
        pictures: their names, classes and pixels, at most ``LARGEST_SHOWN`` a side.
    """

    vectors: Vectors
    pictures: Sequence[Picture]

    def nearest(self, vector: Vectors, count: int) -> list[tuple[Picture, float]]:
        """The images whose features have the largest cosine with ``vector``, (hidden,), and it, largest first."""
        cosines = self.vectors @ (vector / max(float(np.linalg.norm(vector)), 1e-12))
        return [(self.pictures[n], float(cosines[n])) for n in np.argsort(-cosines, kind="stable")[:count]]


def image_bank(
    model: ImageTransformer, form: ImageFormat, pictures: Iterable[Picture], seconds: float = float("inf")
) -> ImageBank:
    """Compute the features of images, of as many as ``seconds`` allow for, and at least of ``AT_ONCE``.

    ``pictures`` have the pixels that the model reads; the rest as of ``image_vectors``.
    """
    until = time.monotonic() + seconds
    vectors, kept = [np.zeros((0, model.config.hidden_size), dtype=np.float32)], list[Picture]()
    for part in in_parts(pictures, AT_ONCE):
        vectors.append(image_vectors(model, form, [np.stack([each.pixels for each in part])], normalize=True))
        kept += [replace(each, pixels=_small(each.pixels)) for each in part]
        if time.monotonic() > until:
            break
    return ImageBank(np.concatenate(vectors), kept)


def _small(pixels: Pixels) -> Pixels:
    """Pixels with at most ``LARGEST_SHOWN`` a side."""
    if len(pixels) <= LARGEST_SHOWN:
        return pixels
    from PIL import Image

    gray = pixels.shape[2] == 1
    image = Image.fromarray(pixels[:, :, 0] if gray else pixels)
    image = image.resize((LARGEST_SHOWN, LARGEST_SHOWN), Image.Resampling.BOX)
    return np.asarray(image).reshape(LARGEST_SHOWN, LARGEST_SHOWN, -1)
