"""The gradient of a step: independent of the micro-batches, and that of the mean loss."""

from __future__ import annotations

import pytest
import torch

from lm.data.batch import TENSORS, Batch
from lm.data.corpora import Corpora
from lm.model.transformer import Transformer
from lm.objectives.batches import TrainingBatches
from lm.training.gradients import _seed_dropout, step_gradients
from tests.conftest import masked_rows_of


@pytest.mark.parametrize(
    "objective",
    ["next_token", "masked_token", "masked_next_token", "hybrid", "next_token:0.5,masked_next_token:0.5"],
)
def test_micro_batches_give_the_gradient_of_the_whole_batch(dataset, small, objective):
    """Although each has another number of hidden tokens, and one may be causal and the next masked."""
    config = small.replace(objective=objective, masked_fraction=0.3, vocab_size=400)
    batches = TrainingBatches(Corpora([dataset]), config)
    objective, batch = batches.objective, batches.batch(1)
    model = Transformer(config.model).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)), alpha=0.05)
    found = []
    for rows in (0, 4, 2, 1):
        losses, shares = step_gradients(objective, model, batch, config.replace(micro_batch_rows=rows), 1)
        found.append((losses, shares, [p.grad.clone() for p in model.parameters()]))
    for losses, shares, gradients in found[1:]:
        assert shares == found[0][1]
        assert losses.keys() == found[0][0].keys()
        for name in losses:
            torch.testing.assert_close(losses[name], found[0][0][name], rtol=1e-5, atol=1e-5)
        for a, b in zip(gradients, found[0][2], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert sum(found[0][1].values()) == 1


def test_the_gradient_is_that_of_the_mean_loss(dataset, small):
    """Computed once more from all logits, each kind of row averaged over its own predictions."""
    config = small.replace(masked_fraction=0.25, vocab_size=400)
    batches = TrainingBatches(Corpora([dataset]), config)
    objective, batch = batches.objective, batches.batch(0)
    model = Transformer(config.model).initialize(0)
    losses, shares = step_gradients(objective, model, batch, config, 0)
    ours = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model.logits(model(batch.inputs, batch.positions, batch.lo, batch.hi))
    total = 0.0
    for masked, name in ((False, "next_token"), (True, "masked_next_token")):
        rows = masked_rows_of(batch) == masked
        mean = torch.nn.functional.cross_entropy(logits[rows].flatten(0, 1), batch.targets[rows].flatten())
        share = float(rows.float().mean())
        assert shares[name] == share
        assert float(losses[name]) == pytest.approx(share * float(mean.detach()), rel=1e-5)
        total = total + share * mean
    total.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_dropout_draws_what_it_drew_when_torch_seeded_it():
    """A run that an earlier version began ends with the same bits."""
    model, ones = torch.nn.Linear(1, 1), torch.ones(1000)
    torch.manual_seed(2**62 + 5)
    expected = torch.dropout(ones, 0.5, train=True)
    _seed_dropout(model, 2**62 + 5)
    assert torch.equal(torch.dropout(ones, 0.5, train=True), expected)


def test_dropout_differs_between_steps_and_micro_batches_and_is_reproducible(dataset, small):
    config = small.replace(objective="next_token", vocab_size=400, dropout=0.3, micro_batch_rows=1)
    batches = TrainingBatches(Corpora([dataset]), config)
    objective, one = batches.objective, batches.batch(0).rows(0, 1)
    doubled = {name: torch.cat([getattr(one, name)] * 2) for name in TENSORS}
    twice = Batch(**doubled, parts={name: 2 * rows for name, rows in one.parts.items()})
    model = Transformer(config.model).initialize(0).train()

    def loss(batch: Batch, step: int, seed: int = 0) -> float:
        torch.manual_seed(123)  # the global stream has no say
        return float(step_gradients(objective, model, batch, config.replace(seed=seed), step)[0]["next_token"])

    assert loss(one, 5) == loss(one, 5)
    assert len({loss(one, 5), loss(one, 6), loss(one, 5, seed=1)}) == 3
    assert loss(twice, 5) != pytest.approx(2 * loss(one, 5), rel=1e-6)
