"""Logistic regression against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression as Reference

from lm.evaluation.logistic import LogisticRegression


@pytest.mark.parametrize("strength", [1e-3, 1.0, 100.0])
def test_probabilities_are_those_of_scikit_learn(strength):
    draw = np.random.default_rng(0)
    labels = draw.choice([0, 2, 5], 200)
    features = draw.standard_normal((200, 10)).astype(np.float32)
    features[:, 0] += labels
    ours = LogisticRegression(strength).fit(features[:150], labels[:150])
    reference = Reference(C=strength, max_iter=2000, tol=1e-8).fit(features[:150], labels[:150])
    assert ours.classes_.tolist() == [0, 2, 5]
    np.testing.assert_allclose(ours.predict_proba(features), reference.predict_proba(features), atol=2e-3)
    assert ours.coef_.shape == reference.coef_.shape
