"""Keyed random numbers: every draw is a function of named integers, not of earlier draws.

So any row of any step can be reproduced, on any rank, after any restart.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

_GOLDEN = 0x9E3779B97F4A7C15
_ALL_BITS = (1 << 64) - 1


class Stream(IntEnum):
    """What a draw is for. It is part of the key, so that no two purposes share numbers.

    Never change the values: a run would resume with other draws than it started with.
    """

    ROW_ORDER = 0
    HIDDEN_TOKENS = 1
    FATE_OF_HIDDEN_TOKENS = 2
    RANDOM_TOKENS = 3
    VALIDATION_FOLDS = 4
    DROPOUT = 5
    CORPUS = 6
    EXAMPLE_ORDER = 7
    FINETUNING_DROPOUT = 8
    LORA = 9
    TASK_HEAD = 10
    VIEWS = 11
    HIDDEN_PATCHES = 12
    LOCAL_VIEWS = 13
    SPANS = 14
    DELETED_TOKENS = 15
    MIXTURE = 16
    PIECES = 17
    TEXT_MIXTURE = 18
    PREFIXES = 19
    INFILL = 20
    CORRUPTED_SPANS = 21
    DIFFUSION_RATES = 24
    DIFFUSED_TOKENS = 25
    DIFFUSION_BOUND = 26


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers, one to one (the finalizer of SplitMix64; Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def key(*parts: int) -> int:
    """One 64-bit seed from several integers."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = mix(state + np.uint64(_GOLDEN) ^ np.uint64(part & _ALL_BITS))
    return int(state[0])


def uniform(seed: int, rows: NDArray[np.int64], width: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), (len(rows), width); each row depends on ``seed`` and its row number only."""
    return uniform_at(seed, rows[:, None], np.arange(width))


def uniform_at(seed: int, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """The numbers of ``uniform`` at these rows and columns (which are broadcast), computed alone."""
    row_keys = mix(rows.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key(seed)))
    steps = (columns + 1).astype(np.uint64) * np.uint64(_GOLDEN)
    return (mix(row_keys + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def validation_fold(rows: NDArray[np.int64], columns: NDArray[np.int64], folds: int) -> NDArray[np.int64]:
    """Return the pass, from 0 to ``folds`` - 1, in which a masked readout hides these tokens (broadcast)."""
    return (uniform_at(key(0, Stream.VALIDATION_FOLDS), rows, columns) * folds).astype(np.int64)


def permuted(numbers: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Where a keyed permutation of ``range(size)`` sends ``numbers``, without building the permutation.

    A four-round Feistel network on the smallest even number of bits that covers ``size``, walked along its cycle until
    it lands inside (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", cycle walking).
    """
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    round_keys = [np.uint64(key(seed, r)) for r in range(4)]
    result = numbers.astype(np.uint64)
    outside = np.ones(len(result), dtype=bool)
    while outside.any():
        left, right = result[outside] >> np.uint64(half), result[outside] & low
        for round_key in round_keys:
            left, right = right, left ^ (mix(right ^ round_key) & low)
        result[outside] = left << np.uint64(half) | right
        outside = result >= size
    return result.astype(np.int64)
