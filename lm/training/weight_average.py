"""The mean of the weights over the last steps of a run.

Averaging the weights along the path of the optimizer goes back to Polyak and Juditsky 1992; Izmailov et al. 2018 (SWA)
found that the mean of a network's last weights generalizes better than the last ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lm.training.distributed import Ranks


def is_averaged(step: int, steps: int, share: float) -> bool:
    """Whether the weights after ``step`` of ``steps`` steps are part of the mean over the last ``share`` of them."""
    return share > 0 and step > steps - max(1, round(share * steps))


class WeightAverage:
    """The mean of a model's trained weights, float32, held like the weights: in slices under FSDP."""

    def __init__(self, model: nn.Module, ranks: Ranks | None = None) -> None:
        self.ranks = ranks or Ranks()
        self.parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.means = {name: torch.zeros_like(each, requires_grad=False) for name, each in self.parameters.items()}

    @torch.no_grad()
    def add(self, count: int) -> None:
        """Take in the present weights, the ``count``-th ones (from 1) of the mean."""
        for name, weight in self.parameters.items():
            self.means[name].lerp_(weight, 1 / count)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the mean as its weights inside, and its own again, bit for bit, after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.parameters.items():  # one at a time, so that only one copy is in memory
            own = weight.clone()
            weight.copy_(self.means[name])
            self.means[name].copy_(own)

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Continue from the means of a checkpoint."""
        for name, mean in self.means.items():
            mean.copy_(self.ranks.cut(tensors[name], mean))
