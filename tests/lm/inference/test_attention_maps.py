from __future__ import annotations

import numpy as np
import pytest
import torch

from data_prep.shards.images import ImageFormat
from lm.config.model_settings import ModelConfig
from lm.inference.attention_maps import STRONGEST, TINT, attention_maps, overlaid
from lm.model.image_transformer import ImageTransformer
from lm.model.transformer import rotary_table

FORM = ImageFormat(12, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
IMAGES = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)


@pytest.fixture(scope="module", params=[{}, {"num_key_value_heads": 2, "qk_norm": True, "num_layers": 1}])
def model(request) -> ImageTransformer:
    shape = {"num_layers": 3, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "image_size": 12, "image_channels": 3}
    made = ImageTransformer(ModelConfig(**shape | request.param)).initialize(0, identity=False).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(1.5)  # so that attention is far from even
    return made


def by_hand(model: ImageTransformer) -> np.ndarray:
    """softmax(q k^T / sqrt(d)) of the last block in float64, with rotary positions as complex numbers."""
    blocks, config = model.blocks, model.config
    positions = torch.tensor([(row, column) for row in range(3) for column in range(3)], dtype=torch.int32)
    rows = positions.expand(5, -1, -1)
    inputs = torch.from_numpy(((IMAGES / 255.0 - FORM.mean) / FORM.std).transpose(0, 3, 1, 2)).float()
    everything = torch.zeros(5, 9, dtype=torch.int32), torch.full((5, 9), 9, dtype=torch.int32)
    with torch.no_grad():
        before = model.embedding(model.embedding.cut(inputs))
        for block in list(blocks)[:-1]:
            before = block(before, rotary_table(rows, config.head_width, config.rope_theta), everything, None, 0)
    attention, last = blocks[-1].attention, blocks[-1]

    def normed(x: np.ndarray, norm) -> np.ndarray:
        if norm is None:
            return x
        weight = norm.weight.detach().double().numpy()
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + norm.epsilon) * weight

    x = normed(before.double().numpy(), last.attention_norm)
    width = config.head_width
    frequencies = config.rope_theta ** (-np.arange(0, width, 2) / width)
    row, column = positions.double().numpy().T
    angles = np.concatenate([np.outer(row, frequencies[0::2]), np.outer(column, frequencies[1::2])], axis=1)

    def heads(linear, norm) -> np.ndarray:
        y = x @ linear.weight.detach().double().numpy().T
        y = normed(y.reshape(5, 9, -1, width), norm)
        return (y[..., : width // 2] + 1j * y[..., width // 2 :]) * np.exp(1j * angles)[:, None]

    q, k = heads(attention.query, attention.query_norm), heads(attention.key, attention.key_norm)
    k = np.repeat(k, q.shape[2] // k.shape[2], axis=2)
    scores = np.einsum("nqhd,nkhd->nhqk", q, k.conj()).real / np.sqrt(width)
    exponentials = np.exp(scores)
    return (exponentials / exponentials.sum(-1, keepdims=True)).mean(2).reshape(5, 4, 3, 3)


def test_maps_are_the_query_averaged_softmax_of_the_last_block(model):
    found, expected = attention_maps(model, FORM, IMAGES), by_hand(model)
    assert found.dtype == np.float32
    assert expected.max() > 2 / 9  # far from even
    assert np.abs(found - expected).max() < 1e-5


def test_the_shares_of_each_head_sum_to_one_and_parts_of_any_length_give_the_same(model):
    found = attention_maps(model, FORM, IMAGES)
    assert found.shape == (5, 4, 3, 3)
    assert np.abs(found.sum((2, 3)) - 1).max() < 1e-6
    assert np.abs(attention_maps(model, FORM, IMAGES, rows=2) - found).max() < 1e-6
    assert attention_maps(model, FORM, IMAGES[:0]).shape == (0, 4, 3, 3)


def test_the_model_has_no_hook_left(model):
    attention_maps(model, FORM, IMAGES)
    assert not model.blocks[-1].attention._forward_pre_hooks


def test_the_overlay_is_the_gray_image_with_a_tint_by_share():
    shares = np.array([[0.5, 0.25], [0.25, 0.0]], dtype=np.float32)
    image = IMAGES[0, :8, :8]
    found = overlaid(image, shares)
    assert (found.shape, found.dtype) == ((8, 8, 3), np.uint8)
    gray, tint = image.astype(float).mean(2, keepdims=True), np.array(TINT)
    for (row, column), opacity in {(0, 0): STRONGEST, (0, 1): STRONGEST / 2, (1, 1): 0.0}.items():
        patch = slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4)
        assert np.abs(found[patch] - (gray[patch] * (1 - opacity) + tint * opacity)).max() <= 0.5
    assert (overlaid(image[..., :1], shares)[4:, 4:] == image[4:, 4:, :1]).all()
