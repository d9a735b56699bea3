"""The step of ``lm.inference.decoding`` as a CUDA graph for each of a few numbers of rows.

A graph repeats the same launches on the same tensors. So the shapes of a step do not depend on the texts: attention is
given all slots of the cache with the intervals that are filled, and a step of three rows is one of four, whose last row
sees and stores nothing. The step is written out for ``lm.kernels.decoding_step``: seven launches for each block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm import kernels
from lm.inference.kv_cache import KVCache
from lm.model.device import staged
from lm.model.transformer import Block, Transformer, rotary_frequencies

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


@dataclass(frozen=True)
class _Layer:
    """What a step needs of a block: its matrices (outputs, inputs) and the weights of its norms."""

    attention_norm: Tensor
    heads: Tensor  # queries, keys, values
    head_norms: tuple[Tensor, Tensor] | None  # of queries and keys
    output: Tensor
    feed_forward_norm: Tensor
    inner: Tensor  # gate, if any, and up
    down: Tensor


class GraphDecoder:
    """Decoding steps that replay what ``capture`` recorded for 1, 2, 4, 8, … rows, up to those of the cache.

    A row's logits have the same bits in every batch, where the kernels are Triton's.
    """

    def __init__(self, model: Transformer, cache: KVCache, capture: Capture) -> None:
        self._model, self._cache, device = model, cache, cache.stored.device
        self._layers = [_layer(cast(Block, block)) for block in model.blocks]
        self._frequencies = rotary_frequencies(model.config.head_width, model.config.rope_theta, device)
        most = len(cache.lengths)
        self.sizes = sorted({min(2**n, most) for n in range(most.bit_length() + 1)})
        # Of each row the token, its position, and how many slots of the cache it sees; all 0 in unused rows.
        self._inputs = {size: torch.zeros(3, size, dtype=torch.int32, device=device) for size in self.sizes}
        with torch.inference_mode():
            # Recorded with unused rows only, which change nothing in the cache.
            self._replays = {size: capture(self._pass_of(inputs)) for size, inputs in self._inputs.items()}

    def _pass_of(self, inputs: Tensor) -> Callable[[], Tensor]:
        """The forward pass over ``inputs`` (3, rows); its logits are (rows, vocabulary)."""
        model, config, epsilon = self._model, self._model.config, self._model.config.norm_epsilon

        def run() -> Tensor:
            tokens, positions, hi = inputs
            angles = positions[:, None, None] * self._frequencies
            cos, sin, lo = angles.cos(), angles.sin(), torch.zeros_like(hi)
            x = F.embedding(tokens, model.embedding.weight)
            for layer, stored in zip(self._layers, self._cache.stored, strict=True):
                qkv = kernels.few_rows_product(x, layer.heads, norm=layer.attention_norm, epsilon=epsilon)
                qkv = qkv.view(len(x), -1, config.head_width)
                q = kernels.rotate_and_store(qkv, cos, sin, positions, hi, stored, layer.head_norms, epsilon)
                keys, values = stored[:, : len(x)].transpose(2, 3)
                attended, _ = kernels.attention(q[:, None], keys, values, lo[:, None], hi[:, None])
                kernels.few_rows_product(attended.flatten(1), layer.output, residual=x)
                inner = kernels.few_rows_product(
                    x, layer.inner, norm=layer.feed_forward_norm, epsilon=epsilon, activation=config.activation
                )
                kernels.few_rows_product(inner, layer.down, residual=x)
            logits = kernels.few_rows_product(
                x, model.head_weight, norm=model.norm.weight, epsilon=epsilon, dtype=torch.float32
            )
            return model.softcapped(logits)

        return run

    def step(self, tokens: list[int]) -> Tensor:
        """Return logits (rows, vocabulary), float32, after one more token of each of the first rows.

        They are on the model's device; the caller may overwrite them, and the next step does.
        """
        rows, lengths, capacity = len(tokens), self._cache.lengths, self._cache.capacity
        size = next(size for size in self.sizes if size >= rows)
        used = [tokens, lengths[:rows], [min(length + 1, capacity) for length in lengths[:rows]]]
        padded = torch.tensor([each + [0] * (size - rows) for each in used], dtype=torch.int32)
        self._inputs[size].copy_(staged(padded, self._cache.stored.device), non_blocking=True)
        logits = self._replays[size]()[:rows]
        for row in range(rows):
            lengths[row] += 1
        return logits


def _layer(block: Block) -> _Layer:
    attention, feed_forward = block.attention, block.feed_forward
    norms = attention.query_norm, attention.key_norm
    return _Layer(
        block.attention_norm.weight,
        _joined(attention.query, attention.key, attention.value),
        None if norms[0] is None or norms[1] is None else (norms[0].weight, norms[1].weight),
        attention.output.weight,
        block.feed_forward_norm.weight,
        _joined(*(feed_forward.gate, feed_forward.up) if feed_forward.gated else (feed_forward.up,)),
        feed_forward.down.weight,
    )


@torch.no_grad()
def _joined(*layers: nn.Linear) -> Tensor:
    """The matrices of ``layers``, one below the other; theirs become views of it, so that it takes no memory."""
    whole = torch.cat([layer.weight for layer in layers])
    for layer, part in zip(layers, whole.split([len(layer.weight) for layer in layers]), strict=True):
        layer.weight.data = part
    return whole
