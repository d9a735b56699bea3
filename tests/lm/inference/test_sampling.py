from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data_prep.errors import UserError
from lm.inference.sampling import Sampling, draw, filtered, log_probabilities, penalized, require_tokens

# Scores apart from each other, so that every rank is clear.
SCORES = st.permutations(range(12)).flatmap(
    lambda order: st.floats(0.05, 1).map(lambda gap: torch.tensor(order, dtype=torch.float64) * gap)
)


def kept_by(scores: torch.Tensor, sampling: Sampling) -> set[int]:
    """The tokens that may be drawn, by the words of the definitions."""
    probability = [math.exp(score / sampling.temperature) for score in scores.tolist()]
    ranked = sorted(range(len(probability)), key=lambda token: -probability[token])
    if sampling.top_k:
        ranked = ranked[: sampling.top_k]
    if sampling.top_p < 1:
        total, reached, nucleus = sum(probability[token] for token in ranked), 0.0, []
        for token in ranked:
            if reached >= sampling.top_p:
                break
            nucleus.append(token)
            reached += probability[token] / total
        ranked = nucleus
    return {token for token in ranked if probability[token] >= sampling.min_p * probability[ranked[0]]}


@given(
    scores=SCORES,
    temperature=st.sampled_from([0.3, 0.8, 1.0, 2.5]),
    top_k=st.integers(0, 14),
    top_p=st.floats(0.01, 1),
    min_p=st.sampled_from([0.0, 0.03, 0.4, 1.0]),
)
@hypothesis_settings(max_examples=100)
def test_filters_keep_what_their_definitions_say(scores, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    result = filtered(scores, sampling)
    kept = {token for token in range(12) if math.isfinite(result[token])}
    assert kept == kept_by(scores, sampling)
    for token in kept:
        assert float(result[token]) == pytest.approx(float(scores[token]) / temperature)


def test_filters_act_on_each_row_of_a_batch():
    rows = torch.randn(3, 9)
    sampling = Sampling(top_k=4, top_p=0.9, min_p=0.1)
    assert torch.equal(filtered(rows, sampling), torch.stack([filtered(row, sampling) for row in rows]))


def test_temperature_zero_leaves_only_the_likeliest_whatever_the_filters():
    scores = torch.tensor([0.1, 3.0, 2.9])
    assert filtered(scores, Sampling(temperature=0, top_k=2, top_p=0.5)).softmax(-1).tolist() == [0.0, 1.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-5, 0.0099])
def test_a_temperature_near_zero_leaves_what_zero_leaves(temperature):
    scores = torch.tensor([[3.0, 2.9999999], [-1e30, 1e30]])
    sampling = Sampling(temperature=temperature)
    assert sampling.problems() == []
    assert torch.equal(filtered(scores, sampling), filtered(scores, Sampling(temperature=0)))
    assert not Sampling(temperature=0.01).is_greedy


@pytest.mark.parametrize("temperature", [-1e-5, -1.0, 100.1, math.inf, math.nan])
def test_a_temperature_that_is_none_is_refused(temperature):
    assert Sampling(temperature=temperature).problems() == [f"temperature must be from 0 to 100, not {temperature}"]


def test_every_impossible_sampling_setting_is_told():
    wrong = Sampling(temperature=-1, top_k=-2, top_p=0, min_p=2, max_new_tokens=0)
    told = wrong.problems()
    assert [sentence.split()[0] for sentence in told] == [
        "temperature", "top_k", "top_p", "min_p", "max_new_tokens"
    ]  # fmt: skip
    assert Sampling(temperature=math.nan).problems()
    assert Sampling().problems() == []


def test_a_seed_out_of_range_is_told():
    assert Sampling(seed=2**70).problems()


@given(scores=SCORES, mass=st.floats(0.01, 0.99))
@hypothesis_settings(max_examples=50)
def test_typical_sampling_keeps_what_is_nearest_to_the_entropy(scores, mass):
    p = [float(x) for x in scores.softmax(-1)]
    entropy = -sum(x * math.log(x) for x in p)
    ranked = sorted(range(len(p)), key=lambda token: abs(-math.log(p[token]) - entropy))
    kept, reached = set(), 0.0
    for token in ranked:
        if reached >= mass:
            break
        kept.add(token)
        reached += p[token]
    result = filtered(scores, Sampling(temperature=1.0, typical_p=mass))
    assert {token for token in range(12) if math.isfinite(result[token])} == kept


def test_the_draw_follows_the_probabilities_and_never_takes_what_was_left_out():
    logits = torch.tensor([-math.inf, 1.0, 0.0, -math.inf, 2.0, -math.inf])
    uniforms = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    drawn = draw(logits.expand(10_000, -1), uniforms)
    shares = torch.bincount(drawn, minlength=6) / 10_000
    torch.testing.assert_close(shares, logits.softmax(-1), rtol=0, atol=2e-4)
    ends = draw(logits.expand(2, -1), torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64))
    assert ends.tolist() == [1, 4]
    drawn = draw(torch.stack([logits, logits * math.nan]), torch.tensor([0.5, 0.5], dtype=torch.float64)).tolist()
    assert require_tokens(drawn[:1], 6) == drawn[:1]
    with pytest.raises(UserError, match="is not a number: its training has diverged"):
        require_tokens(drawn, 6)


def test_penalties_are_those_of_their_definitions():
    logits = torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0])
    read, written = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0]), torch.tensor([0.0, 0.0, 3.0, 1.0, 0.0])
    repeated = penalized(logits, Sampling(repetition_penalty=2.0), read, written)
    assert repeated.tolist() == [1.0, -4.0, 1.0, -4.0, 1.0]
    counted = penalized(logits, Sampling(presence_penalty=0.5, frequency_penalty=0.25), read, written)
    assert counted.tolist() == [2.0, -2.0, 2.0 - 0.5 - 0.75, -2.0 - 0.5 - 0.25, 1.0]


def test_log_probabilities_leave_out_what_cannot_be():
    log_p, top = log_probabilities(torch.tensor([0.0, math.log(3.0), -math.inf]), top=5)
    assert log_p.exp().tolist() == pytest.approx([0.25, 0.75, 0.0])
    assert [token for token, _ in top] == [1, 0]
    assert [math.exp(value) for _, value in top] == pytest.approx([0.75, 0.25])
