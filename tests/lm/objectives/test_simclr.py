"""SimCLR: its loss against the formula, and its step against one pass over everything."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm.data.image_corpora import ImageCorpora, with_images
from lm.data.patch_rows import layout_of
from lm.data.views import make_views
from lm.objectives.batches import TrainingBatches
from lm.objectives.contrastive import nt_xent
from lm.objectives.objective import open_objective
from lm.training.gradients import step_gradients


def by_hand(first: np.ndarray, second: np.ndarray, temperature: float) -> float:
    """Chen et al. 2020, equation 1 and algorithm 1, in float64, a pair at a time."""
    views = [view / np.linalg.norm(view) for view in np.concatenate([first, second]).astype(np.float64)]
    count, total = len(views), 0.0
    for i in range(count):
        partner = (i + len(first)) % count
        others = sum(np.exp(views[i] @ views[k] / temperature) for k in range(count) if k != i)
        total -= np.log(np.exp(views[i] @ views[partner] / temperature) / others)
    return total / count


@pytest.mark.parametrize("temperature", [0.1, 0.5])
def test_nt_xent_is_the_formula_and_so_is_its_gradient(temperature):
    draw = np.random.default_rng(0)
    first, second = (draw.standard_normal((5, 7)) for _ in range(2))
    inputs = [torch.tensor(each, requires_grad=True) for each in (first, second)]
    loss = nt_xent(*inputs, temperature)
    assert loss.item() == pytest.approx(by_hand(first, second, temperature), rel=1e-12)
    loss.backward()
    for which, row, column in ((0, 0, 0), (0, 4, 3), (1, 2, 6)):
        moved = [first.copy(), second.copy()]
        moved[which][row, column] += 1e-6
        slope = (by_hand(*moved, temperature) - loss.item()) / 1e-6
        assert float(inputs[which].grad[row, column]) == pytest.approx(slope, abs=1e-5)


@pytest.fixture(scope="module")
def batches(pictures, seeing) -> TrainingBatches:
    corpora = ImageCorpora([pictures])
    return TrainingBatches(corpora, with_images(seeing, corpora))


def moved_model(batches):
    model = batches.objective.new_model().initialize(0, identity=False)
    return model.train()


def test_the_loss_compares_two_views_of_every_image(batches):
    objective, model, batch = batches.objective, moved_model(batches), batches.batch(0)
    views = [make_views(batch.images, batch.draws[:, view], 16, objective.view_settings) for view in range(2)]
    assert not torch.equal(*views)
    mean, std = (torch.tensor(part)[:, None, None] for part in (objective.form.mean, objective.form.std))

    found = []
    for view in views:
        images = (view - mean) / std
        found.append(model.head(model([images], layout_of([images], 4)).mean(1)))
    expected = by_hand(*(each.detach().numpy() for each in found), 0.2)
    assert float(objective.loss(model, batch)["simclr"]) == pytest.approx(expected, rel=1e-5)


def test_micro_batches_give_the_gradient_of_the_whole_batch(batches, seeing):
    """The negatives are those of the whole step, not of the micro-batch."""
    objective, model, batch = batches.objective, moved_model(batches), batches.batch(1)
    found = []
    for rows in (0, 6, 4, 1):
        losses, shares = step_gradients(objective, model, batch, seeing.replace(micro_batch_rows=rows), 1)
        assert shares == {"simclr": 1.0}
        found.append((float(losses["simclr"]), [p.grad.clone() for p in model.parameters()]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(float(gradient.abs().max()) > 0 for gradient in found[0][1])


def test_dropout_is_the_same_in_both_passes_of_a_micro_batch(batches, seeing):
    """So the gradient is that of the loss: moving along it changes the loss as much as its square says."""
    config = batches.objective.config.replace(dropout=0.5, micro_batch_rows=3)
    objective = open_objective(config, batches.objective.form)
    model, batch = objective.new_model().initialize(0, identity=False).train(), batches.batch(0)
    before, _ = step_gradients(objective, model, batch, config, 0)
    slope = sum(float(p.grad.square().sum()) for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(parameter.grad, alpha=1e-4)
    after, _ = step_gradients(objective, model, batch, config, 0)
    assert float(before["simclr"] - after["simclr"]) == pytest.approx(1e-4 * slope, rel=0.05)


def test_views_depend_on_the_seed_and_the_images_number_in_the_run(batches):
    batch, again, next_step = batches.batch(0), batches.batch(0), batches.batch(1)
    assert torch.equal(batch.draws, again.draws)
    assert not torch.equal(batch.draws, next_step.draws)
    halves = [batches.batch(0, rank, 2) for rank in range(2)]
    assert torch.equal(torch.stack([half.draws for half in halves], dim=1).flatten(0, 1), batch.draws)
