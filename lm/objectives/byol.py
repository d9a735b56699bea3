"""BYOL (Grill et al. 2020): predict the teacher's projection of one view from the student's of the other."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.data.batch import Vocabulary
from lm.model.heads import PredictionHead, ProjectionHead
from lm.objectives.image_views import ImageViews
from lm.objectives.open_views import open_views
from lm.objectives.text_views import TextViews
from lm.objectives.view_method import ViewMethod


class BYOL(ViewMethod):
    """The squared distance of unit vectors, in both directions; nothing is compared with other images.

    That it does not collapse rests on the predictor and the slow teacher; there are no batch statistics.
    """

    name, with_teacher = "byol", True
    against_collapse = "a third of learning_rate and muon_learning_rate, or teacher_momentum 0.996"

    def head(self) -> nn.Module:
        return PredictionHead(*self.head_shape)

    def teacher_head(self) -> nn.Module:
        return ProjectionHead(*self.head_shape)

    def compare(self, vectors: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        """2 - 2 cos of each prediction and the teacher's projection of the other view (equation 2), averaged."""
        assert targets is not None
        return {self.name: (2 - 2 * F.cosine_similarity(vectors, targets.flip(1), dim=2)).mean()}


def open_objective(config: Config, inputs: ImageFormat | Vocabulary) -> ImageViews | TextViews:
    return open_views(config, inputs, BYOL(config))
