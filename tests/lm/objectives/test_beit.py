"""BEiT: codes as the tokenizer's own, its loss in float64, and what the model sees of hidden patches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from data_prep.pipeline.visual_tokens import build_visual_tokens
from data_prep.shards.codebook import load_codebook
from data_prep.shards.codebook import patches_of as cut
from data_prep.shards.tokens import open_dataset
from lm.data.image_corpora import ImageCorpora, with_images
from lm.data.images import denormalized
from lm.data.training_data import validation_rows
from lm.data.visual_codes import with_codes
from lm.model.image_transformer import patches_of
from lm.objectives.batches import TrainingBatches
from lm.objectives.objective import restore
from lm.training.distributed import Ranks
from lm.training.gradients import step_gradients
from lm.training.validation import LossMeasure, validate_readouts


@pytest.fixture(scope="module")
def batches(pictures, seeing, visual_tokens) -> TrainingBatches:
    corpora = ImageCorpora([pictures])
    asked = seeing.replace(objective="beit", patch_mask_rate=0.4, visual_tokenizer=str(visual_tokens))
    return TrainingBatches(corpora, with_codes(with_images(asked, corpora)))


@pytest.fixture
def model(batches):
    model = batches.objective.new_model().initialize(0, identity=False).train()
    batches.objective.begin(model)
    return model


def whole(objective, split, numbers: np.ndarray):
    return objective.whole(split.read(numbers), numbers)


def test_whole_images_have_the_codes_of_the_dataset_of_tokens(batches, model, pictures, visual_tokens):
    objective, tokens = batches.objective, open_dataset(visual_tokens)
    for name in ("train", "validation"):
        split = pictures.split(name)
        _, codes, _ = objective.predictions(model, whole(objective, split, np.arange(split.count)))
        expected = tokens.split(name).read(0, tokens.split(name).tokens).reshape(-1, 17)[:, :16]
        assert np.array_equal(codes.numpy(), expected)


def test_crops_have_the_nearest_codes_of_their_own_pixels(batches, model, visual_tokens):
    objective, batch = batches.objective, batches.batch(0)
    _, codes, _ = objective.predictions(model, batch)
    pixels = (denormalized(objective.views_of(batch), objective.form) * 255).round().permute(0, 2, 3, 1).numpy()
    book = load_codebook(visual_tokens).pixels.reshape(12, -1).astype(np.float64)
    distances = ((cut(pixels.astype(np.float64), 4)[:, None] - book) ** 2).sum(2)
    assert np.array_equal(codes.numpy().ravel(), distances.argmin(1))
    assert len(np.unique(codes)) > 6


def test_the_loss_is_the_cross_entropy_of_the_hidden_patches_codes(batches, model):
    objective, batch = batches.objective, batches.batch(0)
    hidden, codes, states = objective.predictions(model, batch)
    logits = states.detach().double().numpy() @ model.head.codes.weight.detach().double().numpy().T
    shares = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    losses, right = [], []
    for image in range(len(batch)):
        for patch in set(range(16)) - set(batch.kept[image].tolist()):
            assert hidden[image, patch]
            losses.append(-np.log(shares[image, patch, codes[image, patch]]))
            right.append(logits[image, patch].argmax() == codes[image, patch])
    assert len(losses) == 12 * 6
    assert objective.loss(model, batch)["beit"].item() == pytest.approx(np.mean(losses), rel=1e-5)
    judged = objective.judged(model, batch).mean(0).tolist()
    assert judged == pytest.approx([np.mean(losses), np.mean(right)], rel=1e-5)


def test_a_hidden_patch_is_read_as_the_mask_vector_and_visible_ones_as_they_are(batches, model):
    objective, batch = batches.objective, batches.batch(0)
    read = []
    model.blocks.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    hidden, _, _ = objective.predictions(model, batch)
    with torch.no_grad():
        known = model.embedding(model.embedding.cut(objective.views_of(batch)))
    assert torch.equal(read[0][~hidden], known[~hidden])
    assert torch.equal(read[0][hidden], model.head.mask.expand(int(hidden.sum()), -1))
    assert model.head.mask.abs().max() > 0
    objective.loss(model, batch)["beit"].backward()
    assert model.head.mask.grad.abs().max() > 0


@pytest.mark.parametrize(("rate", "hidden"), [(0.4, 6), (0.01, 1), (0.99, 15)])
def test_the_share_of_hidden_patches_is_exact_and_each_image_hides_others(batches, rate, hidden):
    objective = type(batches.objective)(batches.objective.config.replace(patch_mask_rate=rate), batches.objective.form)
    kept = objective.prepare(batches.rows.of_step(0)).kept
    assert kept.shape == (12, 16 - hidden)
    assert (kept.diff(dim=1) > 0).all()
    assert len({tuple(row) for row in kept.tolist()}) > 4


def test_micro_batches_give_the_gradient_of_the_whole_batch(batches, model, seeing):
    objective, batch = batches.objective, batches.batch(1)
    found = []
    for rows in (0, 6, 1):
        losses, _ = step_gradients(objective, model, batch, seeing.replace(micro_batch_rows=rows), 1)
        found.append((float(losses["beit"]), [p.grad.clone() for p in model.parameters()]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_the_codes_of_hidden_patches_can_be_learned(batches):
    objective, batch = batches.objective, batches.batch(0)
    model = objective.new_model().initialize(0).train()
    objective.begin(model)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(30):
        losses.append(objective.loss(model, batch)["beit"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0].item() == pytest.approx(np.log(12), abs=0.5), "as a guess"
    assert losses[-1].item() < 1.5


def test_a_validation_is_the_mean_over_whole_images(batches, model, pictures):
    objective, split = batches.objective, pictures.split("validation")
    config = objective.config.replace(validation_rows=0)
    found = validate_readouts(model, ImageCorpora([pictures]), config, objective=objective)["beit"]
    model.eval()
    judged = objective.judged(model, whole(objective, split, np.arange(split.count)))
    assert [found["loss"], found["code_accuracy"]] == pytest.approx(judged.mean(0).tolist(), rel=1e-5)
    held_out = validation_rows(ImageCorpora([pictures]), config)
    again = objective.measured(held_out, np.arange(5), LossMeasure(model, objective, config, Ranks()))
    assert again["loss"] == pytest.approx(judged[:5, 0].mean().item(), rel=1e-5), "the same patches are hidden"


def test_the_pictures_are_of_codes_and_only_hidden_patches_are_predicted(batches, model, pictures, visual_tokens):
    objective, split = batches.objective, pictures.split("validation")
    batch = whole(objective, split, np.arange(3))
    with torch.no_grad():
        made = objective.pictures(model, batch)
        hidden, codes, states = objective.predictions(model, batch)
    original = torch.from_numpy(split.read(np.arange(3))).permute(0, 3, 1, 2) / 255
    assert (made["original"] - original).abs().max() < 1e-5
    book = load_codebook(visual_tokens).pixels
    predicted = (states @ model.head.codes.weight.T).argmax(2)
    for name, shown in (("codes", codes), ("rebuilt", torch.where(hidden, predicted, codes))):
        pixels = book[shown.numpy()].transpose(0, 1, 4, 2, 3).reshape(3, 16, -1) / 255
        assert (patches_of(made[name], 4) - torch.from_numpy(pixels)).abs().max() < 1e-6
    assert torch.equal(patches_of(made["visible"], 4)[~hidden], patches_of(made["original"], 4)[~hidden])
    assert (patches_of(made["visible"], 4)[hidden] - 0.5).abs().max() < 1e-6


def test_a_run_brings_its_codes_along(batches, model, tmp_path):
    state = {name: each.clone() for name, each in batches.objective.memory.state_dict().items()}
    config = batches.objective.config.replace(visual_tokenizer=str(tmp_path / "gone"))
    moved = type(batches.objective)(config, batches.objective.form)
    restore(moved, model, state)
    batch = batches.batch(0)
    assert torch.equal(moved.loss(model, batch)["beit"], batches.objective.loss(model, batch)["beit"])
    assert with_codes(config.replace(visual_codes=0), config).objective.visual_codes == 12


def test_a_tokenizer_that_changed_since_the_run_began_is_not_used(batches, model, pictures, tmp_path):
    state = {name: each.clone() for name, each in batches.objective.memory.state_dict().items()}
    for codes in (12, 7):
        out = tmp_path / str(codes)
        build_visual_tokens(pictures.directory, out, 4, codes=codes, seed=5, workers=1)
        moved = type(batches.objective)(
            batches.objective.config.replace(visual_tokenizer=str(out)), batches.objective.form
        )
        restore(moved, model, state)
        assert torch.equal(moved.memory.pixels, batches.objective.memory.pixels)


def test_a_run_cannot_begin_without_codes(batches, model, tmp_path):
    config = batches.objective.config.replace(visual_tokenizer=str(tmp_path / "gone"))
    moved = type(batches.objective)(config, batches.objective.form)
    restore(moved, model, {})
    with pytest.raises(UserError, match=r'there is no visual tokenizer ".*gone" here'):
        moved.after_step(model, 0)
    batches.objective.after_step(model, 0)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"visual_tokenizer": ""}, "name one with --visual-tokenizer"),
        ({"visual_tokenizer": "/nowhere"}, 'there is no visual tokenizer "/nowhere"'),
        ({"patch_size": 8}, r"is for patches of 4 pixels and 3 channels, and the model has patches of 8 pixels and 3"),
        ({"image_channels": 1}, r"and the model has patches of 4 pixels and 1 channels"),
        ({"visual_codes": 11}, r'visual_codes is 11, but the visual tokenizer ".*" has 12'),
    ],
)
def test_a_tokenizer_that_is_missing_or_does_not_fit_is_told(batches, changes, told):
    with pytest.raises(UserError, match=told):
        with_codes(batches.objective.config.replace(**changes))
