from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner
from scipy.linalg import sqrtm

from data_prep.errors import UserError
from lm.cli.main import main
from lm.inference.embedding import Reading, all_vectors, whitened
from lm.inference.whitening import LEAST_VARIANCE, fit_whitening
from tests.conftest import loaded

WORDS = ["the", "old", "miller", "found", "a", "silver", "key", "winter", "coat", "before", "rain", "captain", "owl"]


def drawn(count: int = 500, width: int = 6, seed: int = 0) -> np.ndarray:
    """Vectors with a large mean and correlated numbers."""
    draw = np.random.default_rng(seed)
    return (draw.normal(size=(count, width)) @ draw.normal(size=(width, width)) + 5).astype(np.float32)


def texts(count: int) -> list[str]:
    draw = np.random.default_rng(0)
    return [" ".join(draw.choice(WORDS, draw.integers(2, 9))) for _ in range(count)]


def test_whitened_vectors_have_mean_zero_and_the_identity_as_covariance():
    vectors = drawn()
    whitening = fit_whitening(np.array_split(vectors, 7))
    found = whitening(vectors)
    assert found.dtype == np.float32
    assert np.abs(found.mean(0)).max() < 1e-5
    assert np.abs(np.cov(found.T, bias=True) - np.eye(6)).max() < 1e-5
    covariance = np.cov(vectors.T.astype(np.float64), bias=True)
    assert np.abs(whitening.matrix - np.linalg.inv(sqrtm(covariance).real)).max() < 1e-5


def test_the_parts_in_which_vectors_come_make_no_difference():
    vectors = drawn()
    one, many = fit_whitening([vectors]), fit_whitening(np.array_split(vectors, 100))
    assert np.abs(one.matrix - many.matrix).max() < 1e-9


def test_a_direction_without_variance_is_not_blown_up():
    vectors = np.column_stack([drawn(), np.full(500, 3.0, np.float32)])
    whitening = fit_whitening([vectors])
    assert np.isfinite(whitening.matrix).all()
    largest = np.linalg.eigvalsh(np.cov(vectors.T.astype(np.float64), bias=True))[-1]
    assert np.abs(whitening.matrix).max() <= (LEAST_VARIANCE * largest) ** -0.5 * 1.001


def test_too_few_texts_and_equal_ones_are_refused():
    with pytest.raises(UserError, match="more texts than a vector has numbers: there are 6 for 6 numbers"):
        fit_whitening([drawn(6)])
    with pytest.raises(UserError, match="there are no texts to whiten by"):
        fit_whitening([])
    with pytest.raises(UserError, match="all have the same vector"):
        fit_whitening([np.ones((20, 3), np.float32)])


def test_a_model_whitens_by_the_texts_that_it_is_given(trained):
    model, known = loaded(trained), texts(100)
    plain, _ = all_vectors(model, [(text,) for text in known], Reading("bidirectional", "mean"))
    wanted = fit_whitening([plain])(plain)
    reading = whitened(Reading("bidirectional", "mean", normalize=True), model, [(text,) for text in known])
    found, _ = all_vectors(model, [(text,) for text in known], reading)
    assert np.abs(found - wanted / np.linalg.norm(wanted, axis=1, keepdims=True)).max() < 1e-4
    assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5


def test_commands_whiten_by_a_file(trained, tmp_path):
    known, rated, pairs = tmp_path / "known.txt", tmp_path / "rated.jsonl", tmp_path / "pairs.jsonl"
    known.write_text("\n".join(texts(120)) + "\n")
    some = texts(120)
    rows = [{"text": some[n], "text_pair": some[n + 1], "label": n % 5} for n in range(0, 120, 2)]
    rated.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs.write_text("".join(json.dumps({"text": row["text"], "text_pair": row["text_pair"]}) + "\n" for row in rows))

    def call(*arguments: object, status: int = 0):
        done = CliRunner().invoke(main, [str(each) for each in arguments])
        assert done.exit_code == status, done.output
        return done

    told = call("embed", trained.path, "--input", known, "--whiten", known, "--output", tmp_path / "a.npy")
    assert f"mean of layer 2, whitened by {known}" in told.stderr
    vectors = np.load(tmp_path / "a.npy")
    assert np.abs(vectors.mean(0)).max() < 1e-3
    plain, white, split = (
        json.loads(call("evaluate", trained.path, "--similarity", rated, "--json", *more).stdout)
        for more in ((), ("--whiten", known), ("--whiten", pairs))
    )
    assert plain["spearman"] != white["spearman"]
    assert white["spearman"] == pytest.approx(split["spearman"], abs=1e-6)  # the texts of a pair count one by one
    for arguments, message in (
        (("embed", trained.path, "--input", known, "--output", "-", "--whiten", "-"), "not standard input"),
        (("embed", trained.path, "--input", known, "--output", "-", "--whiten", tmp_path / "no.txt"), "no file"),
        (("evaluate", trained.path, "--whiten", known), "--whiten is for the vectors of --similarity"),
    ):
        assert message in call(*arguments, status=2).stderr
    short = tmp_path / "short.txt"
    short.write_text("an owl\nthe rain\n")
    told = call("embed", trained.path, "--input", known, "--whiten", short, "--output", tmp_path / "b.npy", status=2)
    assert "there are 2 for 32 numbers" in told.stderr
    assert not (tmp_path / "b.npy").exists()
