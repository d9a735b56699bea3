"""What all objectives on images share: the model, the features, and how they are watched while they train."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.shards.images import ImageFormat
from lm.config.settings import Config
from lm.config.view_settings import ViewsConfig
from lm.data.images import ImageBatch, ImageRows, ImageValidation, model_inputs, normalized
from lm.data.patch_rows import layout_of
from lm.data.views import COLUMNS, make_views
from lm.model.image_transformer import ImageTransformer
from lm.objectives.objective import Measure

# Images that a validation in the middle of a run seeks neighbors among, and the number of neighbors that vote.
NEIGHBORS_AMONG, NEIGHBORS = 2000, 20
VOTES_AT_ONCE = 1024  # images whose cosines with those are in memory together


class ImageObjective(ABC):
    """An ``lm.objectives.objective.Objective`` on images; each method adds a head, ``prepare`` and its loss."""

    name: str
    views: int  # drawn of each image
    compares = False
    comparable = True
    memory: nn.Module | None = None

    def __init__(self, config: Config, form: ImageFormat) -> None:
        self.config, self.form, self.seed = config, form, config.training.seed

    @property
    def view_settings(self) -> ViewsConfig:
        """How views are drawn."""
        return self.config.views

    @abstractmethod
    def head(self) -> nn.Module:
        """The head to train with the trunk."""

    def new_model(self) -> ImageTransformer:
        return ImageTransformer(self.config.model, self.head())

    @abstractmethod
    def prepare(self, rows: ImageRows) -> ImageBatch:
        """As of ``Objective``."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: ImageBatch) -> dict[str, Tensor]:
        """As of ``Objective``."""

    def batch_of(self, images: NDArray[np.uint8], draws: Tensor, weight: float) -> ImageBatch:
        """A batch in which each image weighs ``weight``."""
        weights = torch.full((len(images),), weight)
        return ImageBatch(torch.from_numpy(images), draws, weights, parts={self.name: len(images)})

    def example(self, rows: int) -> ImageBatch:
        size, channels = self.config.model.image_size, self.config.model.image_channels
        images = torch.zeros(rows, size, size, channels, dtype=torch.uint8)
        return ImageBatch(images, torch.ones(rows, self.views, COLUMNS), torch.zeros(rows), parts={self.name: rows})

    def views_of(self, batch: ImageBatch) -> Tensor:
        """The normalized views of a batch, (views · n, C, H, W): the first view of each image, then the second."""
        with torch.no_grad():
            draws = batch.draws.transpose(0, 1).flatten(0, 1)
            images = batch.images.repeat(self.views, 1, 1, 1)
            made = make_views(images, draws, self.config.model.image_size, self.view_settings)
            return normalized(made, self.form)

    def features(self, model: nn.Module, batch: ImageBatch) -> Tensor:
        """The features of the images themselves: the mean over their patches, float32 (n, hidden)."""
        assert isinstance(model, ImageTransformer)
        images = [model_inputs(batch.images, self.form)]
        hidden: Tensor = model(images, layout_of(images, model.config.patch_size))
        return hidden.float().mean(1)

    def begin(self, model: nn.Module) -> None:
        return

    def after_step(self, model: nn.Module, step: int) -> None:
        return

    def warnings(self, rows: int) -> list[str]:
        return []

    def collapse(self, found: Mapping[str, dict[str, float]], step: int) -> str:
        return ""

    @abstractmethod
    def measured(self, held_out: ImageValidation, numbers: NDArray[np.int64], measure: Measure) -> dict[str, float]:
        """The ``loss`` on these held-out images, first, and what else the objective measures."""

    def validate(
        self, held_out: ImageValidation, measure: Measure, *, rows: int, every_token: bool
    ) -> dict[str, dict[str, float]]:
        """The loss on ``rows`` held-out images, and what their features are like.

        ``spread`` and ``effective_rank`` tell a collapse (``feature_health``); ``knn_accuracy``, where there are
        classes, is the share of held-out images that the nearest of 2,000 training images classify rightly.
        """
        numbers = held_out.held_out.choose(rows)
        found = self.measured(held_out, numbers, measure) | {"images": len(numbers)}
        vectors = measure.vectors("features", numbers, self._plain(held_out.held_out.read)).numpy()
        found |= feature_health(vectors)
        labels = held_out.held_out.labels[numbers]
        bank = held_out.train.choose(NEIGHBORS_AMONG)
        bank = bank[held_out.train.labels[bank] >= 0]
        if (labels >= 0).any() and len(bank):
            among = measure.vectors("features", bank, self._plain(held_out.train.read)).numpy()
            known = labels >= 0
            predicted = nearest_classes(among, held_out.train.labels[bank], vectors[known], len(held_out.train.classes))
            found["knn_accuracy"] = float((predicted == labels[known]).mean())
        return {self.name: found}

    def _plain(self, read: Callable[[NDArray[np.int64]], NDArray[np.uint8]]) -> Callable[[NDArray[np.int64]], Any]:
        """Batches of images without views."""
        return lambda numbers: self.batch_of(read(numbers), torch.zeros(len(numbers), 0, COLUMNS), 0.0)

    @abstractmethod
    def flops_per_token(self, model: nn.Module, context_length: int) -> float:
        """Floating-point operations of one training step for each patch of its images, by the usual convention."""


def feature_health(vectors: NDArray[np.float32]) -> dict[str, float]:
    """How spread out feature vectors (n, width) are.

    ``spread`` is the mean standard deviation of the vectors' coordinates after scaling each vector to length 1, times
    the root of the width: 1 if they point everywhere, 0 if all are equal (Chen and He 2021, SimSiam, section 4.1).
    ``effective_rank`` is the exponential of the entropy of the singular values' shares (Roy and Vetterli 2007).
    """
    unit = vectors.astype(np.float64)
    unit /= np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    spread = float(unit.std(axis=0).mean() * unit.shape[1] ** 0.5)
    values = np.linalg.svd(vectors.astype(np.float64), compute_uv=False)
    shares = values[values > 0] / max(float(values.sum()), 1e-300)
    return {"spread": spread, "effective_rank": float(np.exp(-(shares * np.log(shares)).sum()))}


def nearest_classes(
    among: NDArray[np.float32], labels: NDArray[np.int64], vectors: NDArray[np.float32], classes: int
) -> NDArray[np.int64]:
    """The class that most of the 20 nearest vectors ``among`` have, by cosine, weighted by exp(cosine / 0.1).

    Weighted voting as in Wu et al. 2018 (section 3.4); the temperature is lightly's for CIFAR.
    """
    unit, bank = (each / np.maximum(np.linalg.norm(each, axis=1, keepdims=True), 1e-12) for each in (vectors, among))
    count, found = min(NEIGHBORS, len(among)), np.empty(len(vectors), dtype=np.int64)
    for first in range(0, len(vectors), VOTES_AT_ONCE):
        cosines = unit[first : first + VOTES_AT_ONCE] @ bank.T
        nearest = np.argpartition(-cosines, count - 1, axis=1)[:, :count]
        votes = np.zeros((len(cosines), classes))
        rows = np.arange(len(cosines))[:, None]
        np.add.at(votes, (rows, labels[nearest]), np.exp(np.take_along_axis(cosines, nearest, axis=1) / 0.1))
        found[first : first + VOTES_AT_ONCE] = votes.argmax(1)
    return found
