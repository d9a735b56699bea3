"""Task heads: a trunk that reads packed sequences, and one linear map from what it read to a task's answers.

The items of ``task_inputs`` become vectors, the mean of the hidden states at their places, and the head gives each a
score for every class (classification, words), one number (regression) or one score (a choice among several). The two
texts of a pair that are read apart are two items, whose vectors are put together before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.data.batch import Batch
from lm.data.packed_sequences import packed
from lm.finetuning.task_inputs import Encoded
from lm.model.transformer import Transformer


@dataclass(frozen=True)
class ItemBatch:
    """Examples for one forward pass.

    ``places`` int64 (P,) are positions in the flattened rows, item after item; ``shares`` float32 (P,) is what each
    adds to its item's mean and ``counts`` int64 (items,) how many places each item has. ``items`` int64 (examples,) is
    how many items each example has, those that are put together counting as one.
    """

    rows: Batch
    places: Tensor
    shares: Tensor
    counts: Tensor
    items: Tensor

    def to(self, device: torch.device) -> ItemBatch:
        parts = {name: getattr(self, name).to(device) for name in ("places", "shares", "counts", "items")}
        return replace(self, rows=self.rows.to(device), **parts)


def item_batch(encoded: Sequence[Encoded], reads: str, end_of_text: int, context_length: int) -> ItemBatch:
    """Pack examples for one forward pass; arguments as of ``lm.data.packed_sequences.packed``."""
    sequences = [sequence for example in encoded for sequence in example.sequences]
    (rows,) = packed(sequences, reads, end_of_text, context_length, len(sequences))
    begins_of = np.empty(len(sequences), dtype=np.int64)  # place of each sequence's first token in the flattened rows
    begins_of[rows.numbers] = rows.rows * rows.batch.inputs.shape[1] + rows.first
    first = np.cumsum([0, *(len(e.sequences) for e in encoded)])
    runs: list[tuple[int, int, float]] = []  # begin in the flattened rows, length, share of each place
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
    """A trunk with a task's head of ``outputs`` numbers an item, or for ``pairs`` of items."""

    def __init__(self, trunk: Transformer, outputs: int, dropout: float, *, pairs: bool = False) -> None:
        super().__init__()
        self.trunk, self.pairs = trunk, pairs
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(trunk.config.hidden_size * (4 if pairs else 1), outputs)
        if trunk.head is not None:
            trunk.head.requires_grad_(False)  # of the vocabulary: not used here

    def initialise_head(self, seed: int) -> None:
        """Small weights drawn from ``seed``, no bias."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(self.head.weight.shape, generator=generator) * 0.02)
            self.head.bias.zero_()

    def forward(self, batch: ItemBatch) -> Tensor:
        """The head's numbers, float32 (items, outputs)."""
        vectors = self.vectors(batch)
        if self.pairs:
            vectors = pair_vectors(vectors[0::2], vectors[1::2])
        return self.head(self.dropout(vectors)).float()

    def vectors(self, batch: ItemBatch) -> Tensor:
        """The mean of each item's hidden states, float32 (items, hidden)."""
        rows = batch.rows
        hidden = self.trunk(rows.inputs, rows.positions, rows.lo, rows.hi).flatten(0, 1)
        return torch.segment_reduce(
            hidden[batch.places].float() * batch.shares[:, None], "sum", lengths=batch.counts, axis=0, initial=0
        )


def pair_vectors(u: Tensor, v: Tensor) -> Tensor:
    """Two texts' vectors (pairs, width) as u, v, |u - v| and u * v, (pairs, 4 width) (Conneau et al. 2017)."""
    return torch.cat((u, v, (u - v).abs(), u * v), dim=1)


def losses(kind: str, outputs: Tensor, labels: Tensor, items: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """What the answers cost, (labels,): cross-entropy in nats, or for a regression the squared distance.

    Args:
        kind: one of ``lm.config.settings.TASKS`` but instructions.
        outputs: of a forward pass, (items, outputs).
        labels: a class an item (classification, tokens), a number an item (regression), or which of its items is right
            of each example (choice).
        items: (examples,), how many items each example has.
        label_smoothing: share of the answer that is spread over all classes; for classes only.
    """
    if kind == "regression":
        return (outputs[:, 0] - labels) ** 2
    scores = by_example(outputs[:, 0], items) if kind == "choice" else outputs
    return F.cross_entropy(scores, labels, reduction="none", label_smoothing=label_smoothing)


def by_example(scores: Tensor, items: Tensor) -> Tensor:
    """Scores of items (items,) as one row an example, (examples, most items), -inf where an example has no more."""
    most = int(items.max())
    there = torch.arange(most, device=items.device) < items[:, None]
    return scores.new_full(there.shape, -torch.inf).masked_scatter(there, scores)


def probabilities(kind: str, outputs: Tensor, items: Tensor) -> NDArray[np.float64]:
    """Outputs as probabilities: of each class (items, classes), or of each choice (examples, most choices)."""
    scores = by_example(outputs[:, 0], items) if kind == "choice" else outputs
    return scores.double().softmax(-1).cpu().numpy()
