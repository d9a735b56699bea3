from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.config.objective_settings import IMAGE_OBJECTIVES, OBJECTIVES
from lm.config.settings import Config
from lm.data.batch import IGNORED, TENSORS, Batch, Vocabulary, rows_of_windows
from lm.kernels import masks
from lm.objectives.objective import open_objective
from lm.objectives.text import TextObjective, masked_rows, validation_batch
from tests.conftest import masked_rows_of

VOCABULARY = Vocabulary(size=50, end_of_text=0, mask=2, infill=(1, 1, 1))


def windows_of(rows: int, length: int, seed: int = 0, *, ends: float = 0.1) -> np.ndarray:
    """(rows, length + 1) tokens from 3 up, a share of them replaced by the end of text."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(3, VOCABULARY.size, (rows, length + 1))
    return np.where(draw.random(tokens.shape) < ends, VOCABULARY.end_of_text, tokens)


def batch_of(windows: np.ndarray, objective: str, seed: int = 0, first: int = 0, **changes) -> Batch:
    numbers = np.arange(first, first + len(windows))
    config = Config().replace(objective=objective, seed=seed, **changes)
    rows = replace(rows_of_windows(windows, VOCABULARY), numbers=numbers, turns=numbers)
    return open_objective(config, VOCABULARY).prepare(rows)


def assert_same(a: Batch, b: Batch) -> None:
    for name in TENSORS:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize(
    ("hybrid", "fraction", "plain"),
    [
        ("hybrid", 0.0, "next_token"),
        ("hybrid", 1.0, "masked_next_token"),
        ("hybrid_unshifted", 0.0, "next_token"),
        ("hybrid_unshifted", 1.0, "masked_token"),
    ],
)
@given(rows=st.integers(1, 6), seed=st.integers(0, 50))
def test_hybrid_at_its_ends_is_the_plain_objective_bit_for_bit(hybrid, fraction, plain, rows, seed):
    windows = windows_of(rows, 16, seed)
    assert_same(batch_of(windows, hybrid, seed, masked_fraction=fraction), batch_of(windows, plain, seed))


@given(st.decimals(0, 1, places=3).map(float), st.integers(1, 300))
def test_of_the_first_n_rows_exactly_the_floor_of_the_share_is_masked(fraction, rows):
    counts = masked_rows(np.arange(rows), fraction).cumsum()
    assert counts.tolist() == [int((n + 1) * Fraction(str(fraction))) for n in range(rows)]


@given(st.decimals(0, 1, places=2).map(float), st.integers(0, 10_000), st.integers(1, 20))
def test_which_rows_are_masked_depends_on_their_numbers_alone(fraction, first, rows):
    together = masked_rows(np.arange(first + rows), fraction)[first:]
    assert together.tolist() == masked_rows(np.arange(first, first + rows), fraction).tolist()


def test_the_masked_share_and_the_mask_rate_move_linearly_over_the_run():
    """Each step has the share of its own step, up to one row, and its batch follows from the step alone."""
    changes = {"batch_tokens": 32 * 40, "context_length": 40, "steps": 5, "masked_fraction": 0.25, "mask_rate": 0.5}
    moving = changes | {"final_masked_fraction": 0.75, "final_mask_rate": 0.1}
    windows = windows_of(32, 40, ends=0)
    for step, (share, rate) in enumerate([(0.25, 0.5), (0.375, 0.4), (0.5, 0.3), (0.625, 0.2), (0.75, 0.1)]):
        batch = batch_of(windows, "hybrid", first=32 * step, **moving)
        masked = masked_rows_of(batch)
        assert int(masked.sum()) == 32 * share
        hidden = float((batch.targets[masked] != IGNORED).float().mean())
        assert hidden == pytest.approx(rate, abs=0.06)
        like = changes | {"masked_fraction": share, "mask_rate": rate}
        assert_same(batch, batch_of(windows, "hybrid", first=32 * step, **like))


def test_a_hybrid_batch_has_its_causal_rows_first():
    batch = batch_of(windows_of(8, 16), "hybrid", masked_fraction=0.25)
    assert masked_rows_of(batch).tolist() == [False] * 6 + [True] * 2


@pytest.mark.parametrize("objective", sorted(OBJECTIVES.keys() - {*IMAGE_OBJECTIVES, "diffusion"}))
@given(rows=st.integers(1, 9), seed=st.integers(0, 50), first=st.integers(0, 99))
def test_loss_weights_of_a_step_add_up_to_one(objective, rows, seed, first):
    windows = windows_of(rows, 12, seed, ends=0.05)
    windows[0, windows[0] == 0] = 3  # span_corruption predicts nothing of very short documents
    batch = batch_of(windows, objective, seed, first)
    assert float(batch.loss_weights.sum()) == pytest.approx(1, abs=1e-5)
    assert torch.equal(batch.loss_weights > 0, batch.targets != IGNORED)
    for kind in (False, True):  # each kind of row weighs what it is of the rows, evenly over its predictions
        of_kind = batch.loss_weights[masked_rows_of(batch) == kind]
        assert float(of_kind.sum()) == pytest.approx(float((masked_rows_of(batch) == kind).sum()) / rows, abs=1e-5)
        assert len(of_kind[of_kind > 0].unique()) <= 1


def test_next_token_predicts_every_following_token_within_its_own_document():
    windows = windows_of(4, 16)
    batch = batch_of(windows, "next_token")
    assert torch.equal(batch.inputs, torch.from_numpy(windows[:, :-1]))
    assert torch.equal(batch.targets, torch.from_numpy(windows[:, 1:]))
    starts = batch.inputs == VOCABULARY.end_of_text
    lo, hi = masks.packed(starts, torch.zeros(4, dtype=torch.bool))
    assert torch.equal(batch.lo, lo)
    assert torch.equal(batch.hi, hi)
    for row in range(4):
        since = 0
        for i in range(16):
            since = i if starts[row, i] else since
            assert batch.positions[row, i] == i - since


@pytest.mark.parametrize("objective", ["masked_token", "masked_next_token"])
@given(seed=st.integers(0, 50), mask_rate=st.sampled_from([0.01, 0.2, 0.7, 1.0]))
def test_masked_rows_predict_the_original_tokens_and_change_no_others(objective, seed, mask_rate):
    windows = windows_of(5, 20, seed)
    batch = batch_of(windows, objective, seed, mask_rate=mask_rate)
    original, shift = torch.from_numpy(windows[:, :-1]), int(objective == "masked_next_token")
    predicted = batch.targets != IGNORED
    assert (predicted.sum(1) >= 1).all()  # no idle row
    rows, places = predicted.nonzero(as_tuple=True)
    assert torch.equal(batch.targets[rows, places], original[rows, places + shift])
    chosen = torch.zeros_like(predicted)
    chosen[rows, places + shift] = True
    assert torch.equal(batch.inputs[~chosen], original[~chosen])
    assert not (chosen & (original == VOCABULARY.end_of_text)).any()
    assert not (batch.targets == VOCABULARY.end_of_text).any()
    if mask_rate == 1.0:
        expected = original != VOCABULARY.end_of_text
        expected[:, 0] &= shift == 0
        assert torch.equal(chosen, expected)
    # Read both ways, documents apart; also where an end of text was drawn as the random token.
    lo, hi = masks.packed(original == VOCABULARY.end_of_text, torch.ones(5, dtype=torch.bool))
    assert torch.equal(batch.lo, lo)
    assert torch.equal(batch.hi, hi)


def test_a_row_with_a_single_word_hides_it():
    windows = np.full((1, 9), VOCABULARY.end_of_text)
    windows[0, 4] = 9
    batch = batch_of(windows, "masked_next_token", mask_rate=0.01)
    assert batch.targets.tolist() == [[IGNORED] * 3 + [9] + [IGNORED] * 4]


def test_a_row_of_ends_of_text_predicts_nothing():
    batch = batch_of(np.full((2, 9), VOCABULARY.end_of_text), "masked_next_token")
    assert (batch.targets == IGNORED).all()
    assert (batch.loss_weights == 0).all()


@pytest.mark.parametrize("objective", ["masked_token", "masked_next_token"])
def test_of_the_hidden_tokens_80_10_10_percent_are_masked_random_and_kept(objective):
    windows = windows_of(400, 128, ends=0.02)
    batch = batch_of(windows, objective, mask_rate=0.2)
    shift = int(objective == "masked_next_token")
    rows, places = (batch.targets != IGNORED).nonzero(as_tuple=True)
    hidden, original = batch.inputs[rows, places + shift], torch.from_numpy(windows)[rows, places + shift]
    count = len(rows)
    assert count / (400 * 128 * 0.98) == pytest.approx(0.2, abs=0.01)
    masked, kept = hidden == VOCABULARY.mask, hidden == original
    random = ~masked & ~kept
    # A fiftieth of the random tokens are the mask, and another the original.
    assert float(masked.float().mean()) == pytest.approx(0.802, abs=0.02)
    assert float(kept.float().mean()) == pytest.approx(0.102, abs=0.02)
    assert float(random.float().mean()) == pytest.approx(0.096, abs=0.02)
    assert (hidden[random].bincount(minlength=50) > 0).sum() >= 48  # drawn from the whole vocabulary


def test_shares_of_one_and_zero_mask_everything_or_keep_everything():
    windows = windows_of(20, 32)
    all_masked = batch_of(windows, "masked_token", mask_token_share=1.0, random_token_share=0.0)
    assert (all_masked.inputs[all_masked.targets != IGNORED] == VOCABULARY.mask).all()
    kept = batch_of(windows, "masked_token", mask_token_share=0.0, random_token_share=0.0)
    assert torch.equal(kept.inputs, torch.from_numpy(windows[:, :-1]))


@pytest.mark.parametrize("objective", ["masked_token", "masked_next_token", "hybrid"])
@given(seed=st.integers(0, 20))
def test_what_is_hidden_in_a_row_does_not_depend_on_the_rows_beside_it(objective, seed):
    windows = windows_of(6, 16, seed)
    together = batch_of(windows, objective, seed, first=10)
    order = np.argsort(masked_rows(np.arange(10, 16), 0.5), kind="stable") if objective == "hybrid" else range(6)
    for place, row in enumerate(order):
        alone = batch_of(windows[row : row + 1], objective, seed, first=10 + int(row))
        assert masked_rows_of(alone)[0] == masked_rows_of(together)[place]
        for name in ("inputs", "targets", "positions", "lo", "hi"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[place]), name


def test_what_is_hidden_differs_by_seed_and_by_row():
    windows = np.repeat(windows_of(1, 64), 3, axis=0)
    batch = batch_of(windows, "masked_token", seed=0)
    assert len({tuple(row) for row in batch.targets.tolist()}) == 3
    assert not torch.equal(batch.targets, batch_of(windows, "masked_token", seed=1).targets)


def test_rows_cut_a_batch_into_micro_batches():
    batch = batch_of(windows_of(5, 8), "hybrid")
    cut = [batch.rows(start, start + 2) for start in (0, 2, 4)]
    for name in TENSORS:
        whole = getattr(batch, name)
        assert torch.equal(torch.cat([getattr(part, name) for part in cut]), whole)
        assert torch.equal(getattr(batch.to(torch.device("cpu")), name), whole)
    assert [part.parts for part in cut] == [
        {"next_token": 2, "masked_next_token": 0},
        {"next_token": 1, "masked_next_token": 1},
        {"next_token": 0, "masked_next_token": 1},
    ]


def stream_windows(stream: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows that cover a stream once, as the loader cuts them: (windows, real tokens, positions of their tokens)."""
    starts = np.arange(0, len(stream), length)
    at = (starts[:, None] - 1 + np.arange(length + 1)) % len(stream)
    return stream[at], np.minimum(len(stream) - starts, length), at


@given(st.integers(2, 90), st.integers(2, 16), st.integers(1, 9), st.integers(0, 9))
def test_over_all_folds_each_token_is_predicted_exactly_once(tokens, length, folds, seed):
    stream = windows_of(1, tokens - 1, seed)[0]
    stream[-1] = VOCABULARY.end_of_text
    windows, real, at = stream_windows(stream, length)
    numbers = np.arange(len(windows))
    for readout in ("next_token", "masked_token", "masked_next_token"):
        counts = np.zeros(tokens, dtype=int)
        for fold in range(1 if readout == "next_token" else folds):
            arguments = {} if readout == "next_token" else {"fold": fold, "folds": folds}
            batch = validation_batch(windows, real, numbers, readout, VOCABULARY, **arguments)
            rows, places = (batch.targets != IGNORED).numpy().nonzero()
            predicted = at[rows, places + (0 if readout == "masked_token" else 1)]
            assert (batch.targets.numpy()[rows, places] == stream[predicted]).all()
            np.add.at(counts, predicted, 1)
            assert torch.equal(batch.loss_weights, (batch.targets != IGNORED).float())
            if readout != "next_token":  # what is predicted is not to be seen
                hidden = places + (1 if readout == "masked_next_token" else 0)
                assert (batch.inputs.numpy()[rows, hidden] == VOCABULARY.mask).all()
        wanted = np.ones(tokens, dtype=int) if readout == "next_token" else stream != VOCABULARY.end_of_text
        assert counts.tolist() == wanted.astype(int).tolist()


def test_both_masked_readouts_hide_the_same_tokens_in_validation():
    windows, real, _ = stream_windows(windows_of(1, 63)[0], 16)
    token, shifted = (
        validation_batch(windows, real, np.arange(len(windows)), readout, VOCABULARY, fold=1, folds=4)
        for readout in ("masked_token", "masked_next_token")
    )
    assert torch.equal(token.inputs, shifted.inputs)
    assert torch.equal(token.targets[:, 1:], shifted.targets[:, :-1])


def test_the_vocabulary_is_all_an_objective_knows_of_the_tokenizer():
    """Other ids for the special tokens: nothing is hard-wired."""
    other = replace(VOCABULARY, end_of_text=49, mask=48)
    windows = np.where(windows_of(3, 16) == 0, 49, windows_of(3, 16))
    config = Config().replace(objective="masked_token", mask_rate=1.0)
    batch = TextObjective(config, other).prepare(rows_of_windows(windows, other))
    assert (batch.inputs == 48).any()
    assert not (batch.targets == 49).any()


def test_a_batch_that_leaves_the_cpu_takes_the_numbers_of_its_targets_along():
    batch = batch_of(windows_of(6, 20), "hybrid")
    first = batch.parts["next_token"]
    counts = [int((part >= 0).sum()) for part in (batch.targets[:first], batch.targets[first:])]
    moved = batch.to(torch.device("meta"))
    assert list(moved.predicted.items()) == list(zip(batch.parts, counts, strict=True))
    assert moved.rows(0, 2).predicted == batch.to(torch.device("cpu")).predicted == {}  # counted by the loss
    micro_batch = batch.rows(0, first).to(torch.device("meta"))
    assert list(micro_batch.predicted.values()) == [counts[0], 0]
