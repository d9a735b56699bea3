"""MAE: its loss computed once more by hand, and what its encoder sees."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lm.data.image_corpora import ImageCorpora, with_images
from lm.objectives.batches import TrainingBatches
from lm.training.gradients import step_gradients


@pytest.fixture(scope="module")
def batches(pictures, seeing) -> TrainingBatches:
    corpora = ImageCorpora([pictures])
    return TrainingBatches(corpora, with_images(seeing.replace(objective="mae"), corpora))


@pytest.fixture
def model(batches):
    return batches.objective.new_model().initialize(0, identity=False).train()


def test_the_loss_is_the_error_of_the_hidden_patches_normalized_pixels(batches, model):
    objective, batch = batches.objective, batches.batch(0)
    views = objective.views_of(batch)
    predicted = objective.predictions(model, views, batch.kept).detach().double().numpy()
    errors = []
    for image in range(len(batch)):
        for patch in set(range(16)) - set(batch.kept[image].tolist()):
            row, column = divmod(patch, 4)
            pixels = views[image, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4].double().numpy().ravel()
            target = (pixels - pixels.mean()) / np.sqrt(pixels.var(ddof=1) + 1e-6)
            errors.append(((predicted[image, patch] - target) ** 2).mean())
    assert len(errors) == 12 * 12
    assert float(objective.loss(model, batch)["mae"]) == pytest.approx(np.mean(errors), rel=1e-5)


def test_hidden_pixels_do_not_reach_the_encoder(batches, model):
    objective, batch = batches.objective, batches.batch(0)
    views = objective.views_of(batch)
    before = objective.predictions(model, views, batch.kept)
    hidden = next(patch for patch in range(16) if patch not in batch.kept[0].tolist())
    row, column = divmod(hidden, 4)
    views[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 5
    assert torch.equal(objective.predictions(model, views, batch.kept), before)


@pytest.mark.parametrize(("rate", "visible"), [(0.75, 4), (0.5, 8), (0.99, 1), (0.01, 15)])
def test_the_share_of_hidden_patches_is_exact_and_each_image_hides_others(batches, rate, visible):
    objective = type(batches.objective)(batches.objective.config.replace(patch_mask_rate=rate), batches.objective.form)
    kept = objective.prepare(batches.rows.of_step(0)).kept
    assert kept.shape == (12, visible)
    assert (kept.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in kept.tolist()}) > 6


def test_every_patch_is_hidden_equally_often(batches):
    kept = torch.cat([batches.batch(step).kept for step in range(100)])
    counts = torch.bincount(kept.flatten(), minlength=16) / len(kept)
    assert ((counts - 0.25).abs() < 0.06).all()


def test_micro_batches_give_the_gradient_of_the_whole_batch(batches, model, seeing):
    objective, batch = batches.objective, batches.batch(1)
    found = []
    for rows in (0, 6, 4, 1):
        losses, _ = step_gradients(objective, model, batch, seeing.replace(micro_batch_rows=rows), 1)
        found.append((float(losses["mae"]), [p.grad.clone() for p in model.parameters()]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_without_normalization_the_pixels_themselves_are_predicted(batches):
    config = batches.objective.config.replace(normalize_patches=False)
    objective = type(batches.objective)(config, batches.objective.form)
    views = objective.views_of(batches.batch(0))
    assert torch.equal(objective.targets(views)[3, 5], views[3, :, 4:8, 4:8].flatten())


def test_views_are_cropped_and_flipped_and_keep_their_colors(batches):
    settings = batches.objective.view_settings
    assert (settings.color_jitter, settings.grayscale, settings.blur, settings.solarize) == (0, 0, 0, 0)
    assert settings.crop_area == batches.objective.config.views.crop_area


def test_a_perfect_prediction_rebuilds_the_picture_and_none_its_means(batches, model, pictures, monkeypatch):
    objective, images = batches.objective, pictures.split("validation").read(np.arange(3))
    batch = objective.whole(images, np.arange(3))
    expected = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        monkeypatch.setattr(objective, "predictions", lambda model, views, kept: objective.targets(views))
        made = objective.pictures(model, batch)
        assert (made["original"] - expected).abs().max() < 1e-5
        assert (made["rebuilt"] - expected).abs().max() < 1e-5
        assert (made["visible"] - expected).abs().max() > 0.1
        monkeypatch.setattr(objective, "predictions", lambda model, views, kept: 0 * objective.targets(views))
        made = objective.pictures(model, batch)
        assert torch.equal(made["rebuilt"], made["flat"])
