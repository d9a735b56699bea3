"""Predict several of the next tokens from one hidden state (Gloeckle et al. 2024), without weights of its own.

The tokens after the next one are predicted by the head that predicts the next one, as in the records of modded-nanogpt,
with weights that fall to 0 over the run. So nothing has to be thrown away: the model is used and exported as any other.

All targets of a position share its logits, and with them their normalization. The sum of the weighted losses,

    Σ_k w_k (log Σ_v exp z_v - z_k)  =  Σ_k w_k (log Σ_v exp z_v - z_1)  +  Σ_k w_k (z_1 - z_k),

is then one cross-entropy of the next token, and the scores z of a few tokens: the product with the head is done once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lm.data.batch import IGNORED, Batch
from lm.model.transformer import Transformer


def targets_ahead(batch: Batch, count: int) -> Tensor:
    """The ``count`` tokens after the targets: int64 (rows, T, count), -100 beyond the end of a document or row."""
    found = []
    for distance in range(1, count + 1):
        tokens = torch.full_like(batch.targets, IGNORED)
        same_document = batch.positions[:, distance:] == batch.positions[:, :-distance] + distance
        tokens[:, :-distance] = torch.where(same_document, batch.targets[:, distance:], IGNORED)
        found.append(tokens)
    return torch.stack(found, dim=-1)


def loss_of_next_tokens(model: Transformer, hidden: Tensor, batch: Batch, predicted: int | None = None) -> Tensor:
    """The weighted sum of the cross-entropies, in nats, of the targets of causal rows and of those ``ahead``.

    ``predicted`` is as of ``kernels.linear_cross_entropy``.
    """
    ahead = targets_ahead(batch, len(batch.ahead))
    exists = (ahead >= 0) & (batch.targets >= 0)[..., None]
    relative = torch.tensor(batch.ahead, device=hidden.device) * exists
    loss = model.loss(hidden, batch.targets, batch.loss_weights * (1 + relative.sum(-1)), predicted)
    scores = model.logits_of(hidden, torch.cat([batch.targets[..., None], ahead], dim=-1).clamp(min=0))
    return loss + (batch.loss_weights[..., None] * relative * (scores[..., :1] - scores[..., 1:])).sum()
