"""The gradient of one optimizer step, micro-batch by micro-batch."""

from __future__ import annotations

import torch
from torch import Tensor

from lm import randomness
from lm.config import Config
from lm.model import Transformer
from lm.objectives import READOUTS, Batch
from lm.validation import autocast


def step_gradients(
    model: Transformer, batch: Batch, config: Config, step: int
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Leave the gradient of a step's loss in the parameters; return each objective's loss and its share.

    The batch's weights are normalised over the whole step, so the parts' gradients simply add up: k micro-batches give
    what one big batch gives.

    Returns:
        For each objective that has rows: its loss times its share of the rows (the sum over objectives is the step's
        loss, in nats per token), and that share.
    """
    model.zero_grad()
    device = next(model.parameters()).device
    readouts = READOUTS[config.objective.objective]
    names = {False: readouts[0], True: readouts[-1]}
    rows = len(batch.masked)
    shares = {names[m]: float((batch.masked == m).sum()) / rows for m in (False, True) if (batch.masked == m).any()}
    losses = {name: torch.zeros((), device=device) for name in shares}
    for first in range(0, rows, config.data.micro_batch_rows or rows):
        part = batch.rows(first, first + (config.data.micro_batch_rows or rows))
        if config.model.dropout:
            torch.manual_seed(randomness.key(config.training.seed, 5, step, first) >> 1)
        causal = int((~part.masked).sum())  # the causal rows come first
        part = part.to(device)
        with autocast(device, config.training.precision):
            hidden = model(part.inputs, part.positions, part.lo, part.hi)
            parts = [
                (names[is_masked], model.loss(hidden[which], part.targets[which], part.loss_weights[which]))
                for is_masked, which in ((False, slice(0, causal)), (True, slice(causal, None)))
                if len(part.masked[which])
            ]
        torch.stack([loss for _, loss in parts]).sum().backward()
        for name, loss in parts:
            losses[name] += loss.detach()
    return losses, shares
