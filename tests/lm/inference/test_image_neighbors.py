from __future__ import annotations

import numpy as np
import pytest

from data_prep.shards.images import ImageFormat
from lm.config.model_settings import ModelConfig
from lm.data.image_files import Picture
from lm.inference import image_neighbors
from lm.inference.image_embedding import image_vectors
from lm.inference.image_neighbors import AT_ONCE, ImageBank, image_bank
from lm.model.image_transformer import ImageTransformer

FORM = ImageFormat(8, 3, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
CONFIG = ModelConfig(num_layers=1, hidden_size=16, num_heads=2, patch_size=4, image_size=8, image_channels=3)


@pytest.fixture(scope="module")
def model() -> ImageTransformer:
    return ImageTransformer(CONFIG).initialize(0, identity=False).eval()


def pictures(count: int, size: int = 8, channels: int = 3) -> list[Picture]:
    draw = np.random.default_rng(0)
    return [Picture(f"{n}", None, draw.integers(0, 256, (size, size, channels), dtype=np.uint8)) for n in range(count)]


def test_the_nearest_have_the_largest_cosine_whatever_the_length_of_the_vector():
    vectors = np.random.default_rng(1).normal(size=(20, 5)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    bank, asked = ImageBank(vectors, pictures(20)), np.array([3, -1, 2, 0, 5], dtype=np.float32)
    angles = np.arccos(vectors.astype(np.float64) @ asked / np.sqrt(39))
    found = bank.nearest(asked, 4)
    assert [picture.name for picture, _ in found] == [str(n) for n in np.argsort(angles)[:4]]
    assert [cosine for _, cosine in found] == pytest.approx(np.cos(np.sort(angles)[:4]), abs=1e-6)
    assert len(bank.nearest(asked, 50)) == 20
    assert all(cosine == 0 for _, cosine in bank.nearest(np.zeros(5, dtype=np.float32), 3))


def test_a_bank_has_the_features_of_all_its_pictures(model):
    given = pictures(AT_ONCE + 5)
    bank = image_bank(model, FORM, iter(given))
    expected = image_vectors(model, FORM, [np.stack([each.pixels for each in given])], normalize=True)
    assert np.abs(bank.vectors - expected).max() < 1e-6
    assert [picture.name for picture in bank.pictures] == [picture.name for picture in given]
    assert all(np.array_equal(kept.pixels, each.pixels) for kept, each in zip(bank.pictures, given, strict=True))
    assert image_bank(model, FORM, []).vectors.shape == (0, 16)


def test_when_the_time_is_over_no_more_pictures_are_read(model, monkeypatch):
    class Clock:
        seconds = 0.0

        def monotonic(self) -> float:
            self.seconds += 2
            return self.seconds

    monkeypatch.setattr(image_neighbors, "time", Clock())
    rest = iter(pictures(10 * AT_ONCE))
    bank = image_bank(model, FORM, rest, seconds=5)  # 2 at the start, 4 after one part, 6, 8
    assert len(bank.pictures) == len(bank.vectors) == 3 * AT_ONCE
    assert len(list(rest)) == 7 * AT_ONCE


def test_large_pictures_are_kept_small(model):
    form = ImageFormat(200, 1, (0.5,), (0.25,))
    large = ImageTransformer(
        ModelConfig(num_layers=1, hidden_size=16, num_heads=2, patch_size=100, image_size=200, image_channels=1)
    )
    given = [Picture("", "a", np.full((200, 200, 1), 7, dtype=np.uint8))]
    (kept,) = image_bank(large.initialize(0).eval(), form, given).pictures
    assert (kept.pixels == np.full((96, 96, 1), 7)).all()
    assert kept.label == "a"
