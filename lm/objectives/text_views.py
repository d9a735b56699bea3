"""Objectives that compare views of pieces of text: what a ``ViewMethod`` learns from them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.config.settings import Config, usual_pooling, usual_reading
from lm.data.batch import Rows, Vocabulary, rows_of_windows
from lm.data.rows import ValidationRows
from lm.data.text_views import Spans, TextViewBatch, draw_spans, pieces_of, pooled_spans
from lm.model.transformer import Transformer
from lm.objectives.images import feature_health
from lm.objectives.objective import Measure
from lm.objectives.view_method import ViewMethod
from lm.objectives.views import Views

MOST_PIECES = 2048  # of a validation


class TextViews(Views):
    """Two views of each piece of the rows, and as many shorter ones as the method wants.

    A text is read, and its hidden states become one vector, as ``kindling embed`` does it.
    """

    def __init__(self, config: Config, vocabulary: Vocabulary, method: ViewMethod) -> None:
        super().__init__(method)
        self.config, self.vocabulary, self.seed = config, vocabulary, config.training.seed
        reads = usual_reading(config)
        self.bidirectional, self.pooling = reads == "bidirectional", usual_pooling(reads)
        rows = round(config.objective.shares.get(self.name, 1) * config.data.batch_rows)
        method.things, method.per_step = "pieces of text", rows * self.pieces

    @property
    def pieces(self) -> int:
        """How many pieces of a row are compared: as many as a full one has at least."""
        return -(-self.config.data.context_length // self.config.views.view_tokens)

    def new_model(self) -> Transformer:
        return Transformer(self.config.model, self.method.head())

    def begin(self, model: nn.Module) -> None:
        if self.method.with_teacher:
            self.remember(Transformer(self.config.model, self.method.teacher_head()), model)

    def prepare(self, rows: Rows) -> TextViewBatch:
        return self._batch(rows, self.seed)

    def _batch(self, rows: Rows, seed: int) -> TextViewBatch:
        views, shortest = self.config.views, self.config.objective.local_area
        large = self._spans(rows, seed, range(2), (views.span_share, 1.0), views.token_deletion)
        small = None
        if local := self.method.local_views:
            shares = (shortest, views.span_share)
            small = self._spans(rows, seed, range(2, 2 + local), shares, views.token_deletion)
        weights = torch.full((len(rows.numbers),), 1 / len(rows.numbers))
        return TextViewBatch(large, small, weights, {self.name: len(weights)})

    def _spans(
        self, rows: Rows, seed: int, views: range, shares: tuple[float, float] = (1.0, 1.0), deletion: float = 0.0
    ) -> Spans:
        length = self.config.views.view_tokens
        pieces = pieces_of(rows, self.pieces, length, self.vocabulary.end_of_text, seed)
        return draw_spans(
            pieces,
            length,
            rows.numbers,
            seed,
            self.vocabulary,
            views,
            shares=shares,
            deletion=deletion,
            bidirectional=self.bidirectional,
        )

    def example(self, rows: int) -> TextViewBatch:
        def spans(views: int, share: float) -> Spans:
            length = int(share * self.config.views.view_tokens) + 1
            inputs = torch.zeros(rows, views, self.pieces * length, dtype=torch.int64)
            positions, borders = torch.zeros_like(inputs, dtype=torch.int32), torch.zeros(rows, views, self.pieces, 2)
            return Spans(inputs, positions, positions, positions + 1, borders.to(torch.int64))

        local = self.method.local_views
        small = spans(local, self.config.views.span_share) if local else None
        return TextViewBatch(spans(2, 1.0), small, torch.zeros(rows), {self.name: rows})

    def features_of(self, model: nn.Module, spans: Spans) -> Tensor:
        """The vectors of spans: (rows, pieces, views, hidden)."""
        assert isinstance(model, Transformer)
        hidden = pooled_spans(model.read(spans.flat()), spans.flat().borders, self.pooling)
        return hidden.unflatten(0, spans.inputs.shape[:2]).transpose(1, 2)

    def features(self, model: nn.Module, batch: TextViewBatch) -> Tensor:
        """The features of the pieces themselves, float32 (rows, pieces, hidden)."""
        return self.features_of(model, batch.large).float().squeeze(2)

    def vectors(self, model: nn.Module, batch: TextViewBatch) -> Tensor:
        """As of ``ViewMethod``, for each piece of a row: (rows, pieces, views, size)."""
        assert isinstance(model, Transformer)
        assert model.projector is not None
        features = self.features_of(model, batch.large)
        if batch.small is not None:
            features = torch.cat([features, self.features_of(model, batch.small)], dim=2)
        vectors = self.method.vectors(model.projector, features.flatten(0, 1).transpose(0, 1))
        if model.head is not None:  # DDP wants a gradient of every weight
            vectors = vectors + 0 * model.head.weight.sum()
        return vectors.unflatten(0, (len(batch), -1))

    def targets(self, model: nn.Module, batch: TextViewBatch) -> Tensor:
        """As of ``ViewMethod``, for each piece of a row: (rows, pieces, 2, size)."""
        teacher = self.teacher
        assert isinstance(teacher, Transformer)
        assert teacher.projector is not None
        with torch.no_grad():
            features = self.features_of(teacher, batch.large).flatten(0, 1).transpose(0, 1)
            return self.method.targets(teacher.projector, features).unflatten(0, (len(batch), -1))

    def by_thing(self, found: Tensor) -> Tensor:
        return found.flatten(0, 1)

    def validate(
        self, held_out: ValidationRows, measure: Measure, *, rows: int, every_token: bool
    ) -> dict[str, dict[str, float]]:
        """The loss on ``rows`` held-out windows, and the ``feature_health`` of their pieces' features.

        At most 2,048 pieces are compared, however many rows there are.
        """
        numbers = held_out.choose(min(rows or held_out.count, max(1, MOST_PIECES // self.pieces)))

        def of(some: NDArray[np.int64]) -> Rows:
            windows, _ = held_out.windows(some)
            return replace(rows_of_windows(windows, self.vocabulary), numbers=some)

        def plain(some: NDArray[np.int64]) -> TextViewBatch:
            return TextViewBatch(self._spans(of(some), 0, range(1)), None, torch.zeros(len(some)))

        found = self.measured_by(lambda some: self._batch(of(some), 0), numbers, measure)
        features = self.by_thing(measure.vectors("features", numbers, plain)).numpy()
        return {self.name: found | {"pieces": len(features)} | feature_health(features)}

    def warnings(self, rows: int) -> list[str]:
        return super().warnings(rows * self.pieces)

    def flops_per_token(self, model: nn.Module, context_length: int) -> float:
        """All views go through the student, the first two through the teacher, which has no backward pass.

        Spans are counted with their mean length.
        """
        assert isinstance(model, Transformer)
        views, objective = self.config.views, self.config.objective
        tokens = views.span_share + 1  # of two spans, as a share of a piece's
        flops = model.blocks.flops_per_token(views.view_tokens)
        shorter = self.method.local_views * (objective.local_area + views.span_share) / 2
        return flops * (1 - views.token_deletion) * (tokens * (4 / 3 if self.method.with_teacher else 1) + shorter)
