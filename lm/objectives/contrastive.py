"""Contrastive objectives."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def info_nce(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """InfoNCE loss (van den Oord et al. 2018, eq. 4): the cross-entropy of finding each first view's partner.

    ``first`` and ``second`` are vectors (examples, width), ``second`` perhaps with more vectors at its end, which
    match none of ``first``; the logits are cosines divided by ``temperature``.
    """
    cosines = F.normalize(first, dim=1) @ F.normalize(second, dim=1).T
    return F.cross_entropy(cosines / temperature, torch.arange(len(first), device=first.device))


def nt_xent(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """NT-Xent (Chen et al. 2020, SimCLR, eq. 1): each view's partner is to be found among the views of all examples.

    ``first`` and ``second`` are the views' vectors (examples, width). The loss is the mean, over all 2 · examples
    views, of the cross-entropy of the partner among all other views, with cosines / ``temperature`` as logits.
    """
    views = F.normalize(torch.cat([first, second]), dim=1)
    logits = (views @ views.T / temperature).fill_diagonal_(float("-inf"))
    examples = len(first)
    partners = torch.arange(2 * examples, device=first.device).roll(examples)
    return F.cross_entropy(logits, partners)
