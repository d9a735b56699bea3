"""Baselines without a neural network: token frequencies and a compressor."""

from __future__ import annotations

import bz2
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import StoreError, UserError
from data_prep.shards.counts import token_counts
from data_prep.shards.tokens import Dataset
from lm.config.settings import Config
from lm.data.corpora import Corpora, open_corpora
from lm.data.examples import Example
from lm.finetuning.metrics import regression_metrics
from lm.objectives.text import bits_per_byte

READ_AT_ONCE = 1 << 22

Losses = dict[str, dict[str, float | None]]
Progress = Callable[[str], None]


def dataset_baselines(dataset: Dataset | Corpora) -> Losses:
    """Return ``baseline_losses`` on the validation split of a dataset."""
    validation = dataset.split("validation")
    costs = token_costs(token_counts(dataset.split("train"), dataset.vocab_size))
    counts = token_counts(validation, dataset.vocab_size)
    blocks = pairwise([*range(0, validation.tokens, READ_AT_ONCE), validation.tokens])
    text = (dataset.tokenizer.decode_bytes(validation.read(*block).tolist()) for block in blocks)
    return baseline_losses(counts, costs, compressed_bytes(text), validation.counted_bytes)


def compressor_bits(dataset: Dataset | Corpora, most_tokens: int = 1 << 20) -> float:
    """Return the bits per byte of ``bz2 -9`` on the first ``most_tokens`` of the validation split."""
    validation = dataset.split("validation")
    text = dataset.tokenizer.decode_bytes(validation.read(0, min(most_tokens, validation.tokens)).tolist())
    return 8 * compressed_bytes([text]) / len(text)


def baseline_losses(
    counts: NDArray[np.int64], costs: NDArray[np.float64] | None, compressed: int, text_bytes: int
) -> Losses:
    """Return ``nats_per_token`` (None: it does not model tokens) and ``bits_per_byte`` of each baseline on a text.

    ``unigram`` knows only the frequency of each token in the training text: ``counts`` are those of the text, ``costs``
    as of ``token_costs``, both (vocabulary,); without costs it is omitted. ``bz2 -9`` compresses the text by itself, to
    ``compressed`` bytes.
    """
    losses: Losses = {}
    if costs is not None:
        nats = float(counts @ costs)
        per_token, bits = nats / int(counts.sum()), bits_per_byte(nats, text_bytes)
        losses["unigram"] = {"nats_per_token": per_token, "bits_per_byte": bits}
    losses["bz2 -9"] = {"nats_per_token": None, "bits_per_byte": 8 * compressed / text_bytes}
    return losses


def unigram_costs(config: Config, progress: Progress) -> NDArray[np.float64] | None:
    """Return ``token_costs`` of a run's training text; None, reported to ``progress``, if its data is gone.

    Raises StoreError if it is in a store that cannot be read.
    """
    try:
        corpora = open_corpora(config.data.data, config.data.access)
    except StoreError:
        raise
    except UserError as missing:
        progress(f"no unigram baseline: {missing}")
        return None
    return token_costs(token_counts(corpora.split("train"), config.model.vocab_size))


def token_costs(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the cost of each token in nats, (vocabulary,), by its frequency with add-one smoothing."""
    smoothed = counts + 1
    return math.log(smoothed.sum()) - np.log(smoothed)


def unigram_likelihoods(costs: NDArray[np.float64], texts: Sequence[Sequence[int]]) -> NDArray[np.float64]:
    """Return the log-likelihood of texts, in nats, from the costs of their tokens alone: (texts,)."""
    return np.array([-costs[text].sum() for text in texts])


def compressed_bytes(text: Iterable[bytes]) -> int:
    """Return the size of a text, given in parts, after ``bz2 -9``."""
    compressor = bz2.BZ2Compressor(9)
    return sum(len(compressor.compress(part)) for part in text) + len(compressor.flush())


def tfidf_similarity(pairs: Sequence[Example]) -> dict[str, float]:
    """As of ``lm.finetuning.contrastive_task.similarity``, with the cosine of counted words in place of embeddings.

    Words are weighted by how few of these texts have them (TF-IDF).
    """
    from sklearn.feature_extraction.text import TfidfVectorizer

    counting = TfidfVectorizer(sublinear_tf=True, token_pattern=r"(?u)\w+|[^\w\s]")
    counting.fit(text for pair in pairs for text in pair.texts)
    first, second = (counting.transform(texts) for texts in zip(*(pair.texts for pair in pairs), strict=True))
    cosines = np.asarray(first.multiply(second).sum(1)).ravel()
    return regression_metrics(np.array([pair.label for pair in pairs]), cosines)
