from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from data_prep.errors import UserError
from lm import api
from lm.inference.image_embedding import image_vectors
from lm.inference.image_model import ImageEncoder, in_parts, pixels_of_all
from tests.lm.conftest import draw_pictures


@pytest.fixture(scope="module")
def encoder(seeing_run) -> ImageEncoder:
    return ImageEncoder(seeing_run.load_image_model(torch.device("cpu")), seeing_run.image_format, seeing_run.config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("images") / "files", count=3)


def test_a_folder_paths_pillow_images_and_arrays_have_the_same_vectors(encoder, folder):
    paths = sorted(folder.rglob("*.png"))
    images = [Image.open(path) for path in paths]
    arrays = np.stack([np.asarray(image) for image in images])
    wanted = image_vectors(encoder.model, encoder.form, [arrays])
    assert wanted.shape == (9, 32)
    for given in (folder, str(folder), paths, images, list(arrays), arrays):
        assert np.array_equal(encoder.embed(given), wanted)
    assert np.abs(np.linalg.norm(encoder.embed(images, normalize=True), axis=1) - 1).max() < 1e-6
    assert not np.array_equal(encoder.embed(images, layer=0), wanted)
    assert encoder.embed([]).shape == (0, 32)


def test_of_an_image_of_another_size_the_middle_is_scaled(encoder):
    ramp = np.repeat(np.linspace(0, 250, 50)[None, :], 30, axis=0).astype(np.uint8)  # brighter to the right
    (pixels,) = pixels_of_all([np.stack([ramp] * 3, 2)], encoder.form)
    assert pixels.shape == (16, 16, 3)
    middles = 10 + (np.arange(16) + 0.5) * 30 / 16  # of the 30 columns in the middle
    assert np.abs(pixels[8, 1:-1, 0] - (middles[1:-1] - 0.5) * 250 / 49).max() < 2


@pytest.mark.parametrize("given", [np.zeros((8, 8, 3), np.uint8), Image.new("L", (8, 8)), 3])
def test_a_single_image_must_be_in_a_list(encoder, given):
    with pytest.raises(UserError, match="even if it is only one"):
        encoder.embed(given)


def test_each_method_that_only_models_of_text_have_is_refused(seeing_run):
    model = api.load(seeing_run, device="cpu")
    methods = {name for name, method in vars(api.Model).items() if callable(method) and not name.startswith("_")}
    for name in methods - set(dir(api.ImageModel)):
        with pytest.raises(UserError, match=f"reads images, so there is no {name}: use embed"):
            getattr(model, name)
    with pytest.raises(AttributeError, match="has no attribute 'generated'"):
        model.generated  # noqa: B018


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.zeros((0, 5, 3), np.uint8), r"image 0: a side below 4 pixels \(5 x 0\)"),
        (Image.new("L", (0, 5)), r"image 0: a side below 4 pixels \(0 x 5\)"),
        (Image.new("La", (5, 5)), "image 0: conversion from La"),
        (np.zeros((5, 5, 2), np.uint8), r"image 0 is an array of uint8 with the shape \(5, 5, 2\)"),
        ("no\0file.png", "embedded null byte"),
    ],
)
def test_what_is_no_image_is_refused_by_its_number(encoder, given, message):
    with pytest.raises(UserError, match=message):
        encoder.embed([given])


def test_an_image_that_cannot_be_read_is_an_error_since_rows_must_match(encoder, folder, tmp_path):
    for name in ("a.png", "c.png"):
        (tmp_path / name).write_bytes((folder / "top" / "000.png").read_bytes())
    (tmp_path / "b.png").write_text("no picture")
    with pytest.raises(UserError, match=r"b.png: not an image"):
        encoder.embed(tmp_path)
    (tmp_path / "c.png").unlink()  # the last one, too
    with pytest.raises(UserError, match=r"b.png: not an image"):
        encoder.embed(tmp_path)


def test_parts_have_all_in_order():
    assert list(in_parts(iter(range(7)), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(in_parts(iter([]), 3)) == []
