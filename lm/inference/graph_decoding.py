"""The step of ``lm.inference.decoding`` as a CUDA graph for each of a few numbers of rows.

A graph repeats the same launches on the same tensors. So the shapes of a step do not depend on the texts: the lengths
are on the device, attention is given all slots of the cache with the intervals that are filled, and a step of three
rows is one of four, whose last row sees and stores nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lm.inference.kv_cache import KVCache
from lm.model.transformer import Transformer

UNUSED = -1  # the length of a row that belongs to no text

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]


class WritingInPlace:
    """As ``WritingTokens``, of rows that hold ``lengths`` (rows,) tokens, in shapes that do not depend on them."""

    def __init__(self, cache: KVCache, lengths: Tensor) -> None:
        self._cache, self._rows = cache, torch.arange(len(lengths), device=lengths.device)
        self.positions = lengths.clamp(min=0)[:, None]
        self._slots = self.positions[:, 0] % cache.capacity
        self.hi = (lengths[:, None] + 1).clamp(max=cache.capacity).to(torch.int32)  # nothing, in unused rows
        self.lo = torch.zeros_like(self.hi)
        self._used = (lengths != UNUSED)[:, None, None, None]

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (rows, 1, heads, width); return those of all slots."""
        stored = self._cache.stored[layer]
        before = stored[:, self._rows, :, self._slots]  # (rows, 2, heads, width)
        stored[:, self._rows, :, self._slots] = torch.where(self._used, torch.cat((k, v), dim=1), before)
        keys, values = stored[:, : len(self._rows)].transpose(2, 3)
        return keys, values


class GraphDecoder:
    """Decoding steps that replay what ``capture`` recorded for 1, 2, 4, 8, … rows, up to those of the cache."""

    def __init__(self, model: Transformer, cache: KVCache, capture: Capture) -> None:
        self._model, self._cache, device = model, cache, cache.stored.device
        most = len(cache.lengths)
        self.sizes = sorted({min(2**n, most) for n in range(most.bit_length() + 1)})
        self._inputs = {size: torch.full((2, size), UNUSED, device=device) for size in self.sizes}
        with torch.inference_mode():
            # Recorded with unused rows only, which change nothing in the cache.
            self._replays = {size: capture(self._pass_of(inputs)) for size, inputs in self._inputs.items()}

    def _pass_of(self, inputs: Tensor) -> Callable[[], Tensor]:
        """The forward pass over ``inputs`` (2, rows), tokens before lengths; its logits are (rows, vocabulary)."""

        def run() -> Tensor:
            tokens, lengths = inputs
            writing = WritingInPlace(self._cache, lengths)
            read = tokens.clamp(min=0)[:, None]
            hidden = self._model(read, writing.positions, writing.lo, writing.hi, writing)
            return self._model.logits(hidden[:, 0])

        return run

    def step(self, tokens: list[int]) -> Tensor:
        """Return logits (rows, vocabulary), float32, after one more token of each of the first rows.

        They are on the model's device; the caller may overwrite them, and the next step does.
        """
        rows = len(tokens)
        size = next(size for size in self.sizes if size >= rows)
        padding, lengths = [UNUSED] * (size - rows), self._cache.lengths
        self._inputs[size].copy_(torch.tensor([tokens + padding, lengths[:rows] + padding]))
        logits = self._replays[size]()[:rows]
        for row in range(rows):
            lengths[row] += 1
        return logits
