"""Task heads: a trunk that reads packed sequences, and a linear layer from its hidden states to a task's answers.
The head may have a hidden layer before it.

Each item of ``task_inputs`` becomes a vector, the mean of the hidden states at its positions, and the head computes a
score for every class (classification, words), one number (regression) or one score (a choice among several). The two
texts of a pair that are read apart are two items, whose vectors are combined first (``pair_features``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.shards.images import ImageFormat
from lm.config.view_settings import ViewsConfig
from lm.data.batch import Batch
from lm.data.images import model_inputs, normalized
from lm.data.packed_sequences import packed
from lm.data.patch_rows import layout_of
from lm.data.views import make_views
from lm.finetuning.task_inputs import EncodedExample
from lm.model.image_transformer import ImageTransformer, Model
from lm.model.transformer import Transformer

Features = TypeVar("Features", bound=Any)


class Items(Protocol):
    """Examples for one forward pass; ``items`` int64 (examples,) is how many items each has."""

    @property
    def items(self) -> Tensor: ...
    def to(self, device: torch.device) -> Items: ...


@dataclass(frozen=True)
class ItemBatch:
    """Texts for one forward pass.

    ``positions`` int64 (P,) index the flattened rows, item by item; ``shares`` float32 (P,) are their weights in the
    item's mean, and ``counts`` int64 (items,) is how many positions each item has. ``items`` int64 (examples,) is how
    many items each example has; items that are combined count as one.
    """

    rows: Batch
    positions: Tensor
    shares: Tensor
    counts: Tensor
    items: Tensor

    def to(self, device: torch.device) -> ItemBatch:
        parts = {name: getattr(self, name).to(device) for name in ("positions", "shares", "counts", "items")}
        return replace(self, rows=self.rows.to(device), **parts)


def item_batch(encoded: Sequence[EncodedExample], reads: str, end_of_text: int, context_length: int) -> ItemBatch:
    """Pack examples for one forward pass; arguments as of ``lm.data.packed_sequences.packed``."""
    sequences = [sequence for example in encoded for sequence in example.sequences]
    (rows,) = packed(sequences, reads, end_of_text, context_length, len(sequences))
    begins_of = np.empty(len(sequences), dtype=np.int64)  # of each sequence in the flattened rows
    begins_of[rows.numbers] = rows.rows * rows.batch.inputs.shape[1] + rows.first
    first = np.cumsum([0, *(len(e.sequences) for e in encoded)])
    runs: list[tuple[int, int, float]] = []  # begin in the flattened rows, length, share of each position
    counts = []
    for example, base in zip(encoded, first.tolist(), strict=False):
        for spans in example.items:
            counts.append(sum(span.stop - span.start for span in spans))
            for span in spans:
                length = span.stop - span.start
                runs.append((int(begins_of[base + span.sequence]) + span.start, length, 1 / (length * len(spans))))
    begins, lengths, shares = (np.array(column) for column in zip(*runs, strict=True))
    within = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    return ItemBatch(
        rows.batch,
        torch.from_numpy(np.repeat(begins, lengths) + within),
        torch.from_numpy(np.repeat(shares, lengths).astype(np.float32)),
        torch.tensor(counts),
        torch.tensor([len(example.items) // example.joined for example in encoded]),
    )


class TaskModel(nn.Module):
    """A trunk with a task head: ``outputs`` numbers per item, or with ``pairs`` per pair of items.

    ``hidden`` is the width of the head's hidden layer; 0: it has none.
    """

    trunk: Model

    def __init__(
        self, trunk: Model, outputs: int, dropout: float, *, pairs: bool = False, bias: bool = True, hidden: int = 0
    ) -> None:
        super().__init__()
        self.trunk, self.pairs = trunk, pairs
        self.dropout = nn.Dropout(dropout)
        width = trunk.config.hidden_size * (4 if pairs else 1)
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.head = nn.Linear(hidden or width, outputs, bias=bias)
        if trunk.head is not None:
            trunk.head.requires_grad_(False)  # the vocabulary's head is not used here

    def initialize_head(self, seed: int) -> None:
        """Draw small weights from ``seed``, those of a hidden layer with variance 1 / inputs; a bias is zero."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=generator) * 0.02)
            if self.head.bias is not None:
                self.head.bias.zero_()
            if self.hidden is not None:
                weight = self.hidden.weight
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)
                self.hidden.bias.zero_()

    def forward(self, batch: Any) -> Tensor:
        """The head's numbers, float32 (items, outputs)."""
        vectors = self.vectors(batch)
        if self.pairs:
            vectors = torch.cat(pair_features(vectors[0::2], vectors[1::2]), dim=1)
        if self.hidden is not None:
            vectors = F.gelu(self.hidden(self.dropout(vectors)))
        return self.head(self.dropout(vectors)).float()

    def vectors(self, batch: Any) -> Tensor:
        """The mean of each item's hidden states, float32 (items, hidden), from an ``ItemBatch``."""
        assert isinstance(self.trunk, Transformer)
        hidden = self.trunk.read(batch.rows).flatten(0, 1)
        return torch.segment_reduce(
            hidden[batch.positions].float() * batch.shares[:, None], "sum", lengths=batch.counts, axis=0, initial=0
        )


@dataclass(frozen=True)
class ImageItems:
    """Images for one forward pass.

    Attributes:
        images: uint8 (n, size, size, channels).
        form: how they become inputs.
        draws: float32 (n, columns), how a view is made of each (``lm.data.views``); None: they are read as they are.
        settings: those of the views.
    """

    images: Tensor
    form: ImageFormat
    draws: Tensor | None = None
    settings: ViewsConfig = field(default_factory=ViewsConfig)

    @property
    def items(self) -> Tensor:
        """Each image is one item: int64 (n,)."""
        return torch.ones(len(self.images), dtype=torch.int64)

    def to(self, device: torch.device) -> ImageItems:
        draws = None if self.draws is None else self.draws.to(device)
        return replace(self, images=self.images.to(device), draws=draws)

    def inputs(self) -> Tensor:
        """What the trunk reads, float32 (n, C, H, W)."""
        if self.draws is None:
            return model_inputs(self.images, self.form)
        return normalized(make_views(self.images, self.draws, self.form.size, self.settings), self.form)


class ImageTaskModel(TaskModel):
    """A trunk that reads images, with a task head."""

    def vectors(self, batch: Any) -> Tensor:
        """The mean of the hidden states of each image's patches, float32 (n, hidden), from ``ImageItems``."""
        assert isinstance(self.trunk, ImageTransformer)
        images = [batch.inputs()]
        return self.trunk(images, layout_of(images, self.trunk.config.patch_size)).float().mean(1)


def pair_features(u: Features, v: Features) -> tuple[Features, Features, Features, Features]:
    """The features of a pair from the vectors of its texts, (pairs, width) each: u, v, |u - v| and u * v.

    From Conneau et al. 2017; the vectors may be of Torch, NumPy or SciPy (sparse arrays).
    """
    return u, v, abs(u - v), u * v
