"""Classify images: the head reads the mean over the patches of an image, and training crops each image at random."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.data.examples import Example
from lm.data.image_files import LabeledImages
from lm.data.views import draw_views
from lm.finetuning.head_task import HeadTask
from lm.finetuning.heads import ImageItems


@dataclass(frozen=True)
class ImageExample:
    """An image as a ``lm.finetuning.task_inputs.TaskExample``: a patch is a token."""

    tokens: int
    cut: bool = False


class ImageTask(HeadTask):
    """Images and their classes."""

    def __init__(
        self, config: Config, processor: ImageFormat, train: Sequence[Example], validation: Sequence[Example]
    ) -> None:
        assert isinstance(train, LabeledImages)
        assert isinstance(validation, LabeledImages)
        self.read_answers(config, train, validation)
        self.form, self.images, self.validation_images = processor, train, validation
        self.train = [ImageExample(config.model.patches)] * len(train)
        self.validation = [ImageExample(config.model.patches)] * len(validation)
        self.hashed_texts = (train.digest,)

    def introduction(self) -> list[str]:
        counts = Counter(example.label for example in self.images)
        labels, rare = self.answers.labels, [name for name in self.answers.labels if counts[name] == 1]
        notes = [*self.images.notes, *self.validation_images.notes]
        if rare:
            notes.append(f"only one training image is of class {', '.join(rare[:5])}{', …' if rare[5:] else ''}")
        views = self.config.views
        how = f"cropped to at least {views.crop_area:.0%} of their area" if self._draws_views else "read as they are"
        return [
            f"training images are {how}; an image's vector is the mean over its patches",
            f"{len(labels)} classes: {', '.join(labels[:20])}{', …' if labels[20:] else ''}",
            *notes,
        ]

    @property
    def _draws_views(self) -> bool:
        """A probe learns from the features of the images themselves, as it is asked about them later."""
        return self.config.finetune.method != "probe"

    def items(self, numbers: NDArray[np.int64], epochs: NDArray[np.int64]) -> ImageItems:
        images = torch.from_numpy(self.images.read(numbers))
        if not self._draws_views:
            return ImageItems(images, self.form)
        of_run = epochs * len(self.images) + numbers
        draws = draw_views(self.config.training.seed, of_run, 1, self.config.views)[:, 0]
        return ImageItems(images, self.form, draws, self.config.views)

    def validation_items(self) -> Iterator[ImageItems]:
        rows = max(1, self.config.finetune.micro_batch_tokens // self.config.model.patches)
        for first in range(0, len(self.validation), rows):
            numbers = np.arange(first, min(first + rows, len(self.validation)))
            yield ImageItems(torch.from_numpy(self.validation_images.read(numbers)), self.form)
