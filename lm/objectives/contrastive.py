"""Contrastive objectives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """InfoNCE loss (van den Oord et al. 2018, eq. 4): the cross-entropy of finding each first view's partner.

    ``first`` and ``second`` are vectors (examples, width); the logits are their cosines divided by ``temperature``.
    """
    cosines = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(first), device=first.device))
