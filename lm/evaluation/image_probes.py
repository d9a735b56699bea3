"""How good image features are: k-NN and a linear probe on them, and on the vectors of the baselines.

images → vectors (of a frozen model, of the same shape with random weights, raw pixels) → ``lm.evaluation.probes``
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from data_prep.shards.images import ImageFormat
from lm.config.model_settings import ModelConfig
from lm.data.image_files import LabeledImages
from lm.data.images import model_inputs
from lm.evaluation.probes import Predictions, Target, linear_of_many, nearest
from lm.inference.embedding import Vectors
from lm.inference.image_embedding import image_vectors
from lm.model.image_transformer import ImageTransformer

PROBES: dict[str, Callable[[Vectors, Target, Vectors, int], Predictions]] = {"knn": nearest, "linear": linear_of_many}
# Of raw pixels, averaged: k-NN is better so than on 32 x 32, the linear probe as good in a quarter of the time.
PIXELS_A_SIDE = 16
READ_AT_ONCE = 512

Reader = Callable[[NDArray[np.uint8]], Vectors]  # vectors (n, width) of images, uint8 (n, size, size, channels)


def pixel_reader(form: ImageFormat) -> Reader:
    """The pixels as the model reads them, normalized, averaged to at most ``PIXELS_A_SIDE`` a side, as vectors."""

    def read(images: NDArray[np.uint8]) -> Vectors:
        inputs = model_inputs(torch.from_numpy(images), form)
        small: Vectors = F.adaptive_avg_pool2d(inputs, min(PIXELS_A_SIDE, form.size)).flatten(1).numpy()
        return small

    return read


def feature_reader(model: ImageTransformer, form: ImageFormat, layer: int = -1) -> Reader:
    """The features of a frozen model, as of ``image_vectors``."""
    return lambda images: image_vectors(model, form, [images], layer)


def random_trunk(config: ModelConfig, seed: int, device: torch.device) -> ImageTransformer:
    """A model with random weights, every matrix drawn: with the start of training its blocks would be the identity."""
    return ImageTransformer(config).initialize(seed, identity=False).to(device).eval()


def parts_of(images: LabeledImages) -> Iterator[NDArray[np.uint8]]:
    """The pixels of all images, uint8 (n, size, size, channels), part by part."""
    for first in range(0, len(images), READ_AT_ONCE):
        yield images.read(np.arange(first, min(first + READ_AT_ONCE, len(images))))


def all_vectors(images: LabeledImages, readers: Mapping[str, Reader]) -> dict[str, Vectors]:
    """The vectors of all images by each of ``readers``, reading the images once."""
    parts: dict[str, list[Vectors]] = {name: [] for name in readers}
    for pixels in parts_of(images):
        for name, read in readers.items():
            parts[name].append(read(pixels))
    return {name: np.concatenate(found) for name, found in parts.items()}
