"""What the model makes of data that it has not seen: the loss of each readout, or of an objective on images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from lm.config.settings import Config
from lm.data.corpora import Corpora
from lm.data.image_corpora import ImageCorpora
from lm.data.training_data import training_inputs, validation_rows
from lm.model.device import autocast
from lm.objectives.objective import BatchOf, Objective, open_objective
from lm.training.distributed import Ranks


def rows_of_validation(data: Corpora | ImageCorpora, config: Config) -> dict[str, int]:
    """How many rows a validation in the middle of a run takes (``taken``), ``of`` how many of the split."""
    rows = validation_rows(data, config)
    there, wanted = rows.count if rows else 0, config.training.validation_rows
    return {"taken": min(wanted or there, there), "of": there}


class LossMeasure:
    """Sums a model's loss on held-out rows over all ranks: a ``Measure``."""

    def __init__(self, model: nn.Module, objective: Objective, config: Config, ranks: Ranks) -> None:
        self.model, self.objective, self.config, self.ranks = model, objective, config, ranks

    @torch.no_grad()
    def __call__(self, numbers: NDArray[np.int64], batches: Sequence[BatchOf]) -> tuple[float, float]:
        ranks, config = self.ranks, self.config
        own, padded, chunk = self._shared(numbers)
        self.model.eval()
        sums = torch.zeros(2, dtype=torch.float64)
        for batch_of in batches:
            for first in range(0, len(padded), chunk):
                batch = batch_of(padded[first : first + chunk])
                batch.loss_weights[max(0, len(own) - first) :] = 0
                with autocast(ranks.device, config.training.precision, training=False):
                    losses = ranks.call("loss", self.objective, self.model, batch.to(ranks.device))
                sums += torch.tensor([float(sum(losses.values())), float(batch.loss_weights.sum())])
        self.model.train()
        loss, weight = ranks.sum(sums)[0].tolist()
        return loss, weight

    @torch.no_grad()
    def vectors(self, what: str, numbers: NDArray[np.int64], batch_of: BatchOf) -> Tensor:
        ranks, config = self.ranks, self.config
        _, padded, chunk = self._shared(numbers)
        self.model.eval()
        found = []
        for first in range(0, len(padded), chunk):
            batch = batch_of(padded[first : first + chunk]).to(ranks.device)
            with autocast(ranks.device, config.training.precision, training=False):
                found.append(ranks.call(what, self.objective, self.model, batch).float())
        self.model.train()
        return ranks.rows_of_all(torch.cat(found)).cpu()[: len(numbers)]

    def _shared(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
        """This rank's rows, the same with as many more as make all ranks equal, and how many to read at once.

        Every rank makes as many forward passes as the others: some read a row that does not count.
        """
        own = numbers[self.ranks.rank :: self.ranks.world]
        idle = -(-len(numbers) // self.ranks.world) - len(own)
        data = self.config.data
        return own, np.concatenate([own, numbers[:idle]]), max(1, data.micro_batch_rows or min(data.batch_rows, 32))


def validate_readouts(
    model: nn.Module,
    data: Corpora | ImageCorpora,
    config: Config,
    *,
    rows: int | None = None,
    every_token: bool = False,
    objective: Objective | None = None,
    ranks: Ranks | None = None,
) -> dict[str, dict[str, float]]:
    """What the objective measures on the validation split; empty if the data has none.

    Args:
        rows: how many rows of the split to read (None: as the settings say; 0: all).
        every_token: as of ``Objective.validate``.
        objective: None: as the settings say.
        ranks: which share the rows; the result is of all of them.
    """
    held_out = validation_rows(data, config)
    if held_out is None:
        return {}
    objective = objective or open_objective(config, training_inputs(data))
    measure = LossMeasure(model, objective, config, ranks or Ranks(next(model.parameters()).device))
    wanted = config.training.validation_rows if rows is None else rows
    return objective.validate(held_out, measure, rows=wanted, every_token=every_token)
