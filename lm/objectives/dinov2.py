"""DINOv2 (Oquab et al. 2023): DINO, with iBOT's loss of hidden patches, KoLeo, and Sinkhorn-Knopp for the center.

Each can be switched off: ``ibot_weight``, ``koleo_weight`` and ``centering``.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.data.images import ImageBatch, ImageRows, ImageValidation
from lm.data.keyed_random import Stream, key, uniform
from lm.data.patch_blocks import hidden_blocks
from lm.data.patch_rows import layout_of
from lm.model.heads import MaskingPrototypeHead, PrototypeHead
from lm.model.image_transformer import ImageTransformer
from lm.objectives.dino import DINO, Centered
from lm.objectives.image_views import ImageViews, means_of_views
from lm.objectives.teacher import Teacher

FEWEST_IMAGES = 128  # of a step; users report flat losses below that
FEWEST_NEIGHBORS = 4  # images among which KoLeo looks for the nearest one


class PatchCentered(Centered):
    """As ``Centered``, with another center for patches."""

    def __init__(self, model: nn.Module, student: nn.Module, prototypes: int) -> None:
        super().__init__(model, student, prototypes)
        self.register_buffer("patch_center", torch.zeros(prototypes, device=next(student.parameters()).device))
        self.patch_center: Tensor


class Parts(NamedTuple):
    """What is compared of each image: scores of its views and hidden patches, and features (n, 2, hidden)."""

    views: Tensor
    patches: Tensor
    features: Tensor | None = None


def koleo(features: Tensor) -> Tensor:
    """The Kozachenko-Leonenko estimator's loss (Sablayrolles et al. 2019) of features (n, width).

    The mean of -log of each unit vector's distance to the nearest other one; 0 for fewer than four.
    """
    if len(features) < FEWEST_NEIGHBORS:
        return features.sum() * 0
    unit = F.normalize(features, dim=1)
    with torch.no_grad():
        nearest = (unit @ unit.T).fill_diagonal_(-2.0).argmax(1)
    return -(torch.linalg.vector_norm(unit - unit[nearest] + 1e-8, dim=1) + 1e-8).log().mean()


class DINOv2(DINO):
    """DINO's loss, that of hidden patches, and KoLeo's, each times its weight."""

    name = "dinov2"

    def head(self) -> nn.Module:
        width, hidden, bottleneck, epsilon = self.head_shape
        return MaskingPrototypeHead(width, hidden, bottleneck, self.settings.prototypes, epsilon)

    def teacher_head(self) -> nn.Module:
        return super().head()

    def new_memory(self, teacher: nn.Module, student: nn.Module) -> Teacher:
        return PatchCentered(teacher, student, self.settings.prototypes)

    @property
    def hidden(self) -> int:
        """Patches that are hidden in one of the two views of an image, at least one and not all."""
        patches = self.config.model.patches
        return min(max(1, round(patches * self.settings.patch_mask_rate)), patches - 1)

    def packed(self, parts: Parts) -> Tensor:
        """The parts in one tensor, float32 (n, numbers)."""
        return torch.cat([part.flatten(1) for part in parts if part is not None], dim=1)

    def unpacked(self, packed: Tensor) -> Parts:
        """What ``packed`` has put together: with features for the student, without them for the teacher."""
        prototypes, hidden = self.settings.prototypes, 2 * self.config.model.hidden_size
        patches = self.hidden * prototypes
        views = packed.shape[1] - patches
        features = None
        if views != 2 * prototypes:
            views -= hidden
            features = packed[:, views + patches :].unflatten(1, (2, -1))
        of_views, of_patches = packed[:, :views], packed[:, views : views + patches]
        return Parts(of_views.unflatten(1, (-1, prototypes)), of_patches.unflatten(1, (-1, prototypes)), features)

    def compare(self, vectors: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        assert targets is not None
        assert isinstance(self.memory, PatchCentered)
        student, teacher, settings = self.unpacked(vectors), self.unpacked(targets), self.settings
        losses = {"dino": super().compare(student.views, teacher.views)[self.name]}
        if settings.ibot_weight:
            shares = self.assignments(teacher.patches, self.memory.patch_center)
            scores = F.log_softmax(student.patches / settings.student_temperature, dim=2)
            losses["ibot"] = settings.ibot_weight * -(shares * scores).sum(2).mean()
        if settings.koleo_weight:
            assert student.features is not None
            spread = koleo(student.features[:, 0]) + koleo(student.features[:, 1])
            losses["koleo"] = settings.koleo_weight * spread
        return losses

    def observe(self, targets: Tensor) -> None:
        teacher = self.unpacked(targets)
        super().observe(teacher.views)
        self._seen_patches = teacher.patches.mean((0, 1))

    def after_step(self, model: nn.Module, step: int) -> None:
        super().after_step(model, step)
        assert isinstance(self.memory, PatchCentered)
        seen = self._seen_patches.to(self.memory.patch_center.device)
        self.memory.patch_center.lerp_(seen, 1 - self.settings.center_momentum)

    def measured(self, targets: Tensor) -> dict[str, float]:
        return super().measured(self.unpacked(targets).views)

    def warnings(self, rows: int) -> list[str]:
        images = self.config.data.batch_images
        if images >= FEWEST_IMAGES:
            return []
        return [
            f"dinov2 with {images} images a step: users of it report that it learns little with fewer than "
            f"{FEWEST_IMAGES}; dino is less demanding"
        ]


class MaskedViews(ImageViews):
    """Views of images, with patches hidden from the student in one of the two large views of each."""

    method: DINOv2

    def prepare(self, rows: ImageRows) -> ImageBatch:
        return dataclasses.replace(super().prepare(rows), kept=self._kept(self.seed, rows.numbers))

    def example(self, rows: int) -> ImageBatch:
        visible = self.config.model.patches - self.method.hidden
        return dataclasses.replace(super().example(rows), kept=torch.arange(visible).expand(rows, -1).contiguous())

    def held_out(self, held_out: ImageValidation, numbers: NDArray[np.int64]) -> ImageBatch:
        return dataclasses.replace(super().held_out(held_out, numbers), kept=self._kept(0, numbers))

    def _kept(self, seed: int, numbers: NDArray[np.int64]) -> Tensor:
        """The visible patches of the view with hidden ones, ascending: int64 (n, visible), view 2 after view 1."""
        model, seed = self.config.model, key(seed, Stream.HIDDEN_PATCHES)
        hidden = hidden_blocks(seed, numbers, model.image_size // model.patch_size, self.method.hidden)
        second = uniform(key(seed), numbers, 1) < 0.5
        kept = np.nonzero(~hidden)[1].reshape(len(numbers), -1)
        return torch.from_numpy(kept + model.patches * second)

    def _hidden(self, batch: ImageBatch) -> Tensor:
        """Which patches of the two large views are hidden: bool (n, 2 · patches)."""
        assert batch.kept is not None
        patches = self.config.model.patches
        views = torch.arange(2 * patches, device=batch.kept.device) // patches
        return (views == batch.kept[:, :1] // patches).scatter(1, batch.kept, False)

    def vectors(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        assert isinstance(model, ImageTransformer)
        assert isinstance(model.head, MaskingPrototypeHead)
        hidden, views = self._hidden(batch), [self.views_of(batch)]
        by_view = hidden.unflatten(1, (2, -1)).transpose(0, 1).flatten(0, 1)
        states = model(views, layout_of(views, model.config.patch_size), masked=(by_view, model.head.mask))
        features = states.mean(1).unflatten(0, (2, -1))
        everything = features
        if self.method.local_views:
            everything = torch.cat([features, means_of_views(model, [self.local_views_of(batch)], len(batch))])
        scores = self.method.vectors(model.head, everything)
        patches = model.head(self._of_hidden(states, hidden), frozen=self.method.frozen)
        return self.method.packed(Parts(scores, patches, features.float().transpose(0, 1)))

    def targets(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        teacher = self.teacher
        assert isinstance(teacher, ImageTransformer)
        assert isinstance(teacher.head, PrototypeHead)
        views = [self.views_of(batch)]
        with torch.no_grad():
            states = teacher(views, layout_of(views, teacher.config.patch_size))
            scores = self.method.targets(teacher.head, states.mean(1).unflatten(0, (2, -1)))
            patches = teacher.head(self._of_hidden(states, self._hidden(batch)))
        return self.method.packed(Parts(scores, patches))

    def _of_hidden(self, states: Tensor, hidden: Tensor) -> Tensor:
        """The states of the hidden patches, (n, hidden, width), of those of both views, (2 · n, patches, width)."""
        by_image = states.unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2)
        places = hidden.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, : self.method.hidden]
        return by_image.gather(1, places[..., None].expand(-1, -1, by_image.shape[2]))


def open_objective(config: Config, form: ImageFormat) -> ImageViews:
    return MaskedViews(config, form, DINOv2(config))
