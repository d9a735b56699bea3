"""The images that training and validation read: ``images = f(seed, step)``, as ``lm.data.rows`` does it for text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data_prep.errors import UserError
from data_prep.shards.images import ImageFormat, ImageSplit
from lm.config.settings import Config
from lm.data.batch import TensorBatch
from lm.data.image_corpora import ImageCorpora
from lm.data.order import Order


def normalized(pixels: Tensor, form: ImageFormat) -> Tensor:
    """What a model reads: values in [0, 1], (n, C, H, W), less the mean of each channel, by its standard deviation."""
    mean, std = (torch.tensor(part, device=pixels.device)[:, None, None] for part in (form.mean, form.std))
    return (pixels - mean) / std


def denormalized(images: Tensor, form: ImageFormat) -> Tensor:
    """The values in [0, 1] of which ``normalized`` makes these images, limited to that range."""
    mean, std = (torch.tensor(part, device=images.device)[:, None, None] for part in (form.mean, form.std))
    return (images * std + mean).clamp(0, 1)


def model_inputs(images: Tensor, form: ImageFormat) -> Tensor:
    """What a model reads of images without views: float32 (n, C, H, W) from their pixels, uint8 (n, H, W, C)."""
    return normalized(images.permute(0, 3, 1, 2).float() / 255, form)


@dataclass(frozen=True)
class ImageRows:
    """Images before an objective prepares them: uint8 (n, size, size, channels), and their numbers in the run.

    The numbers, int64 (n,), decide with the seed how views are drawn and what is hidden.
    """

    images: NDArray[np.uint8]
    numbers: NDArray[np.int64]


@dataclass(frozen=True)
class ImageBatch(TensorBatch):
    """Images for one forward pass.

    Attributes:
        images: uint8 (n, size, size, channels).
        draws: float32 (n, views, columns), how the views of each image are made (``lm.data.views``).
        kept: int64 (n, k), the patches of each image that are not hidden; None: all.
        loss_weights: float32 (n,). They hold the normalization of the whole optimizer step, as of ``lm.data.batch``.
        parts: as of ``lm.data.batch.Batch``.
    """

    images: Tensor
    draws: Tensor
    loss_weights: Tensor
    kept: Tensor | None = None
    parts: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of images."""
        return len(self.images)

    def each(self, change: Callable[[Tensor], Tensor]) -> ImageBatch:
        """As of ``TensorBatch``."""
        changed: dict[str, Any] = {name: change(part) for name, part in vars(self).items() if isinstance(part, Tensor)}
        return replace(self, **changed)


class Pictures:
    """The images of a split as a ``lm.data.order.Corpus``."""

    def __init__(self, split: ImageSplit) -> None:
        self.split, self.per_epoch = split, split.count

    def places(self, rows: NDArray[np.int64], epoch_key: int) -> NDArray[np.int64]:
        """Number in the split of these rows of an epoch: their own."""
        return rows


class TrainingImages(Order):
    """The training images of all datasets, as those of each step; raises UserError if a dataset has none."""

    def __init__(self, corpora: ImageCorpora, config: Config) -> None:
        splits, self.inputs = corpora.splits("train"), corpora.format
        names = [str(dataset.directory) for dataset in corpora.datasets]
        for name, split in zip(names, splits, strict=True):
            if not split.count:
                raise UserError(f"{name} has no training images: prepare more")
        self.pictures = [Pictures(split) for split in splits]
        super().__init__(names, corpora.weights, self.pictures, config)

    def of_step(self, step: int) -> ImageRows:
        """The images of optimizer step ``step``, from 0."""
        numbers, located = self.located(step)
        size, channels = self.inputs.size, self.inputs.channels
        images = np.empty((len(numbers), size, size, channels), dtype=np.uint8)
        for number, pictures in enumerate(self.pictures):
            of_split = located.texts == number
            if of_split.any():
                images[of_split] = pictures.split.read(located.places[of_split])
        return ImageRows(images, numbers)

    def describe(self) -> str:
        return f"{self.count:,} images"

    def introduction(self, steps: int) -> list[str]:
        """What to know about the datasets before the first of ``steps`` steps, one sentence each."""
        counts = self.schedule.counts(steps * self.batch_rows)
        if len(self.pictures) == 1:
            return []
        return [
            f"{name}: {float(share):.1%} of the images, {pictures.per_epoch:,} different ones, "
            f"{count / pictures.per_epoch:.2f} epochs"
            for name, pictures, share, count in zip(
                self.names, self.pictures, self.schedule.shares, counts, strict=True
            )
        ]


class HeldOutImages:
    """Images by number, of one split of all datasets, one dataset after another, with their classes.

    Attributes:
        count: the number of images.
        labels: int64 (count,), an index into ``classes``, -1 where unknown.
        classes: the names of the classes of all datasets.
    """

    def __init__(self, corpora: ImageCorpora, split: str) -> None:
        self._splits = corpora.splits(split)
        self._ends = np.cumsum([each.count for each in self._splits])
        self.count = int(self._ends[-1])
        self.classes = sorted({name for dataset in corpora.datasets for name in dataset.classes})
        number = {name: index for index, name in enumerate(self.classes)}
        self.labels = np.concatenate(
            [
                np.array([*(number[name] for name in dataset.classes), -1], dtype=np.int64)[each.labels]
                for dataset, each in zip(corpora.datasets, self._splits, strict=True)
            ]
        )

    def choose(self, images: int) -> NDArray[np.int64]:
        """The numbers of ``images`` images spread evenly over the split; all for 0 or if there are not as many."""
        if not images or images >= self.count:
            return np.arange(self.count, dtype=np.int64)
        return np.arange(images, dtype=np.int64) * self.count // images

    def read(self, numbers: NDArray[np.int64]) -> NDArray[np.uint8]:
        """These images: uint8 (n, size, size, channels)."""
        of = np.searchsorted(self._ends, numbers, side="right")
        found = [self._splits[k].read(numbers[of == k] - (self._ends[k - 1] if k else 0)) for k in np.unique(of)]
        images = np.empty((len(numbers), *found[0].shape[1:]), dtype=np.uint8)
        for k, some in zip(np.unique(of), found, strict=True):
            images[of == k] = some
        return images

    def source_of(self, number: int) -> str:
        """Where an image came from."""
        of = int(np.searchsorted(self._ends, number, side="right"))
        return self._splits[of].source_of(number - int(self._ends[of - 1] if of else 0))


@dataclass(frozen=True)
class ImageValidation:
    """What a validation of images reads: the images held out, and the training images that neighbors are sought in."""

    held_out: HeldOutImages
    train: HeldOutImages

    @property
    def count(self) -> int:
        return self.held_out.count
