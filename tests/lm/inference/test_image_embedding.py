from __future__ import annotations

import numpy as np
import pytest
import torch

from data_prep.errors import UserError
from data_prep.shards.images import ImageFormat
from lm.config.model_settings import ModelConfig
from lm.inference.image_embedding import image_vectors
from lm.model.image_transformer import ImageTransformer

FORM = ImageFormat(8, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
CONFIG = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, patch_size=4, image_size=8, image_channels=3)
IMAGES = np.random.default_rng(0).integers(0, 256, (11, 8, 8, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def model() -> ImageTransformer:
    return ImageTransformer(CONFIG).initialize(0, identity=False).eval()


def test_vectors_are_the_mean_over_the_patches_of_normalized_pixels(model):
    found = {layer: image_vectors(model, FORM, [IMAGES], layer) for layer in (-1, 0, 1, 2)}
    inputs = (IMAGES / 255.0 - FORM.mean) / FORM.std  # float64
    patches = inputs.reshape(11, 2, 4, 2, 4, 3).transpose(0, 1, 3, 5, 2, 4).reshape(11, 4, 48)
    embedded = patches @ model.embedding.projection.weight.detach().numpy().astype(np.float64).T
    embedded /= np.sqrt((embedded**2).mean(2, keepdims=True) + CONFIG.norm_epsilon)
    assert np.abs(found[0] - embedded.mean(1)).max() < 1e-6
    rows, columns = torch.meshgrid(torch.arange(2), torch.arange(2), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], 1).int().expand(11, -1, -1)
    everything = torch.zeros(11, 4, dtype=torch.int32), torch.full((11, 4), 4, dtype=torch.int32)
    with torch.no_grad():
        hidden = model.blocks(torch.from_numpy(embedded).float(), positions, *everything, None)
    assert np.abs(found[-1] - hidden.numpy().mean(1)).max() < 1e-5
    assert (found[2] == found[-1]).all()
    assert np.abs(found[1] - found[2]).max() > 1e-3


def test_an_image_has_the_same_vector_however_images_are_parted(model):
    whole = image_vectors(model, FORM, [IMAGES])
    parts = image_vectors(model, FORM, (IMAGES[first : first + 4] for first in range(0, 11, 4)), rows=3)
    assert whole.dtype == np.float32
    assert whole.shape == parts.shape == (11, 16)
    assert np.abs(whole - parts).max() < 1e-5
    assert image_vectors(model, FORM, []).shape == (0, 16)


def test_normalized_vectors_have_length_one_and_the_same_direction(model):
    vectors, unit = (image_vectors(model, FORM, [IMAGES], normalize=each) for each in (False, True))
    assert np.abs(unit - vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).max() < 1e-6


def test_the_model_stays_frozen(model):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    image_vectors(model, FORM, [IMAGES])
    assert all((weight == before[name]).all() for name, weight in model.state_dict().items())
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.training
    with pytest.raises(AssertionError, match="frozen"):
        image_vectors(ImageTransformer(CONFIG).initialize(0), FORM, [IMAGES])


def test_a_layer_that_is_not_there_is_refused(model):
    with pytest.raises(UserError, match=r"no layer 3: the model has 0 \(the embeddings\) to 2"):
        image_vectors(model, FORM, [IMAGES], 3)
