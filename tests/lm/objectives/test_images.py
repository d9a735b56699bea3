"""What validations tell of features, against closed forms and brute force."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from lm.data.image_corpora import ImageCorpora, with_images
from lm.data.training_data import validation_rows
from lm.inference.image_embedding import image_vectors
from lm.objectives.images import NEIGHBORS, feature_health, nearest_classes
from lm.objectives.objective import open_objective
from lm.training.distributed import Ranks
from lm.training.validation import LossMeasure, validate_readouts

DRAW = np.random.default_rng(0)


def test_orthonormal_vectors_have_full_rank_and_nearly_full_spread():
    vectors = np.linalg.qr(DRAW.standard_normal((16, 16)))[0].astype(np.float32)
    assert feature_health(vectors)["effective_rank"] == pytest.approx(16, rel=1e-6)
    # A coordinate of the unit vectors is 1 once and else 0: its variance is 1/n - 1/n².
    assert feature_health(np.eye(16, dtype=np.float32))["spread"] == pytest.approx(math.sqrt(1 - 1 / 16), rel=1e-6)


def test_equal_vectors_have_no_spread_and_rank_one():
    found = feature_health(np.tile(DRAW.standard_normal(8).astype(np.float32), (20, 1)))
    assert found["spread"] == pytest.approx(0, abs=1e-7)
    assert found["effective_rank"] == pytest.approx(1, rel=1e-4)
    assert feature_health(np.zeros((5, 4), dtype=np.float32)) == {"spread": 0.0, "effective_rank": 1.0}


def test_effective_rank_is_the_exponential_of_the_entropy_of_singular_values():
    vectors = np.zeros((6, 4), dtype=np.float32)
    vectors[0, 0], vectors[1, 1] = 3, 1
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert feature_health(vectors)["effective_rank"] == pytest.approx(math.exp(entropy), rel=1e-6)


def test_spread_does_not_depend_on_the_length_of_vectors():
    vectors = DRAW.standard_normal((50, 8)).astype(np.float32)
    longer = vectors * DRAW.uniform(0.1, 10, (50, 1)).astype(np.float32)
    assert feature_health(longer)["spread"] == pytest.approx(feature_health(vectors)["spread"], rel=1e-5)


def voted(among: np.ndarray, labels: np.ndarray, vector: np.ndarray, classes: int) -> int:
    """Weighted k-NN, one neighbor at a time, in float64."""
    among, vector = among.astype(np.float64), vector.astype(np.float64)
    cosines = [float(each @ vector / math.sqrt((each @ each) * (vector @ vector))) for each in among]
    votes = [0.0] * classes
    for cosine, label in sorted(zip(cosines, labels.tolist(), strict=True), reverse=True)[:NEIGHBORS]:
        votes[label] += math.exp(cosine / 0.1)
    return votes.index(max(votes))


@pytest.mark.parametrize("count", [7, 200])
def test_the_nearest_vectors_vote_as_by_brute_force(count):
    among, vectors = (DRAW.standard_normal((n, 6)).astype(np.float32) for n in (count, 40))
    labels = DRAW.integers(0, 4, count)
    expected = [voted(among, labels, vector, 4) for vector in vectors]
    assert len(set(expected)) > 1
    assert nearest_classes(among, labels, vectors, 4).tolist() == expected


def test_many_vectors_vote_in_bounded_memory():
    among, vectors = (DRAW.standard_normal((n, 4)).astype(np.float32) for n in (500, 9000))
    labels = DRAW.integers(0, 4, 500)
    tracemalloc.start()
    found = nearest_classes(among, labels, vectors, 4)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 9000 * 500 * 4, "the cosines of all are never in memory"
    some = [0, 1023, 1024, 8999]
    assert found[some].tolist() == [voted(among, labels, vectors[n], 4) for n in some]


@pytest.mark.parametrize("objective", ["simclr", "mae"])
def test_a_validation_tells_of_the_features_that_are_embedded_later(pictures, seeing, objective):
    corpora = ImageCorpora([pictures])
    config = with_images(seeing.replace(objective=objective, validation_rows=0), corpora)
    method = open_objective(config, corpora.format)
    model = method.new_model().initialize(0, identity=False)
    found = validate_readouts(model, corpora, config, objective=method)[objective]
    model.eval()
    train, held_out = (pictures.split(name) for name in ("train", "validation"))
    among, vectors = (image_vectors(model, pictures.format, [s.read(np.arange(s.count))]) for s in (train, held_out))
    for name, value in feature_health(vectors).items():
        assert found[name] == pytest.approx(value, rel=1e-4)
    right = [voted(among, train.labels, v, 3) == label for v, label in zip(vectors, held_out.labels, strict=True)]
    assert found["knn_accuracy"] == pytest.approx(sum(right) / len(right))
    assert found["images"] == held_out.count


@pytest.mark.parametrize("objective", ["simclr", "mae"])
def test_a_validation_gives_the_same_numbers_whatever_the_micro_batch(pictures, seeing, objective):
    corpora = ImageCorpora([pictures])
    config = with_images(seeing.replace(objective=objective), corpora)
    method = open_objective(config, corpora.format)
    model = method.new_model().initialize(0, identity=False)
    held_out = validation_rows(corpora, config)
    found = []
    for rows in (2, 5, 12):
        changed = config.replace(micro_batch_rows=rows)
        measure = LossMeasure(model, method, changed, Ranks(torch.device("cpu")))
        found.append(method.validate(held_out, measure, rows=8, every_token=False)[objective])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
