"""Heads on features: what an objective that compares views, or predicts codes, adds to the trunk.

They own the norm of the features.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.model.transformer import RMSNorm


class ProjectionHead(nn.Module):
    """Norm and two layers (Chen et al. 2020, SimCLR, section 4.2), from features (…, width) to (…, size)."""

    def __init__(self, width: int, hidden: int, size: int, epsilon: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, epsilon)
        self.first = nn.Linear(width, hidden, bias=False)
        self.second = nn.Linear(hidden, size, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        return self.second(F.relu(self.first(self.norm(features))))


class PredictionHead(ProjectionHead):
    """A projection, and what predicts another view's projection from it (Grill et al. 2020, BYOL, section 3.1)."""

    def __init__(self, width: int, hidden: int, size: int, epsilon: float) -> None:
        super().__init__(width, hidden, size, epsilon)
        self.prediction = ProjectionHead(size, hidden, size, epsilon)

    def forward(self, features: Tensor) -> Tensor:
        return self.prediction(super().forward(features))


class PrototypeHead(nn.Module):
    """Norm, three layers, and cosines with prototypes (Caron et al. 2021, DINO, section 3.1 and appendix C).

    From features (…, width) to (…, prototypes), in float32. ``bottleneck`` is the width that is compared.
    """

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int, epsilon: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, epsilon)
        self.first = nn.Linear(width, hidden, bias=False)
        self.second = nn.Linear(hidden, hidden, bias=False)
        self.third = nn.Linear(hidden, bottleneck, bias=False)
        self.prototypes = nn.Parameter(torch.zeros(prototypes, bottleneck))

    def forward(self, features: Tensor, *, frozen: bool = False) -> Tensor:
        """``frozen``: the prototypes' gradient is zero."""
        x = self.third(F.gelu(self.second(F.gelu(self.first(self.norm(features)))))).float()
        with torch.autocast(features.device.type, enabled=False):
            prototypes = self.prototypes.detach() + 0 * self.prototypes if frozen else self.prototypes
            return F.normalize(x, dim=-1) @ F.normalize(prototypes.float(), dim=-1).T


class MaskingPrototypeHead(PrototypeHead):
    """As ``PrototypeHead``, with the vector ``mask`` (1, width) that replaces a hidden patch in front of the trunk."""

    def __init__(self, width: int, hidden: int, bottleneck: int, prototypes: int, epsilon: float) -> None:
        super().__init__(width, hidden, bottleneck, prototypes, epsilon)
        self.mask = nn.Parameter(torch.zeros(1, width))


class CodePredictor(nn.Module):
    """BEiT's head (Bao et al. 2021, section 2.3): a norm, and the matrix ``codes`` that scores codes.

    ``mask``, (1, width), stands for each hidden patch in what the trunk reads.
    """

    def __init__(self, width: int, codes: int, epsilon: float) -> None:
        super().__init__()
        self.norm = RMSNorm(width, epsilon)
        self.mask = nn.Parameter(torch.zeros(1, width))
        self.codes = nn.Linear(width, codes, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """What ``codes`` scores, (…, width), of hidden states of the same shape."""
        return self.norm(hidden)
