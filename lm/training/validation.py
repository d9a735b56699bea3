"""The loss on text that the model has not seen, for each readout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from data_prep.shards.tokens import Dataset
from lm.config.settings import Config
from lm.data.corpora import Corpora
from lm.data.rows import ValidationRows, vocabulary_of
from lm.model.device import autocast
from lm.objectives.objective import Objective, open_objective
from lm.training.distributed import Ranks


def rows_of_validation(dataset: Dataset | Corpora, config: Config) -> dict[str, int]:
    """How many rows a validation in the middle of a run takes (``taken``), ``of`` how many of the split."""
    rows = ValidationRows(dataset.split("validation"), config.data.context_length)
    return {"taken": len(rows.choose(config.training.validation_rows)), "of": rows.count}


class LossMeasure:
    """Sums a model's loss on held-out rows over all ranks: a ``Measure``."""

    def __init__(self, model: nn.Module, objective: Objective, config: Config, ranks: Ranks) -> None:
        self.model, self.objective, self.config, self.ranks = model, objective, config, ranks

    @torch.no_grad()
    def __call__(
        self, numbers: NDArray[np.int64], batches: Sequence[Callable[[NDArray[np.int64]], Any]]
    ) -> tuple[float, float]:
        ranks, config = self.ranks, self.config
        own = numbers[ranks.rank :: ranks.world]
        # Every rank makes as many forward passes as the others: some read a row that does not count.
        idle = -(-len(numbers) // ranks.world) - len(own)
        padded = np.concatenate([own, numbers[:idle]])
        chunk = max(1, config.data.micro_batch_rows or min(config.data.batch_rows, 32))
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch_of in batches:
            for first in range(0, len(padded), chunk):
                batch = batch_of(padded[first : first + chunk])
                batch.loss_weights[max(0, len(own) - first) :] = 0
                with autocast(ranks.device, config.training.precision):
                    losses = ranks.losses(self.objective, self.model, batch.to(ranks.device))
                sums += torch.tensor([float(sum(losses.values())), float(batch.loss_weights.sum())])
        self.model.train()
        loss, weight = ranks.sum(sums)[0].tolist()
        return loss, weight


def validate_readouts(
    model: nn.Module,
    dataset: Dataset | Corpora,
    config: Config,
    *,
    rows: int | None = None,
    every_token: bool = False,
    objective: Objective | None = None,
    ranks: Ranks | None = None,
) -> dict[str, dict[str, float]]:
    """What the objective measures on the validation split; empty if the dataset has no validation text.

    Args:
        rows: how many rows of the split to read (None: as the settings say; 0: all).
        every_token: as of ``Objective.validate``.
        objective: None: as the settings say.
        ranks: which share the rows; the result is of all of them.
    """
    split = dataset.split("validation")
    if not split.tokens:
        return {}
    objective = objective or open_objective(config, vocabulary_of(dataset))
    measure = LossMeasure(model, objective, config, ranks or Ranks(next(model.parameters()).device))
    wanted = config.training.validation_rows if rows is None else rows
    return objective.validate(
        ValidationRows(split, config.data.context_length), measure, rows=wanted, every_token=every_token
    )
