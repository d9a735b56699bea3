"""Objectives that compare views of images: what a ``ViewMethod`` learns from them."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.config.view_settings import ViewsConfig
from lm.data.images import ImageBatch, ImageRows, ImageValidation, normalized
from lm.data.keyed_random import Stream
from lm.data.patch_rows import layout_of
from lm.data.views import COLUMNS, alike, draw_views, make_views
from lm.model.image_transformer import ImageTransformer
from lm.objectives.images import ImageObjective
from lm.objectives.objective import Measure
from lm.objectives.view_method import ViewMethod
from lm.objectives.views import Views


class ImageViews(Views, ImageObjective):
    """Two views of each image, and as many smaller ones as the method wants, all in one pass."""

    views = 2

    def __init__(self, config: Config, form: ImageFormat, method: ViewMethod) -> None:
        ImageObjective.__init__(self, config, form)
        Views.__init__(self, method)
        method.things, method.per_step = "images", config.data.batch_images

    def head(self) -> nn.Module:
        return self.method.head()

    def begin(self, model: nn.Module) -> None:
        if self.method.with_teacher:
            self.remember(ImageTransformer(self.config.model, self.method.teacher_head()), model)

    @property
    def local_size(self) -> int:
        """Pixels of a side of the smaller views: as set, else half the image's, in whole patches."""
        patch = self.config.model.patch_size
        return self.config.objective.local_size or max(1, self.config.model.image_size // 2 // patch) * patch

    @property
    def local_settings(self) -> ViewsConfig:
        """How the smaller views are drawn: as the others, of a smaller part of the image."""
        views = alike(self.view_settings)
        return dataclasses.replace(views, crop_area=self.config.objective.local_area, largest_crop=views.crop_area)

    def prepare(self, rows: ImageRows) -> ImageBatch:
        return self.batch_of(rows.images, self._draws(self.seed, rows.numbers), 1 / len(rows.images))

    def _draws(self, seed: int, numbers: NDArray[np.int64]) -> Tensor:
        draws = draw_views(seed, numbers, self.views, self.view_settings)
        if not (local := self.method.local_views):
            return draws
        return torch.cat([draws, draw_views(seed, numbers, local, self.local_settings, Stream.LOCAL_VIEWS)], dim=1)

    def example(self, rows: int) -> ImageBatch:
        draws = torch.ones(rows, self.views + self.method.local_views, COLUMNS)
        return dataclasses.replace(super().example(rows), draws=draws)

    def views_of(self, batch: ImageBatch) -> Tensor:
        return super().views_of(dataclasses.replace(batch, draws=batch.draws[:, : self.views]))

    def local_views_of(self, batch: ImageBatch) -> Tensor:
        """The smaller views, as of ``views_of``."""
        with torch.no_grad():
            draws = batch.draws[:, self.views :].transpose(0, 1).flatten(0, 1)
            images = batch.images.repeat(self.method.local_views, 1, 1, 1)
            made = make_views(images, draws, self.local_size, self.local_settings)
            return normalized(made, self.form)

    def vectors(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """As of ``ViewMethod``, from the mean over the patches of each view."""
        assert isinstance(model, ImageTransformer)
        assert model.head is not None
        views = [self.views_of(batch)]
        if self.method.local_views:
            views.append(self.local_views_of(batch))
        return self.method.vectors(model.head, means_of_views(model, views, len(batch)))

    def targets(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """As of ``ViewMethod``, from the teacher's features of the first two views."""
        teacher = self.teacher
        assert isinstance(teacher, ImageTransformer)
        assert teacher.head is not None
        with torch.no_grad():
            return self.method.targets(teacher.head, means_of_views(teacher, [self.views_of(batch)], len(batch)))

    def held_out(self, held_out: ImageValidation, numbers: NDArray[np.int64]) -> ImageBatch:
        """A batch of held-out images."""
        return self.batch_of(held_out.held_out.read(numbers), self._draws(0, numbers), 1.0)

    def measured(self, held_out: ImageValidation, numbers: NDArray[np.int64], measure: Measure) -> dict[str, float]:
        """Among these images."""
        return self.measured_by(lambda some: self.held_out(held_out, some), numbers, measure)

    def flops_per_token(self, model: nn.Module, context_length: int) -> float:
        """All views go through the student, the first two through the teacher, which has no backward pass."""
        assert isinstance(model, ImageTransformer)
        flops = self.views * model.flops_per_patch(context_length) * (4 / 3 if self.method.with_teacher else 1)
        if local := self.method.local_views:
            patches = (self.local_size // model.config.patch_size) ** 2
            flops += local * model.flops_per_patch(patches) * patches / context_length
        return flops


def means_of_views(model: ImageTransformer, views: list[Tensor], images: int) -> Tensor:
    """The mean hidden state of each view, (views, images, hidden)."""
    patch = model.config.patch_size
    hidden = model(views, layout_of(views, patch))
    if len(views) == 1:
        return hidden.mean(1).unflatten(0, (-1, images))
    counts = [len(each) * (each.shape[2] // patch) * (each.shape[3] // patch) for each in views]
    parts = [part.unflatten(0, (len(each), -1)).mean(1) for part, each in zip(hidden.split(counts), views, strict=True)]
    return torch.cat(parts).unflatten(0, (-1, images))
