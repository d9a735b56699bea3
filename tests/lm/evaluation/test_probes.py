from __future__ import annotations

import numpy as np
import pytest

from lm.evaluation.probes import Target, linear, majority, nearest, tfidf

CLASSES = Target(np.array([0] * 60 + [1] * 40), 2, "accuracy")


def clouds(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Three clouds in ten dimensions, two of one class: no line tells the classes apart, neighbors do."""
    draw = np.random.default_rng(seed)
    cloud = draw.integers(0, 3, count)
    centres = np.zeros((3, 10), dtype=np.float32)
    centres[:, 0] = (-4, 0, 4)
    centres[:, 1] = (2, 6, 2)
    vectors = centres[cloud] + draw.standard_normal((count, 10)).astype(np.float32)
    return vectors, (cloud == 1).astype(np.int64)


def test_the_majority_answers_with_the_shares_of_the_classes_or_the_mean():
    found = majority(CLASSES, 3)
    assert found.outputs.tolist() == [[0.6, 0.4]] * 3
    assert found.parameters == 0
    assert majority(Target(np.array([1.0, 4.0]), 0, "pearson"), 2).outputs.tolist() == [2.5, 2.5]


def test_tfidf_learns_which_words_matter():
    draw = np.random.default_rng(0)
    words = ["owl", "river", "key", "coat", "apple"]

    def texts(count):
        label = draw.integers(0, 2, count)
        made = [(" ".join([*draw.choice(words, 4), "good" if each else "bad", "?"]),) for each in label]
        return made, label

    (train, values), (test, truth) = texts(120), texts(50)
    found = tfidf(train, Target(values, 2, "accuracy"), test, 0)
    assert (found.outputs.argmax(1) == truth).all()
    assert found.parameters > 10
    assert found.outputs.sum(1) == pytest.approx(1)
    assert found.chosen.startswith("C ")


def test_tfidf_of_a_pair_sees_how_much_the_two_share():
    draw = np.random.default_rng(0)
    words = [f"word{n}" for n in range(30)]

    def pairs(count):
        same = draw.integers(0, 6, count)
        first = [draw.choice(words, 5, replace=False).tolist() for _ in range(count)]
        second = [[*f[:s], *draw.choice(["x", "y", "z"], 5 - s)] for f, s in zip(first, same, strict=True)]
        return [(" ".join(f), " ".join(s)) for f, s in zip(first, second, strict=True)], same.astype(np.float64)

    (train, values), (test, truth) = pairs(300), pairs(80)
    found = tfidf(train, Target(values, 0, "pearson"), test, 0)
    assert np.corrcoef(found.outputs, truth)[0, 1] > 0.9
    assert found.chosen.startswith("alpha ")


def test_neighbors_see_what_no_line_does():
    (train, values), (test, truth) = clouds(400, 1), clouds(300, 2)
    target = Target(values, 2, "accuracy")
    found = nearest(train[:, :1], target, test[:, :1], 0)  # the cosine of one number is its sign
    assert (found.outputs.argmax(1) == truth).mean() < 0.8
    found = nearest(train, target, test, 0)
    assert (found.outputs.argmax(1) == truth).mean() > 0.9
    assert found.parameters == 0
    assert int(found.chosen.removeprefix("k ")) > 1


def test_a_linear_probe_does_not_care_how_features_are_scaled():
    (train, values), (test, truth) = clouds(400, 1), clouds(300, 2)
    target = Target(values, 2, "accuracy")
    scale, shift = np.float32(10.0) ** np.arange(-3, 7, dtype=np.float32), np.float32(7)
    train[:, -1] = test[:, -1] = 3  # constant
    found = linear(train, target, test, 0)
    assert (found.outputs.argmax(1) == truth).mean() > 0.9
    assert found.parameters == 11
    assert np.abs(linear(train * scale + shift, target, test * scale + shift, 0).outputs - found.outputs).max() < 0.02


def test_a_linear_probe_of_numbers_finds_a_line():
    draw = np.random.default_rng(0)
    train, test = (draw.standard_normal((200, 5)).astype(np.float32) for _ in range(2))
    weights = np.array([1, -2, 0, 3, 0.5])
    found = linear(train, Target(train @ weights + 7, 0, "pearson"), test, 0)
    assert np.abs(found.outputs - (test @ weights + 7)).max() < 0.05


def test_only_training_examples_choose_and_the_seed_decides_which():
    (train, values), (test, _) = clouds(60, 1), clouds(40, 2)
    noisy = np.where(np.random.default_rng(3).random(60) < 0.3, 1 - values, values)
    target = Target(noisy, 2, "accuracy")
    chosen = {seed: nearest(train, target, test, seed).chosen for seed in range(8)}
    assert len(set(chosen.values())) > 1
    assert nearest(train, target, test[:1], 3).chosen == chosen[3]


def test_a_class_that_is_too_rare_to_be_held_out_is_still_answered():
    vectors = np.eye(4, dtype=np.float32)
    for probe in (nearest, linear):
        found = probe(vectors, Target(np.array([0, 0, 0, 2]), 3, "accuracy"), vectors, 0)
        assert found.outputs.shape == (4, 3)
        assert (found.outputs[:, 1] == 0).all()
