"""Baselines: what the frequency of tokens, and a compressor, reach without a neural network."""

from __future__ import annotations

import bz2
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.shards.tokens import Dataset, Split, token_counts
from lm.data.corpora import Corpora, JoinedSplit, open_corpora
from lm.runs.directory import Run

READ_AT_ONCE = 1 << 22


def floors(dataset: Dataset | Corpora) -> dict[str, tuple[float | None, float]]:
    """Losses on the validation split that need no neural network: (nats per token, bits per byte).

    ``unigram`` knows how often each token occurs in the training split (plus one). ``bz2 -9`` compresses the
    validation text by itself.
    """
    validation = dataset.split("validation")
    counts = token_counts(dataset.split("train"), dataset.vocab_size) + 1
    costs = math.log(counts.sum()) - np.log(counts)
    nats = float(token_counts(validation, dataset.vocab_size) @ costs)
    return {
        "unigram": (nats / validation.tokens, nats / math.log(2) / validation.text_bytes),
        "bz2 -9": (None, 8 * compressed_bytes(dataset, validation) / validation.text_bytes),
    }


def compressed_bytes(dataset: Dataset | Corpora, split: Split | JoinedSplit) -> int:
    """Size of the split's text after ``bz2 -9``, its documents one after another."""
    compressor, size = bz2.BZ2Compressor(9), 0
    for start in range(0, split.tokens, READ_AT_ONCE):
        tokens = split.read(start, min(start + READ_AT_ONCE, split.tokens)).tolist()
        size += len(compressor.compress(dataset.tokenizer.decode_bytes(tokens)))
    return size + len(compressor.flush())


def _unigram(run: Run, counts: np.ndarray, progress: Callable[[str], None]) -> float | None:
    """Nats of tokens by how common they are in the run's training text (plus one); None where that is gone."""
    try:
        corpora = open_corpora(run.config.data.data)
    except UserError as missing:
        progress(f"no unigram floor: {missing}")
        return None
    trained = token_counts(corpora.split("train"), len(counts)) + 1
    return float(counts @ (math.log(trained.sum()) - np.log(trained)))


def unigram_likelihoods(counts: NDArray[np.int64]) -> Callable[[list[list[int]]], NDArray[np.float64]]:
    """A floor: each token as likely as it is common in the training text (plus one), whatever stands beside it."""
    costs = np.log(counts + 1) - np.log((counts + 1).sum())
    return lambda texts: np.array([costs[text].sum() for text in texts])
