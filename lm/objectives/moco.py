"""MoCo: find the teacher's vector of the other view among those of the batch, and of a queue of earlier ones.

Without a queue this is MoCo v3 (Chen, Xie and He 2021), with one MoCo v1 and v2 (He et al. 2020) with v3's predictor
and the batch's vectors as further negatives. There is no norm over the batch, so nothing leaks through it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.data.batch import Vocabulary
from lm.model.heads import PredictionHead, ProjectionHead
from lm.objectives.contrastive import info_nce
from lm.objectives.image_views import ImageViews
from lm.objectives.open_views import open_views
from lm.objectives.teacher import Teacher
from lm.objectives.text_views import TextViews
from lm.objectives.view_method import ViewMethod


class Queue(Teacher):
    """A teacher, and the unit vectors that it had of the latest views: ``keys`` (size, width), zero until filled."""

    def __init__(self, model: nn.Module, student: nn.Module, size: int, width: int) -> None:
        super().__init__(model, student)
        device = next(student.parameters()).device
        self.register_buffer("keys", torch.zeros(size, width, device=device))
        self.keys: Tensor

    def push(self, keys: Tensor) -> None:
        """Put vectors (n, width) in front; the oldest ones leave."""
        self.keys.copy_(torch.cat([keys, self.keys])[: len(self.keys)])


class MoCo(ViewMethod):
    """InfoNCE with a teacher's vectors as keys, in both directions."""

    name, with_teacher = "moco", True
    against_collapse = "a third of learning_rate and muon_learning_rate, or teacher_momentum 0.996"
    _seen: Tensor

    def head(self) -> nn.Module:
        return PredictionHead(*self.head_shape)

    def teacher_head(self) -> nn.Module:
        return ProjectionHead(*self.head_shape)

    def new_memory(self, teacher: nn.Module, student: nn.Module) -> Teacher:
        return Queue(teacher, student, self.settings.queue_size, self.settings.projection_size)

    def targets(self, head: nn.Module, features: Tensor) -> Tensor:
        return F.normalize(super().targets(head, features), dim=2)

    def compare(self, vectors: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """The mean InfoNCE of both directions (the paper of 2021, section 3, without its factor 2 x temperature)."""
        assert targets is not None
        assert isinstance(self.memory, Queue)
        filled = 2 * self.per_step * self.memory.steps
        queue = self.memory.keys[:filled].to(targets.device)
        losses = [
            info_nce(vectors[:, view], torch.cat([targets[:, 1 - view], queue]), self.settings.infonce_temperature)
            for view in range(2)
        ]
        return {self.name: (losses[0] + losses[1]) / 2}

    def observe(self, targets: Tensor) -> None:
        self._seen = targets

    def after_step(self, model: nn.Module, step: int) -> None:
        super().after_step(model, step)
        assert isinstance(self.memory, Queue)
        if self.settings.queue_size:
            self.memory.push(self._seen.transpose(0, 1).flatten(0, 1).to(self.memory.keys.device))

    def warnings(self, rows: int) -> list[str]:
        if self.settings.queue_size <= rows // 10:
            return []
        return [
            f"queue_size {self.settings.queue_size:,} is more than a tenth of the {rows:,} {self.things}: many "
            f"negatives will be older views of the same {self.things}"
        ]


def open_objective(config: Config, inputs: ImageFormat | Vocabulary) -> ImageViews | TextViews:
    return open_views(config, inputs, MoCo(config))
