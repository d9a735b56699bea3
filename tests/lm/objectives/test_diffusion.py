"""Masked diffusion: what is hidden, its loss, and the bound of the likelihood, against plain references in float64."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from data_prep.shards.tokens import Dataset
from lm.cli.main import main
from lm.config.settings import Config
from lm.data.batch import IGNORED, Vocabulary, rows_of_windows
from lm.data.corpora import Corpora
from lm.data.rows import ValidationRows
from lm.model.transformer import Transformer
from lm.objectives.batches import TrainingBatches
from lm.objectives.diffusion import BOUND, Diffusion
from lm.objectives.objective import open_objective
from lm.training.gradients import step_gradients
from lm.training.pretraining import train
from lm.training.validation import validate_readouts
from tests.conftest import StopAt

END, MASK = 0, 1
CONTEXT = 32


def objective_of(config: Config, vocab_size: int = 50) -> Diffusion:
    found = open_objective(config, Vocabulary(vocab_size, END, MASK))
    assert isinstance(found, Diffusion)
    return found


@pytest.fixture
def settings(small) -> Config:
    return small.replace(objective="diffusion", vocab_size=50, batch_tokens=16 * CONTEXT, context_length=CONTEXT)


def random_model(config: Config, scale: float = 0.1) -> Transformer:
    """A model in which every weight matters."""
    model = Transformer(config.model).initialize(0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model


def random_rows(step: int, count: int = 16, tokens: int = 50):
    windows = np.random.default_rng(step).integers(2, tokens, (count, CONTEXT + 1))
    windows[::3, 10] = END
    return replace(rows_of_windows(windows, Vocabulary(tokens, END, MASK)), numbers=step * count + np.arange(count))


def test_each_step_spreads_its_rates_and_each_row_has_all_of_them_over_time(settings):
    objective = objective_of(settings.replace(lowest_diffusion_rate=0.1))
    rates = np.array([objective.rates(random_rows(step)) for step in range(400)])
    assert ((rates > 0.1) & (rates <= 1)).all()
    assert (np.sort(np.floor((1 - rates) / 0.9 * 16 + 1e-9)) == np.arange(16)).all()  # one in each sixteenth
    middle, deviation = 0.55, 0.9 / math.sqrt(12 * 400)
    assert (np.abs(rates.mean(axis=0) - middle) < 4 * deviation).all()
    assert not np.array_equal(rates[0], rates[1])


def test_tokens_are_hidden_independently_at_the_rate_of_their_row_always_behind_the_mask(settings):
    objective = objective_of(settings)
    hidden = expected = variance = 0.0
    for step in range(60):
        rows = random_rows(step)
        batch, rates = objective.prepare(rows), objective.rates(rows)
        changed = batch.inputs.numpy() != rows.inputs
        assert (batch.inputs.numpy()[changed] == MASK).all()
        assert not changed[rows.starts | (rows.inputs == END)].any()
        can_be = (~rows.starts & (rows.inputs != END)).sum(axis=1)
        hidden, expected = hidden + changed.sum(), expected + (rates * can_be).sum()
        variance += (rates * (1 - rates) * can_be).sum()
        # Each hidden token is the target of its left neighbor, and nothing else is.
        targets = np.where(changed[:, 1:], rows.inputs[:, 1:], IGNORED)
        assert np.array_equal(batch.targets.numpy()[:, :-1], targets)
        assert (batch.targets[:, -1] == IGNORED).all()
        alone = objective.prepare(random_rows(step))
        assert torch.equal(alone.inputs, batch.inputs)
    assert abs(hidden - expected) < 4 * math.sqrt(variance)
    assert any((objective.prepare(random_rows(n)).targets == IGNORED).all(1).any() for n in range(20))  # none is forced


def test_documents_are_read_apart_and_in_both_directions(settings):
    batch = objective_of(settings).prepare(random_rows(0))
    assert batch.lo[0].tolist() == [0] * 10 + [10] * 22
    assert batch.hi[0].tolist() == [10] * 10 + [32] * 22


def test_the_loss_is_that_of_a_plain_loop_in_float64(settings):
    objective, model = objective_of(settings), random_model(settings)
    rows = random_rows(5)
    batch, rates = objective.prepare(rows), objective.rates(rows)
    total, could_be = 0.0, 0
    for r in range(16):
        row = [int(token) for token in rows.inputs[r]]
        cuts = [i for i in range(CONTEXT) if i == 0 or row[i] == END] + [CONTEXT]
        for begin, stop in pairwise(cuts):
            shown = batch.inputs[r, begin:stop][None]
            positions, size = torch.arange(stop - begin)[None], stop - begin
            lo, hi = torch.zeros(1, size, dtype=torch.int32), torch.full((1, size), size, dtype=torch.int32)
            logits = model.logits(model(shown, positions, lo, hi))[0].double()
            for i in range(1, size):
                could_be += 1
                if shown[0, i] == MASK:
                    cost = torch.logsumexp(logits[i - 1], 0) - logits[i - 1, row[begin + i]]
                    total += float(cost.detach()) / rates[r]
    losses, shares = step_gradients(objective, model, batch, settings, 5)
    assert shares == {"diffusion": 1}
    assert float(losses["diffusion"]) == pytest.approx(total / could_be, rel=1e-5)


TINY = 4  # tokens that can be hidden


@pytest.fixture(scope="module")
def tiny():
    """Of a sequence of four tokens: (objective, what a token costs, given the others that are hidden, the model)."""
    config = Config().replace(
        objective="diffusion", vocab_size=16, hidden_size=16, num_layers=1, num_heads=2, context_length=TINY
    )
    objective, model = objective_of(config, 6), random_model(config, scale=0.5)
    window = [END, 3, 5, 2, 4]

    @cache
    def cost(token: int, hidden: frozenset[int]) -> float:
        shown = torch.tensor([[MASK if i in hidden else t for i, t in enumerate(window)]])
        lo, hi = torch.zeros(1, 5, dtype=torch.int32), torch.full((1, 5), 5, dtype=torch.int32)
        logits = model.logits(model(shown, torch.arange(5)[None], lo, hi))[0, token - 1].double()
        return float((torch.logsumexp(logits, 0) - logits[window[token]]).detach())

    return objective, cost, model, np.array(window)


def orders_mean(cost) -> float:
    """The mean over all orders of what the sequence costs, token by token in that order."""
    costs = []
    for order in permutations(range(1, TINY + 1)):
        costs.append(sum(cost(token, frozenset(order[n:])) for n, token in enumerate(order)))
    return sum(costs) / len(costs)


def test_the_expected_loss_over_all_masks_is_the_mean_over_all_orders_a_bound_of_the_likelihood(tiny):
    """The probability of a set of l hidden tokens, over rates, and its weight: an integral of t^(l-1) (1-t)^(L-l)."""
    objective, cost, model, window = tiny
    expected = 0.0
    for size in range(1, TINY + 1):
        weight = math.factorial(size - 1) * math.factorial(TINY - size) / math.factorial(TINY)
        for chosen in combinations(range(1, TINY + 1), size):
            hidden, starts = np.zeros((1, TINY + 1), dtype=bool), np.zeros((1, TINY + 1), dtype=bool)
            hidden[0, list(chosen)], starts[0, 0] = True, True
            batch = objective.hiding(window[None], starts, hidden, np.array([weight]))
            expected += float(objective.loss(model, batch)["diffusion"].detach())
    assert expected == pytest.approx(orders_mean(cost), rel=1e-5)
    # The text's likelihood, under a random order, is the mean of its likelihoods under each (Jensen's inequality).
    likelihoods = [
        math.exp(-sum(cost(token, frozenset(order[n:])) for n, token in enumerate(order)))
        for order in permutations(range(1, TINY + 1))
    ]
    assert expected > -math.log(sum(likelihoods) / len(likelihoods)) + 1e-3


def test_validations_hide_each_number_of_tokens_alike_and_so_expect_the_mean_over_all_orders(tiny):
    objective, cost, _, window = tiny
    count = 3000
    windows, real = np.tile(window, (count, 1)), np.full(count, TINY)
    draws = np.random.default_rng(0).random((TINY, count, TINY + 1))
    found: dict[frozenset[int], int] = {}
    total = 0.0
    for number in range(TINY):
        rates = (number + (np.arange(count) + 0.5) / count) / TINY
        batch = objective.bound_batch(windows, real, rates, draws[number])
        assert batch.loss_weights.sum(1).tolist() == pytest.approx([TINY] * count, rel=1e-6)
        for row, weights in zip(batch.inputs.tolist(), batch.loss_weights, strict=True):
            hidden = frozenset(i for i, token in enumerate(row) if token == MASK)
            assert len(hidden) == number + 1
            found[hidden] = found.get(hidden, 0) + 1
            total += sum(cost(i, hidden) for i in hidden) * float(weights.max())
    assert len(found) == 2**TINY - 1
    for hidden, times in found.items():
        chance = 1 / math.comb(TINY, len(hidden))
        assert abs(times - count * chance) <= 4 * math.sqrt(count * chance * (1 - chance))
    assert total / (TINY * count) == pytest.approx(orders_mean(cost), rel=0.01)


def test_a_validation_predicts_every_token_and_is_the_same_however_it_is_batched(dataset: Dataset, small):
    config = small.replace(objective="diffusion", vocab_size=400, diffusion_passes=3)
    corpora, model = Corpora([dataset]), random_model(config)
    split = dataset.split("validation")
    found = [
        validate_readouts(model, corpora, config.replace(micro_batch_rows=rows), rows=0, every_token=True)[BOUND]
        for rows in (2, 4)
    ]
    assert found[0]["predicted"] == split.tokens - split.documents
    assert found[0]["nats_per_token"] == pytest.approx(found[1]["nats_per_token"], rel=1e-6)
    bits = found[0]["nats_per_token"] * (split.tokens - split.documents) / split.counted_bytes / math.log(2)
    assert found[0]["bits_per_byte"] == pytest.approx(bits)
    part = validate_readouts(model, corpora, config, rows=4)[BOUND]
    assert part == validate_readouts(model, corpora, config, rows=4)[BOUND]
    assert part["predicted"] <= 4 * config.data.context_length
    assert ValidationRows(split, config.data.context_length).count > 4


def test_a_model_that_knows_nothing_pays_for_every_token_alike(dataset: Dataset, small):
    config = small.replace(objective="diffusion", vocab_size=400)
    model = Transformer(config.model).initialize(0)
    torch.nn.init.zeros_(model.embedding.weight)
    assert validate_readouts(model, Corpora([dataset]), config)[BOUND]["nats_per_token"] == pytest.approx(math.log(400))
    batches = TrainingBatches(Corpora([dataset]), config)
    losses = [float(sum(batches.objective.loss(model, batches.batch(step)).values()).detach()) for step in range(100)]
    assert np.mean(losses) == pytest.approx(math.log(400), rel=0.05)  # each token weighs 1 in expectation


MIXED = "next_token:0.5,masked_next_token:0.25,diffusion:0.25"


@pytest.mark.parametrize("objective", ["diffusion", MIXED])
def test_a_stopped_run_ends_with_the_same_bits(small, quietly, tmp_path, objective):
    config = small.replace(objective=objective, batch_tokens=256, steps=7, checkpoint_every=2, micro_batch_rows=2)
    whole = quietly(config, tmp_path / "whole")
    with pytest.raises(InterruptedError):
        train(config, tmp_path / "stopped", StopAt(3))
    again = quietly(config, tmp_path / "stopped")
    for read in ("model", "optimizer"):
        expected, found = (getattr(run.newest(), read)() for run in (whole, again))
        assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_it_learns_and_is_evaluated_alone_and_in_a_mixture(small, quietly, tmp_path):
    for name, objective in (("alone", "diffusion"), ("mixed", MIXED)):
        changes = {"batch_tokens": 256, "steps": 40, "validate_every": 20, "learning_rate": 0.01}
        run = quietly(small.replace(objective=objective, **changes), tmp_path / name)
        first, last = (line["validation"] for line in run.metrics() if "validation" in line)
        readouts = ["next_token"] * (name == "mixed") + ["masked_next_token"]
        assert list(first) == [*readouts, BOUND]
        assert last[BOUND]["nats_per_token"] < first[BOUND]["nats_per_token"]
        done = CliRunner().invoke(main, ["evaluate", str(run.path)])
        assert done.exit_code == 0, done.output
        assert "diffusion_bound (at most)" in done.output
        assert "upper bound of the negative log-likelihood" in done.output
        assert set(json.loads((run.path / "evaluation.json").read_text())["validation"]) == {*readouts, BOUND}
