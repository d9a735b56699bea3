"""How often each token occurs."""

from __future__ import annotations

from typing import Protocol

import numpy as np

COUNTED_TOKENS = 1 << 22  # at a time


class TokenStream(Protocol):
    """Tokens that can be read like a ``Split``."""

    tokens: int

    def read(self, start: int, stop: int) -> np.ndarray: ...


def token_counts(split: TokenStream, vocab_size: int) -> np.ndarray:
    """Count how often each token occurs: int64, shape ``(vocab_size,)``. Reads the split block by block."""
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, split.tokens, COUNTED_TOKENS):
        counts += np.bincount(split.read(start, min(start + COUNTED_TOKENS, split.tokens)), minlength=vocab_size)
    return counts
