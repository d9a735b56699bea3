from __future__ import annotations

import sys

import numpy as np
import pytest

from data_prep.errors import UserError
from lm.finetuning.metrics import calibration, classification_metrics, confusion_matrix, regression_metrics


def test_metrics_of_two_classes_are_those_of_their_formulas():
    # 3 true positives, 1 false positive, 2 false negatives, 4 true negatives
    truth, predicted = np.array([1] * 5 + [0] * 5), np.array([1, 1, 1, 0, 0, 1, 0, 0, 0, 0])
    found = classification_metrics(truth, predicted, 2)
    f1, other = 2 * 3 / (2 * 3 + 1 + 2), 2 * 4 / (2 * 4 + 2 + 1)
    assert found == pytest.approx(
        {
            "accuracy": 0.7,
            "f1": f1,
            "macro_f1": (f1 + other) / 2,
            "matthews": (3 * 4 - 1 * 2) / (4 * 5 * 5 * 6) ** 0.5,
        }
    )


def test_a_constant_answer_has_no_correlation_and_a_class_without_examples_an_f1_of_zero():
    found = classification_metrics(np.array([0, 1, 2]), np.array([0, 0, 0]), 4)
    assert found == pytest.approx({"accuracy": 1 / 3, "macro_f1": 0.5 / 4, "matthews": 0.0})
    assert regression_metrics(np.array([1.0, 2.0]), np.array([3.0, 3.0])) == {"pearson": 0.0, "spearman": 0.0}


def test_spearman_is_pearson_of_the_ranks():
    truth = np.array([0.0, 1.0, 2.0, 3.0, 10.0])
    predicted = np.exp(truth)
    found = regression_metrics(truth, predicted)
    assert found["spearman"] == pytest.approx(1.0)
    assert found["pearson"] == pytest.approx(np.corrcoef(truth, predicted)[0, 1])


def test_the_confusion_matrix_has_the_truth_in_its_rows():
    truth, predicted = np.array([0, 0, 1, 2]), np.array([0, 1, 1, 0])
    assert confusion_matrix(truth, predicted, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 0]]


def test_calibration_bins_hold_what_was_predicted_and_what_came_true():
    confident = np.array([[0.95, 0.05]] * 4 + [[0.4, 0.6]] * 2)
    bins, error = calibration(confident, np.array([0, 0, 0, 1, 1, 0]))
    assert [(b.confidence, b.accuracy, b.examples) for b in bins] == [
        (pytest.approx(0.6), 0.5, 2),
        (pytest.approx(0.95), 0.75, 4),
    ]
    assert error == pytest.approx((2 * 0.1 + 4 * 0.2) / 6)


def test_predictions_drawn_from_their_own_probabilities_are_calibrated():
    draw = np.random.default_rng(0)
    sure = draw.random(20_000)
    truth = (draw.random(20_000) < sure).astype(np.int64)
    assert calibration(np.stack([1 - sure, sure], 1), truth)[1] < 0.02
    assert calibration(np.array([[0.0, 1.0]]), np.array([1]))[1] == 0.0  # a confidence of 1 is in the last bin


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r"kindling-lm\[tasks\]"):
        regression_metrics(np.zeros(2), np.zeros(2))
