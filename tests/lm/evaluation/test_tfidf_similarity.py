"""Word counts as a baseline of how similar two texts are."""

from __future__ import annotations

import math
from collections import Counter

import pytest
from scipy.stats import pearsonr, spearmanr

from lm.data.examples import Example
from lm.evaluation.baselines import tfidf_similarity

TEXTS = [
    ("the old fox sleeps", "The fox sleeps", 4.0),
    ("the river is wide", "the the barn is old", 1.5),
    ("a sparrow sang again", "a horse again", 2.5),
    ("the market", "an owl", 0.0),
]


def cosine(first: dict[str, float], second: dict[str, float]) -> float:
    lengths = [math.sqrt(sum(value**2 for value in each.values())) for each in (first, second)]
    return sum(value * second.get(word, 0.0) for word, value in first.items()) / math.prod(lengths)


def test_the_correlation_is_that_of_the_cosines_of_tf_idf_by_hand():
    texts = [text.lower().split() for first, second, _ in TEXTS for text in (first, second)]
    containing = Counter(word for words in texts for word in set(words))
    weighted = [
        {
            word: (1 + math.log(count)) * (math.log((1 + len(texts)) / (1 + containing[word])) + 1)
            for word, count in Counter(words).items()
        }
        for words in texts
    ]
    cosines = [cosine(*weighted[n : n + 2]) for n in range(0, len(weighted), 2)]
    labels = [label for *_, label in TEXTS]
    found = tfidf_similarity([Example((first, second), label, "") for first, second, label in TEXTS])
    assert found["pearson"] == pytest.approx(pearsonr(cosines, labels).statistic)
    assert found["spearman"] == pytest.approx(spearmanr(cosines, labels).statistic)
