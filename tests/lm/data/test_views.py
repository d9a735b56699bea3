"""Views equal Pillow's within its rounding to whole numbers, and depend on nothing but their own draws."""

from __future__ import annotations

import colorsys
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as given_settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from lm.config.view_settings import ViewsConfig
from lm.data.views import COLUMNS, Draw, alike, contact_sheet, draw_views, make_views, without_color

EVERYTHING = ViewsConfig(solarize=0.3)
LEVEL = 1 / 255  # of Pillow's whole numbers


def pictures(count: int, height: int, width: int, channels: int = 3, *, low: int = 0, high: int = 256) -> torch.Tensor:
    """Smooth random images: noise of a coarse grid, enlarged."""
    noise = np.random.default_rng(height + width).integers(low, high, (count, 7, 7, 3), dtype=np.uint8)
    images = [np.asarray(Image.fromarray(one).resize((width, height), Image.Resampling.BICUBIC)) for one in noise]
    return torch.from_numpy(np.clip(np.stack(images), low, high - 1)[..., :channels].copy())


def draws(count: int = 1, **changed: float) -> torch.Tensor:
    """Draws that change nothing, but for what is named."""
    found = torch.zeros(count, COLUMNS)
    found[:, [Draw.AREA, Draw.RATIO, Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION]] = 1.0
    for name, value in changed.items():
        found[:, Draw[name.upper()]] = value
    return found


def view(image: torch.Tensor, *, size: int = 0, **changed: float) -> np.ndarray:
    """The view (height, width, C) of one image (height, width, C) by these draws."""
    made = make_views(image[None], draws(**changed), size or len(image), EVERYTHING)
    return made[0].permute(1, 2, 0).numpy()


def farthest(found: np.ndarray, expected: object) -> float:
    """The largest difference from a picture of Pillow, in its levels."""
    return float(np.abs(found.squeeze() * 255 - np.asarray(expected, dtype=np.float64)).max())


@pytest.mark.parametrize(("height", "width", "size"), [(32, 32, 32), (96, 96, 32), (24, 40, 32), (64, 48, 9)])
def test_a_crop_is_what_pillow_resizes(height, width, size):
    images = pictures(8, height, width)
    drawn = draw_views(3, np.arange(8), 1, without_color(ViewsConfig(crop_area=0.08, crop_ratio=1.5)))[:, 0]
    made = make_views(images, drawn, size, without_color(ViewsConfig()))
    for image, draw, found in zip(images.numpy(), drawn.double().numpy(), made.numpy(), strict=True):
        area = draw[Draw.AREA]
        ratio = min(max(draw[Draw.RATIO], area * width / height), width / height / area)  # the nearest that fits
        w, h = (area * ratio * width * height) ** 0.5, (area / ratio * width * height) ** 0.5
        x, y = draw[Draw.LEFT] * (width - w), draw[Draw.TOP] * (height - h)
        box = (max(x, 0), max(y, 0), min(x + w, width), min(y + h, height))
        for channel in range(3):
            # In 32-bit floating point Pillow does not round to whole numbers.
            plane = Image.fromarray(image[:, :, channel].astype(np.float32))
            expected = np.asarray(plane.resize((size, size), Image.Resampling.BILINEAR, box=box))
            if draw[Draw.FLIP]:
                expected = expected[:, ::-1]
            assert farthest(found[channel], expected) < 2e-3
    assert 0 < drawn[:, Draw.FLIP].sum() < 8


def test_a_crop_of_everything_is_the_image():
    (image,) = pictures(1, 32, 32)
    assert farthest(view(image), image) < 1e-4
    assert farthest(view(image, flip=1), ImageOps.mirror(Image.fromarray(image.numpy()))) < 1e-4


def test_a_smaller_view_is_averaged_and_not_sampled():
    """A checkerboard of single pixels is gray at a third of its size; every third pixel would be black or white."""
    board = torch.from_numpy((np.indices((96, 96)).sum(0) % 2 * 255).astype(np.uint8))[:, :, None]
    assert np.abs(view(board, size=32) - 0.5).max() < 0.06


ENHANCED = {
    "brightness": ImageEnhance.Brightness,
    "contrast": ImageEnhance.Contrast,
    "saturation": ImageEnhance.Color,
}


@pytest.mark.parametrize("name", ENHANCED)
@pytest.mark.parametrize("factor", [0.0, 0.6, 1.0, 1.3])
def test_one_change_of_color_is_that_of_pillow(name, factor):
    """Pillow cuts to whole levels, and rounds the mean and the luma to them as well."""
    (image,) = pictures(1, 32, 32, low=90, high=170)
    expected = ENHANCED[name](Image.fromarray(image.numpy())).enhance(factor)
    assert farthest(view(image, **{name: factor}), expected) <= 1.5
    assert factor == 1 or farthest(view(image), expected) > 5


def test_changes_of_color_together_are_those_of_pillow_in_any_order():
    (image,) = pictures(1, 32, 32, low=90, high=150)
    factors = {"brightness": 1.25, "contrast": 0.7, "saturation": 1.4}
    found = view(image, **factors)
    for order in itertools.permutations(ENHANCED):
        changed = Image.fromarray(image.numpy())
        for name in order:
            changed = ENHANCED[name](changed).enhance(factors[name])
        assert farthest(found, changed) < 4  # each of the three is off by up to 1.5, and the next enlarges it


def test_contrast_is_about_the_mean_of_the_crop():
    image = torch.full((32, 32, 3), 200, dtype=torch.uint8)
    image[:, 16:] = 40
    left = view(image, size=8, area=0.2, contrast=0.5)  # all of it is the bright half
    assert np.abs(left - 200 / 255).max() < 1e-6


def test_gray_is_the_luma_of_pillow():
    (image,) = pictures(1, 32, 32)
    gray = view(image, saturation=0, hue=0.1)
    assert np.ptp(gray, axis=2).max() < 1e-6
    assert farthest(gray[:, :, 0], Image.fromarray(image.numpy()).convert("L")) <= 1


@pytest.mark.parametrize("turns", [-0.25, -0.1, 0.1, 0.25])
def test_hue_moves_along_the_color_circle_and_keeps_the_mean(turns):
    """The angle about the gray axis and the hue of HSV, on a hexagon, differ by at most 1.12 degrees."""
    (image,) = pictures(1, 16, 16, low=100, high=150)
    found = view(image, hue=turns)
    for before, after in zip(image.reshape(-1, 3).numpy() / 255, found.reshape(-1, 3), strict=True):
        moved = colorsys.rgb_to_hsv(*after)[0] - colorsys.rgb_to_hsv(*before)[0] - turns
        if np.ptp(before) > 0.02:
            assert abs((moved + 0.5) % 1 - 0.5) < 2 * 1.13 / 360
        assert abs((after - before).mean()) < 1e-6


def test_gray_images_have_brightness_and_contrast_only():
    (image,) = pictures(1, 32, 32, channels=1, low=90, high=170)
    plain = Image.fromarray(image[:, :, 0].numpy())
    expected = ImageEnhance.Contrast(ImageEnhance.Brightness(plain).enhance(1.2)).enhance(0.7)
    for other in ({}, {"saturation": 0.0, "hue": 0.1}):
        assert farthest(view(image, brightness=1.2, contrast=0.7, **other), expected) < 2.5


@pytest.mark.parametrize("sigma", [0.5, 1.0, 1.5, 2.0])
def test_the_sigma_of_blur_is_the_radius_of_pillow(sigma):
    """Pillow's three box blurs come near a Gaussian; a radius that is off by 15 % is farther away."""
    image = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (96, 96, 1), dtype=np.uint8))

    def rms(radius: float) -> float:
        expected = Image.fromarray(image[:, :, 0].numpy()).filter(ImageFilter.GaussianBlur(radius))
        return float(np.sqrt(np.mean((found[:, :, 0] * 255 - np.asarray(expected, dtype=np.float64)) ** 2)))

    found = view(image, blur=sigma)
    assert rms(sigma) < min(rms(sigma * 0.85), rms(sigma * 1.15))
    assert rms(sigma) < 0.06 * np.std(image.numpy())


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_sigma_is_the_standard_deviation_of_a_blurred_point(sigma):
    point = torch.zeros(65, 65, 1, dtype=torch.uint8)
    point[32, 32] = 255
    for blurred in (view(point, blur=sigma)[:, :, 0], view(point, blur=sigma, size=65, flip=1)[:, :, 0]):
        distances = np.arange(65) - 32
        assert blurred.sum() == pytest.approx(1, abs=1e-5)
        for axis in (0, 1):
            assert np.sqrt(blurred.sum(axis) @ distances**2) == pytest.approx(sigma, rel=0.01)


def test_blur_continues_the_pixels_at_the_edge():
    image = torch.full((64, 64, 3), 180, dtype=torch.uint8)
    assert farthest(view(image, blur=2.0), image) < 1e-3


def test_views_below_64_pixels_are_not_blurred():
    (image,) = pictures(1, 96, 96)
    assert np.array_equal(view(image, size=63, blur=2.0), view(image, size=63))
    assert not np.array_equal(view(image, size=64, blur=2.0), view(image, size=64))


def test_solarizing_is_that_of_pillow():
    (image,) = pictures(1, 32, 32)
    assert farthest(view(image, solarize=1), ImageOps.solarize(Image.fromarray(image.numpy()), 128)) < 1e-4


def test_views_stay_between_0_and_1():
    drawn = draw_views(0, np.arange(64), 1, ViewsConfig(color_jitter=1.25, color_jitter_rate=1.0, solarize=0.5))[:, 0]
    made = make_views(pictures(64, 32, 32), drawn, 32, EVERYTHING)
    assert made.dtype == torch.float32
    assert made.shape == (64, 3, 32, 32)
    assert made.min() == 0
    assert made.max() == 1


@pytest.mark.parametrize("size", [16, 64])
def test_a_view_does_not_depend_on_the_other_rows(size):
    images, numbers = pictures(40, 64, 64), np.arange(40) * 7 + 2**40
    drawn = draw_views(5, numbers, 2, EVERYTHING)
    assert torch.equal(draw_views(5, numbers, 1, EVERYTHING), drawn[:, :1])
    whole = make_views(images, drawn[:, 1], size, EVERYTHING)
    order = np.random.default_rng(0).permutation(40)
    for rows in (order, order[:7], order[:1]):
        again = draw_views(5, numbers[rows], 2, EVERYTHING)
        assert torch.equal(again, drawn[rows])
        assert torch.allclose(make_views(images[rows], again[:, 1], size, EVERYTHING), whole[rows], rtol=0, atol=1e-6)


def test_seed_number_and_view_each_give_other_draws():
    first = draw_views(5, np.array([1, 2]), 2, EVERYTHING)[..., Draw.AREA]
    second = draw_views(6, np.array([1, 2]), 2, EVERYTHING)[..., Draw.AREA]
    assert len(torch.cat([first.flatten(), second.flatten()]).unique()) == 8


def test_draws_are_distributed_as_the_settings_say():
    settings = ViewsConfig(crop_area=0.3, crop_ratio=1.6, flip=0.4, grayscale=0.25, blur=0.6, solarize=0.1)
    drawn = draw_views(1, np.arange(20_000), 2, settings).double().flatten(0, 1).T
    share = {name: drawn[Draw[name]] for name in Draw.__members__}

    def spread_evenly(values: torch.Tensor, low: float, high: float) -> None:
        places = torch.sort((values - low) / (high - low)).values
        distance = (places - torch.linspace(0, 1, len(places), dtype=places.dtype)).abs().max()
        assert distance < 2 / len(places) ** 0.5  # Kolmogorov and Smirnov: one seed in 1,500 would fail

    spread_evenly(share["AREA"], 0.3, 1)
    spread_evenly(share["RATIO"].log(), -np.log(1.6), np.log(1.6))
    spread_evenly(share["LEFT"], 0, 1)
    spread_evenly(share["TOP"], 0, 1)
    jittered = share["BRIGHTNESS"] != 1
    for name in ("BRIGHTNESS", "CONTRAST"):
        spread_evenly(share[name][jittered], 0.6, 1.4)
    spread_evenly(share["SATURATION"][jittered & (share["SATURATION"] > 0)], 0.6, 1.4)
    spread_evenly(share["HUE"][jittered], -0.1, 0.1)
    spread_evenly(share["BLUR"][share["BLUR"] > 0], 0.1, 2)
    for chosen, expected in (
        (share["FLIP"] == 1, 0.4),
        (jittered, 0.8),
        (share["SATURATION"] == 0, 0.25),
        (share["BLUR"] > 0, 0.6),
        (share["SOLARIZE"] == 1, 0.1),
    ):
        assert chosen.double().mean().item() == pytest.approx(expected, abs=0.01)  # over four standard deviations
    assert torch.equal(share["CONTRAST"] != 1, jittered)
    continuous = drawn[[Draw.AREA, Draw.RATIO, Draw.LEFT, Draw.TOP, Draw.BRIGHTNESS, Draw.CONTRAST, Draw.HUE]]
    correlation = torch.corrcoef(torch.cat([continuous[:, ::2], continuous[:, 1::2]])) - torch.eye(14)
    assert correlation.abs().max() < 0.035  # five standard deviations


@given_settings(max_examples=30, deadline=None)
@given(st.integers(8, 40), st.integers(8, 40), st.floats(0.05, 1), st.floats(0.3, 3), st.floats(0, 1), st.floats(0, 1))
def test_a_crop_has_its_area_and_stays_inside(height, width, area, ratio, left, top):
    """Two ramps show where the crop is: the middle of its first and last pixels."""
    ramps = np.stack(np.broadcast_arrays(np.arange(height)[:, None], np.arange(width), 0), axis=2).astype(np.uint8)
    size = 64  # enlarged, so the two inner halves of the view are exact interpolations
    made = view(torch.from_numpy(ramps), size=size, area=area, ratio=ratio, left=left, top=top) * 255
    inside = slice(size // 4, 3 * size // 4)
    slopes, middles = [], []
    for axis, found in enumerate((made[:, size // 2, 0], made[size // 2, :, 1])):
        step = (found[inside][-1] - found[inside][0]) / (size // 2 - 1)
        slopes.append(step * size)
        middles.append((found[inside][0] + found[inside][-1]) / 2 + 0.5)
        assert middles[axis] - slopes[axis] / 2 > -0.02
        assert middles[axis] + slopes[axis] / 2 < (height, width)[axis] + 0.02
    if min(slopes) > 4:  # in the inner half of a crop of fewer pixels a pixel of the edge may count
        assert slopes[0] * slopes[1] == pytest.approx(area * height * width, rel=1e-3)


def test_crop_and_flip_alone_are_the_views_of_draws_without_color():
    images, drawn = pictures(6, 64, 64), draw_views(2, np.arange(6), 1, EVERYTHING)[:, 0]
    plain = drawn.clone()
    plain[:, Draw.BRIGHTNESS :] = draws()[0, Draw.BRIGHTNESS :]
    expected = make_views(images, plain, 64, EVERYTHING)
    settings = without_color(EVERYTHING)
    assert torch.allclose(make_views(images, drawn, 64, settings), expected, atol=1e-6)
    assert torch.equal(draw_views(2, np.arange(6), 1, settings)[:, 0], plain)


def test_autocast_does_not_make_views_coarser():
    images, drawn = pictures(4, 32, 32), draw_views(2, np.arange(4), 1, EVERYTHING)[:, 0]
    expected = make_views(images, drawn, 32, EVERYTHING)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(make_views(images, drawn, 32, EVERYTHING), expected)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_contact_sheet_has_each_image_and_its_views(channels):
    images = pictures(3, 32, 32, channels)
    sheet = contact_sheet(images, EVERYTHING, 4, 2)
    assert sheet.shape[:2] == (3 * 34 - 2, 3 * 34 - 2)
    assert Image.fromarray(sheet).size == (100, 100)
    drawn = draw_views(4, np.arange(3), 2, EVERYTHING)
    for row in range(3):
        tiles = [images[row : row + 1].permute(0, 3, 1, 2) / 255]
        tiles += [make_views(images[row : row + 1], drawn[row : row + 1, v], 32, EVERYTHING) for v in range(2)]
        for column, tile in enumerate(tiles):
            found = sheet[row * 34 : row * 34 + 32, column * 34 : column * 34 + 32].reshape(32, 32, channels)
            assert farthest(found / 255, (tile[0].permute(1, 2, 0) * 255).squeeze().numpy()) <= 0.51
    assert (sheet[32:34] == 255).all()


def test_the_first_view_may_be_blurred_and_the_second_solarized_more_often():
    settings = ViewsConfig(blur=0.1, first_blur=0.9, solarize=0.0, second_solarize=0.4)
    drawn = draw_views(0, np.arange(500), 3, settings)
    blurred, solarized = ((drawn[..., column] > 0).float().mean(0).tolist() for column in (Draw.BLUR, Draw.SOLARIZE))
    assert blurred == [1.0, pytest.approx(0.1, abs=0.05), pytest.approx(0.1, abs=0.05)]
    assert solarized == [0.0, pytest.approx(0.4, abs=0.07), 0.0]
    plain = draw_views(0, np.arange(500), 3, alike(settings))
    assert torch.equal(plain[:, 2], drawn[:, 2])
    white = torch.full((1, 16, 16, 3), 255, dtype=torch.uint8)
    of_white = drawn[drawn[:, 1, Draw.SOLARIZE] > 0, 1][:1]
    assert float(make_views(white, of_white, 16, settings).mean()) < 0.5
