"""A model's weights in bfloat16, rounded once, for generating text on a GPU."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lm import kernels
from lm.model.transformer import Cache, Transformer


class LowPrecisionTransformer(Transformer):
    """What ``model`` computes under autocast, but with each matrix cast to bfloat16 once and not at every step.

    Norms, rotary positions, softmax, the residual stream and the embedding stay in float32, and so do the logits, which
    autocast would round. The embedding and the norms are those of ``model``; the matrices, the head among them, take
    half as much memory as its own, in addition.
    """

    def __init__(self, model: Transformer) -> None:
        with torch.device("meta"):
            super().__init__(replace(model.config, tie_embeddings=False))
        weights = model.state_dict() | {"head.weight": model.head_weight.detach()}
        low = {name: weights[name] for name in self.state_dict()}
        low |= {
            name: weight.bfloat16() for name, weight in low.items() if weight.ndim > 1 and name != "embedding.weight"
        }
        self.load_state_dict(low, assign=True)
        self.eval()

    def forward(self, inputs: Tensor, positions: Tensor, lo: Tensor, hi: Tensor, cache: Cache | None = None) -> Tensor:
        with torch.autocast(inputs.device.type, torch.bfloat16):
            return super().forward(inputs, positions, lo, hi, cache)

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores (rows, vocab_size), float32, of hidden states (rows, hidden)."""
        return self.softcapped(kernels.few_rows_product(hidden, self.head_weight, dtype=torch.float32))
