"""The loss of each readout on text that the model has not seen."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.shards.tokens import Dataset
from lm.config.settings import Config
from lm.data.corpora import Corpora
from lm.data.rows import vocabulary_of
from lm.model.device import autocast
from lm.model.transformer import Transformer
from lm.objectives.batches import ValidationRows
from lm.runs.metrics_log import ReadoutLoss
from lm.training.distributed import Ranks


def rows_of_validation(dataset: Dataset | Corpora, config: Config) -> dict[str, int]:
    """Return how many rows a validation during training reads (``taken``), ``of`` how many in the split."""
    rows = ValidationRows(dataset.split("validation"), vocabulary_of(dataset), config.data.context_length)
    return {"taken": len(rows.choose(config.training.validation_rows)), "of": rows.count}


@torch.no_grad()
def validate(
    model: Transformer,
    rows: ValidationRows,
    numbers: NDArray[np.int64],
    readout: str,
    config: Config,
    *,
    every_token: bool,
    ranks: Ranks | None = None,
) -> ReadoutLoss:
    """Return the loss of one readout on the windows ``numbers`` of the validation split.

    A masked readout hides one token in ``validation_folds`` at a time. ``every_token`` repeats this until every token
    has been hidden once; otherwise one pass predicts that share of the tokens, the same ones every time. The windows
    are divided among ``ranks``; every rank returns the loss on all of them.
    """
    ranks = ranks or Ranks(next(model.parameters()).device)
    own = numbers[ranks.rank :: ranks.world]
    # Every rank makes equally many forward passes: some read a window that does not count.
    idle = -(-len(numbers) // ranks.world) - len(own)
    padded = np.concatenate([own, numbers[:idle]])
    folds = 1 if readout == "next_token" else config.objective.validation_folds
    chunk = max(1, config.data.micro_batch_rows or min(config.data.batch_rows, 32))
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64)  # nats, and tokens predicted
    for fold in range(folds if every_token else 1):
        left = len(own)
        for batch in rows.batches(padded, readout, fold, folds, chunk):
            batch.loss_weights[max(0, left) :] = 0
            left -= len(batch.masked)
            part, causal = batch.to(ranks.device), int((~batch.masked).sum())
            with autocast(ranks.device, config.training.precision):
                nats = float(ranks.losses(model, part, causal).sum())
            sums += torch.tensor([nats, float(batch.loss_weights.sum())])
    model.train()
    total, predicted = ranks.sum(sums)[0].tolist()
    split = rows.split
    # End-of-text tokens have no bytes; the causal readout predicts them, masked readouts do not.
    predictable = split.tokens if readout == "next_token" else split.tokens - split.documents
    nats = total / max(predicted, 1)
    # Not ``bits_per_byte``: its order of divisions would change the last bit of saved results.
    return ReadoutLoss(nats, nats * predictable / split.text_bytes / math.log(2), int(predicted))


def validate_readouts(
    model: Transformer,
    dataset: Dataset | Corpora,
    config: Config,
    *,
    rows: int | None = None,
    every_token: bool = False,
    ranks: Ranks | None = None,
) -> dict[str, ReadoutLoss]:
    """Return the validation loss of each readout; empty if the dataset has no validation text.

    ``rows`` windows are read (None: as configured; 0: the whole split); ``every_token`` and ``ranks`` as in
    ``validate``.
    """
    split = dataset.split("validation")
    if not split.tokens:
        return {}
    windows = ValidationRows(split, vocabulary_of(dataset), config.data.context_length)
    numbers = windows.choose(config.training.validation_rows if rows is None else rows)
    return {
        readout: validate(model, windows, numbers, readout, config, every_token=every_token, ranks=ranks)
        for readout in config.readouts
    }
