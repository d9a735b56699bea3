"""Contrastive objectives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Mean over examples of -log of the share that the own partner has among all second views.

    Van den Oord et al. 2018, eq. 4. ``first`` and ``second`` are vectors (examples, width); a share is the softmax of
    their cosines over ``temperature``.
    """
    cosines = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(first), device=first.device))
