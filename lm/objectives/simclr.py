"""SimCLR (Chen et al. 2020): two views of an image are each other's partner among the views of the whole batch."""

from __future__ import annotations

from torch import Tensor, nn

from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.data.batch import Vocabulary
from lm.model.heads import ProjectionHead
from lm.objectives.contrastive import nt_xent
from lm.objectives.image_views import ImageViews
from lm.objectives.open_views import open_views
from lm.objectives.text_views import TextViews
from lm.objectives.view_method import ViewMethod


class SimCLR(ViewMethod):
    """NT-Xent over all images of a step, independent of micro-batches and ranks."""

    name = "simclr"
    against_collapse = "a third of learning_rate and muon_learning_rate, or infonce_temperature 0.5"

    def head(self) -> nn.Module:
        return ProjectionHead(*self.head_shape)

    def compare(self, vectors: Tensor, targets: Tensor | None) -> dict[str, Tensor]:
        return {self.name: nt_xent(vectors[:, 0], vectors[:, 1], self.settings.infonce_temperature)}


def open_objective(config: Config, inputs: ImageFormat | Vocabulary) -> ImageViews | TextViews:
    return open_views(config, inputs, SimCLR(config))
