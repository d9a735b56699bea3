"""Where the patches of images stand in the rows of a pass: an image is a document of patches.

Images of one size are a row each. Images of several sizes share rows, packed as documents of text are, so that nothing
is padded: crops of two sizes go through the trunk in one pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lm.data.packing import best_fit
from lm.kernels import masks


@dataclass(frozen=True)
class PatchRows:
    """A ``lm.model.image_transformer.PatchLayout``."""

    positions: Tensor
    lo: Tensor
    hi: Tensor
    slots: Tensor | None = None
    places: Tensor | None = None

    def to(self, device: torch.device) -> PatchRows:
        """The layout on a device."""
        moved = {name: getattr(self, name) for name in ("positions", "lo", "hi", "slots", "places")}
        return replace(self, **{name: part.to(device) for name, part in moved.items() if part is not None})


@lru_cache(maxsize=64)
def grid(height: int, width: int) -> NDArray[np.int32]:
    """The row and column of each patch of an image with ``height`` x ``width`` patches: int32 (patches, 2)."""
    return np.ascontiguousarray(np.indices((height, width), dtype=np.int32).reshape(2, -1).T)


def rows_of_images(images: int, height: int, width: int, kept: Tensor | None = None) -> PatchRows:
    """A row for each image of ``height`` x ``width`` patches, or for the patches ``kept`` of it, int64 (images, k)."""
    positions = torch.from_numpy(grid(height, width)).expand(images, -1, -1)
    if kept is not None:
        positions = positions.to(kept.device).gather(1, kept[..., None].expand(-1, -1, 2))
    lo, hi = masks.bidirectional(images, positions.shape[1], device=positions.device)
    return PatchRows(positions, lo, hi)


def packed_rows(sizes: tuple[tuple[int, int, int], ...], length: int = 0) -> PatchRows:
    """Images of several sizes in shared rows, by best-fit decreasing.

    Args:
        sizes: (images, height, width) of each size, in patches.
        length: patches of a row; 0: those of the largest image.
    """
    return PatchRows(*map(torch.from_numpy, _packed(sizes, length)))


@lru_cache(maxsize=16)
def _packed(sizes: tuple[tuple[int, int, int], ...], length: int) -> tuple[NDArray[np.integer], ...]:
    """The positions, lo, hi, slots and places of ``packed_rows``, in NumPy: tensors may stand for a counted step."""
    grids = [grid(height, width) for count, height, width in sizes for _ in range(count)]
    lengths = np.array([len(each) for each in grids], dtype=np.int64)
    length = max(length, int(lengths.max()))
    row_of = best_fit(lengths, length)
    rows = int(row_of.max()) + 1
    first_patch = np.cumsum(lengths) - lengths
    slots, places = np.zeros((rows, length), dtype=np.int64), np.empty(int(lengths.sum()), dtype=np.int64)
    positions, filled = np.zeros((rows, length, 2), dtype=np.int32), np.zeros(rows, dtype=np.int64)
    lo, hi = (np.empty((rows, length), dtype=np.int32) for _ in range(2))
    for image in np.argsort(row_of, kind="stable").tolist():
        row, count = row_of[image], lengths[image]
        begin, patches = filled[row], np.arange(first_patch[image], first_patch[image] + count)
        part = slice(begin, begin + count)
        slots[row, part], positions[row, part] = patches, grids[image]
        lo[row, part], hi[row, part] = begin, begin + count
        places[patches] = row * length + begin + np.arange(count)
        filled[row] += count
    empty = np.arange(length) >= filled[:, None]  # sees nothing and is never seen
    lo[empty] = hi[empty] = np.broadcast_to(filled[:, None], empty.shape)[empty]
    return positions, lo, hi, slots, places


def layout_of(images: Sequence[Tensor], patch_size: int) -> PatchRows:
    """The layout of images (n, C, H, W) of one or several sizes, on their device."""
    sizes = tuple((len(each), each.shape[2] // patch_size, each.shape[3] // patch_size) for each in images)
    rows = rows_of_images(*sizes[0]) if len(sizes) == 1 else packed_rows(sizes)
    return rows.to(images[0].device)
