"""The keys and values of tokens already read, for several texts of different lengths at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lm.config.model_settings import ModelConfig
from lm.kernels import masks


@dataclass
class KVCache:
    """The last ``capacity`` tokens of each row.

    Token n of a row is in slot n % capacity: from ``capacity`` on, each token replaces the one that has just left the
    window. Keys include their rotary position, so the order of the slots does not matter.

    ``stored`` is (layers, 2, rows, key-value heads, capacity, head width), keys before values; ``lengths`` counts the
    tokens that each row has read, including those replaced since.
    """

    stored: Tensor
    lengths: list[int]

    @classmethod
    def empty(cls, config: ModelConfig, rows: int, capacity: int, like: Tensor) -> KVCache:
        """Return an empty cache with the dtype and device of ``like``; on a CPU, memory is allocated as it fills."""
        shape = (config.num_layers, 2, rows, config.key_value_heads, capacity, config.head_width)
        if like.device.type == "cpu" and like.dtype == torch.float32:
            # NumPy allocates pages that take memory only once they are written to.
            return cls(torch.from_numpy(np.zeros(shape, dtype=np.float32)), [0] * rows)
        return cls(like.new_zeros(shape), [0] * rows)

    @property
    def capacity(self) -> int:
        return self.stored.shape[4]

    def move(self, source: int, target: int) -> None:
        """Overwrite row ``target`` with row ``source``."""
        filled = min(self.lengths[source], self.capacity)
        self.stored[:, :, target, :, :filled] = self.stored[:, :, source, :, :filled]
        self.lengths[target] = self.lengths[source]


class ReadingPrompt:
    """A forward pass of ``Transformer`` over the next ``count`` tokens of one row, ``inputs`` (1, count)."""

    def __init__(self, cache: KVCache, row: int, count: int) -> None:
        self._cache, self._row, self._count = cache, row, count
        length, device = cache.lengths[row], cache.stored.device
        past = min(length, cache.capacity)
        # The slots of the past in text order, and the slots that the new tokens take.
        self._past = torch.arange(length - past, length, device=device) % cache.capacity
        self._kept = min(count, cache.capacity)
        self._slots = torch.arange(length + count - self._kept, length + count, device=device) % cache.capacity
        self.positions = torch.arange(length, length + count, device=device)[None]
        lo, hi = masks.causal(1, count, past=past, device=device)
        self.lo, self.hi = masks.sliding_window(lo, hi, cache.capacity, past=past)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (1, count, heads, width); return all that are visible."""
        row = self._cache.stored[layer, :, self._row]  # (2, heads, capacity, width)
        past = row[:, :, self._past].transpose(1, 2)
        seen = torch.cat((past, torch.cat((k, v))), dim=1)
        row[:, :, self._slots] = seen[:, -self._kept :].transpose(1, 2)
        return seen[:1], seen[1:]

    def done(self) -> None:
        self._cache.lengths[self._row] += self._count


class WritingTokens:
    """A forward pass of ``Transformer`` over one token of each of the first ``rows`` rows, ``inputs`` (rows, 1)."""

    def __init__(self, cache: KVCache, rows: int) -> None:
        self._cache, self._rows = cache, torch.arange(rows, device=cache.stored.device)
        self.positions = torch.tensor(cache.lengths[:rows], device=cache.stored.device)[:, None]
        self._slots = self.positions[:, 0] % cache.capacity
        self.hi = (self.positions + 1).clamp(max=cache.capacity).to(torch.int32)
        self.lo = torch.zeros_like(self.hi)
        self._filled = min(max(cache.lengths[:rows]) + 1, cache.capacity)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (rows, 1, heads, width); return all that are visible."""
        stored = self._cache.stored[layer]
        stored[:, self._rows, :, self._slots] = torch.cat((k, v), dim=1)  # (rows, 2, heads, width)
        keys, values = stored[:, : len(self._rows), :, : self._filled].transpose(2, 3)
        return keys, values

    def done(self) -> None:
        for row in range(len(self._rows)):
            self._cache.lengths[row] += 1
