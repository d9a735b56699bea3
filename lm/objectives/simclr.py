"""SimCLR (Chen et al. 2020): two views of an image are each other's partner among the views of the whole batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.data.images import ImageBatch, ImageRows, ImageValidation
from lm.data.patch_rows import rows_of_images
from lm.data.views import draw_views
from lm.model.image_transformer import ImageTransformer, ProjectionHead
from lm.objectives.contrastive import nt_xent
from lm.objectives.images import ImageObjective
from lm.objectives.objective import Measure


class SimCLR(ImageObjective):
    """NT-Xent over all images of a step, independent of micro-batches and ranks."""

    name, views, compares = "simclr", 2, True

    def head(self) -> nn.Module:
        model, objective = self.config.model, self.config.objective
        return ProjectionHead(
            model.hidden_size, objective.projection_hidden_size, objective.projection_size, model.norm_epsilon
        )

    def prepare(self, rows: ImageRows) -> ImageBatch:
        draws = draw_views(self.seed, rows.numbers, self.views, self.view_settings)
        return self.batch_of(rows.images, draws, 1 / len(rows.images))

    def vectors(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """The projections of each image's two views, float32 (n, 2, size)."""
        assert isinstance(model, ImageTransformer)
        assert model.head is not None
        views = self.views_of(batch)
        side = model.config.image_size // model.config.patch_size
        hidden = model([views], rows_of_images(len(views), side, side).to(views.device))
        projected: Tensor = model.head(hidden.mean(1))
        return projected.float().unflatten(0, (self.views, -1)).transpose(0, 1)

    def compare(self, vectors: Tensor) -> dict[str, Tensor]:
        """The loss of a step from the projections of all its images, (n, 2, size)."""
        return {self.name: nt_xent(vectors[:, 0], vectors[:, 1], self.config.objective.infonce_temperature)}

    def loss(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        return self.compare(self.vectors(model, batch))

    def loss_held_out(self, held_out: ImageValidation, numbers: NDArray[np.int64], measure: Measure) -> float:
        """Among these images; their views are the same in every validation."""

        def batch(some: NDArray[np.int64]) -> ImageBatch:
            draws = draw_views(0, some, self.views, self.view_settings)
            return self.batch_of(held_out.held_out.read(some), draws, 1.0)

        return float(self.compare(measure.vectors("vectors", numbers, batch))[self.name])

    def flops_per_token(self, model: nn.Module, context_length: int) -> float:
        """Both views go through the trunk."""
        assert isinstance(model, ImageTransformer)
        return self.views * model.flops_per_patch(context_length)


open_objective = SimCLR
