"""LoRA (Hu et al. 2021): a frozen matrix W becomes W + (alpha / rank) B A, with trainable B and A of low rank.

A parametrization of PyTorch computes that sum wherever the weight is used, so every kernel sees a plain matrix.
Merging keeps the last sum and does not change a bit of the model's outputs.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lm.config.finetune_settings import ATTENTION_MATRICES, FEED_FORWARD_MATRICES
from lm.model.image_transformer import Model


class LowRank(nn.Module):
    """Add (alpha / rank) B A to a matrix (outputs, inputs): A is (rank, inputs), B (outputs, rank) and initially 0."""

    def __init__(self, outputs: int, inputs: int, rank: int, alpha: float) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        self.scale = alpha / rank

    def forward(self, weight: Tensor) -> Tensor:
        return torch.addmm(weight, self.b.to(weight.dtype), self.a.to(weight.dtype), alpha=self.scale)


def add_lora(trunk: Model, rank: int, alpha: float, matrices: Sequence[str], seed: int) -> None:
    """Freeze the model and add LoRA to the ``matrices`` (names from ``LORA_MATRICES``) of each block.

    A is drawn from ``seed`` with variance 1 / inputs. The rank is at most the smaller side of a matrix. A block without
    a gate has one matrix fewer.
    """
    trunk.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for block in trunk.blocks:
        for part, names in ((block.attention, ATTENTION_MATRICES), (block.feed_forward, FEED_FORWARD_MATRICES)):
            for name in names:
                linear = getattr(part, name, None)
                if name in matrices and linear is not None:
                    outputs, inputs = linear.weight.shape
                    added = LowRank(outputs, inputs, min(rank, outputs, inputs), alpha)
                    with torch.no_grad():
                        added.a.copy_(torch.randn(added.a.shape, generator=generator) * inputs**-0.5)
                    parametrize.register_parametrization(linear, "weight", added)


def merge_lora(trunk: Model) -> None:
    """Replace LoRA's matrices by plain ones, in place; the model's outputs stay the same, bit for bit."""
    for module in list(trunk.modules()):
        if parametrize.is_parametrized(module):
            with torch.no_grad():
                parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
