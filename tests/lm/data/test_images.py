"""The images of each step, and what the data decides about the settings."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from data_prep.errors import UserError
from data_prep.pipeline.images import build_images
from lm.data.datasets import open_training_data, settled
from lm.data.image_corpora import ImageCorpora, with_images
from lm.data.images import HeldOutImages, TrainingImages
from tests.lm.conftest import draw_pictures


@pytest.fixture(scope="module")
def corpora(pictures) -> ImageCorpora:
    return ImageCorpora([pictures])


def test_an_epoch_has_every_image_once_and_epochs_differ(corpora, seeing):
    config = with_images(seeing.replace(batch_images=8), corpora)
    rows, split = TrainingImages(corpora, config), corpora.datasets[0].split("train")
    steps = split.count  # eight epochs
    found = np.concatenate([rows.of_step(step).images for step in range(steps)]).reshape(8, split.count, -1)
    everything = split.read(np.arange(split.count)).reshape(split.count, -1)
    for epoch in found:
        assert sorted(map(bytes, epoch)) == sorted(map(bytes, everything))
    assert not np.array_equal(found[0], found[1])
    assert rows.epochs(steps) == 8
    numbers = np.concatenate([rows.of_step(step).numbers for step in range(3)])
    assert numbers.tolist() == list(range(24))


def test_datasets_share_the_images_by_weight(pictures, seeing, tmp_path):
    build_images([draw_pictures(tmp_path / "files", 6)], tmp_path / "b", 16, validation_fraction=0, workers=1)
    config = seeing.replace(data=(f"{pictures.directory}@3", f"{tmp_path / 'b'}@1"))
    corpora = open_training_data(config.data.data)
    assert corpora.weights == [Fraction(3), Fraction(1)]
    rows = TrainingImages(corpora, settled(config, corpora))
    _, located = rows.located(0)
    assert (located.texts == 1).sum() == 3
    assert "25.0% of the images" in rows.introduction(10)[1]
    both = HeldOutImages(corpora, "train")
    first, second = corpora.splits("train")
    numbers = np.array([first.count + 2, 0, first.count, first.count - 1])
    expected = [second.read(np.array([2])), first.read(np.array([0])), second.read(np.array([0]))]
    assert np.array_equal(both.read(numbers)[:3], np.concatenate(expected))
    assert both.classes == ["left", "none", "top"]
    assert both.labels[first.count] == second.labels[0]


def test_the_data_decides_size_channels_and_tokens(corpora, seeing):
    config = with_images(seeing, corpora)
    assert (config.model.image_size, config.model.image_channels) == (16, 3)
    assert (config.data.context_length, config.data.batch_tokens, config.data.batch_rows) == (16, 192, 12)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"patch_size": 5}, "patch_size 5 does not cut images of 16 pixels into patches: choose one of 1, 2, 4, 8"),
        ({"patch_size": 16}, "patch_size 16 does not cut"),
        ({"image_size": 32}, "image_size is 32, but the images of"),
        ({"image_channels": 1}, "image_channels is 1, but the images of"),
    ],
)
def test_settings_that_the_images_do_not_fit_are_refused(corpora, seeing, changes, words):
    with pytest.raises(UserError, match=words):
        with_images(seeing.replace(**changes), corpora)


def test_text_and_images_are_told_apart(pictures, dataset, seeing, small):
    with pytest.raises(UserError, match=r"has images, and .* has text"):
        open_training_data((str(pictures.directory), str(dataset.directory)))
    with pytest.raises(UserError, match="holds images, and these settings are for text"):
        settled(small, open_training_data((str(pictures.directory),)))
    with pytest.raises(UserError, match="holds text, and these settings are for images"):
        settled(seeing, open_training_data((str(dataset.directory),)))


def test_datasets_of_several_sizes_are_refused(pictures, tmp_path):
    gray = build_images([draw_pictures(tmp_path / "files", 2)], tmp_path / "b", 16, channels=1, workers=1)
    words = "of 16 pixels and 1 channel, and .* of 16 pixels and 3 channels: prepare them with the same --size and --ch"
    with pytest.raises(UserError, match=words):
        ImageCorpora([pictures, gray], [Fraction(1), Fraction(1)])
