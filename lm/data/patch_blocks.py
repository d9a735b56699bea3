"""Blocks of patches to hide, as in BEiT: what is hidden cannot be guessed from patches next to it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from lm.data.keyed_random import uniform_at

SMALLEST_BLOCK = 16 / 196  # of an image's patches
LARGEST_RATIO = 1 / 0.3  # of a block's sides, either way


def hidden_blocks(seed: int, numbers: NDArray[np.int64], side: int, count: int) -> NDArray[np.bool_]:
    """Which ``count`` patches of each image of ``side`` x ``side`` patches are hidden: bool (len(numbers), side²).

    Blocks of random size, shape and place are hidden until there are enough (Bao et al. 2021, algorithm 1); of the last
    one only as many patches as are still missing, row by row. An image's blocks depend on ``seed`` and its number only.
    """
    hidden = np.zeros((len(numbers), side, side), dtype=np.bool_)
    axis, smallest = np.arange(side), max(1.0, SMALLEST_BLOCK * side**2)
    open_images, turn = np.arange(len(numbers)), 0
    while len(open_images):
        drawn = uniform_at(seed, numbers[open_images, None], np.arange(4 * turn, 4 * turn + 4))
        missing = count - hidden[open_images].sum((1, 2))
        area = smallest + (np.maximum(missing, smallest) - smallest) * drawn[:, 0]
        ratio = np.exp(math.log(LARGEST_RATIO) * (2 * drawn[:, 1] - 1))
        height, width = (np.clip(np.rint(np.sqrt(each)), 1, side) for each in (area * ratio, area / ratio))
        top, left = (np.floor(drawn[:, 2 + k] * (side + 1 - length)) for k, length in enumerate((height, width)))
        rows, columns = (
            (axis >= start[:, None]) & (axis < (start + length)[:, None])
            for start, length in ((top, height), (left, width))
        )
        fresh = (rows[:, :, None] & columns[:, None, :] & ~hidden[open_images]).reshape(len(open_images), -1)
        fresh &= fresh.cumsum(1) <= missing[:, None]
        hidden[open_images] |= fresh.reshape(-1, side, side)
        open_images, turn = open_images[fresh.sum(1) < missing], turn + 1
    return hidden.reshape(len(numbers), -1)
