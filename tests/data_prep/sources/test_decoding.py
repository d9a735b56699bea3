from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from data_prep.sources.decoding import (
    CMYK,
    DEEP,
    FRAMES,
    TRANSPARENT,
    TURNED,
    BadImage,
    decode,
    decode_noting,
    looks_gray,
    square,
    upright,
)
from tests.data_prep.handmade_images import encoded, picture, unusable_images, usable_images, with_exif

USABLE, UNUSABLE = usable_images(), unusable_images()


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("name", USABLE)
def test_usable_images_become_gray_or_rgb(name: str) -> None:
    image = decode(USABLE[name])
    assert image.mode in ("L", "RGB")
    assert upright(image).image is image, "what is upright and plain already stays as it is"


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_images_have_a_reason(name: str) -> None:
    reason, data = UNUSABLE[name]
    with pytest.raises(BadImage) as error:
        decode(data)
    assert error.value.reason.startswith(reason)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_pillow_turns_them(orientation: int) -> None:
    image = picture(1)
    data = with_exif(image, orientation, "PNG")
    found = decode_noting(data)
    reference = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    assert (pixels(found.image) == pixels(reference)).all()
    assert (TURNED in found.changes) == (orientation > 1)
    assert upright(found.image).image.size == found.image.size, "it is not turned twice"


def test_transparent_parts_become_white() -> None:
    image, alpha = picture(1).convert("RGBA"), np.asarray(picture(2, mode="L"))
    image.putalpha(Image.fromarray(alpha))
    found = decode_noting(encoded(image, "PNG"))
    weight = alpha[..., None] / 255
    expected = np.asarray(image)[..., :3] * weight + 255 * (1 - weight)
    assert np.abs(pixels(found.image) - expected).max() <= 1
    assert found.changes == (TRANSPARENT,)
    image.putalpha(255)
    opaque = decode_noting(encoded(image, "PNG"))
    assert opaque.changes == ()
    assert (pixels(opaque.image) == np.asarray(image)[..., :3]).all()


def test_transparent_colors_and_palette_entries_become_white() -> None:
    image = Image.new("RGB", (8, 8), (10, 20, 30))
    image.paste((200, 0, 0), (0, 0, 4, 8))
    found = pixels(decode(encoded(image, "PNG", transparency=(10, 20, 30))))
    assert (found[:, 4:] == 255).all()
    assert (found[:, :4] == (200, 0, 0)).all()
    indexed = image.quantize(2)
    clear = indexed.getpixel((7, 7))
    found = pixels(decode(encoded(indexed, "PNG", transparency=clear)))
    assert (found[:, 4:] == 255).all()
    assert (found[:, :4] == (200, 0, 0)).all()


def test_sixteen_bits_are_scaled_to_eight() -> None:
    values = np.linspace(0, 65535, 64).round().astype(np.uint16).reshape(8, 8)
    for image, kind in ((values, "PNG"), (values, "TIFF"), (values.astype(np.int32), "TIFF")):
        found = decode_noting(encoded(Image.fromarray(image), kind))
        assert (pixels(found.image) == np.rint(values / 257)).all()
        assert found.changes == (DEEP,)
    found = decode_noting(encoded(Image.fromarray((values / 65535).astype(np.float32)), "TIFF"))
    assert np.abs(pixels(found.image) - values / 257).max() <= 0.51


@pytest.mark.parametrize("name", ["animated.gif", "animated.webp", "animated.png", "pages.tif"])
def test_of_several_frames_the_first_is_used(name: str) -> None:
    found = decode_noting(USABLE[name])
    assert found.changes == (FRAMES,)
    difference = np.abs(pixels(found.image) - pixels(picture(0))).mean()
    assert difference < 8 < np.abs(pixels(found.image) - pixels(picture(1))).mean()


def test_a_photo_of_two_lenses_counts_as_one() -> None:
    found = decode_noting(encoded(picture(0), "MPO", save_all=True, append_images=[picture(1)]))
    assert found.changes == ()
    assert np.abs(pixels(found.image) - pixels(picture(0))).mean() < 8


def test_cmyk_is_converted() -> None:
    found = decode_noting(USABLE["cmyk.jpg"])
    assert found.changes == (CMYK,)
    assert np.abs(pixels(found.image) - pixels(picture(0))).mean() < 6


def test_gray_stays_gray_whatever_it_is_stored_in() -> None:
    gray = picture(1, mode="L")
    names = ("gray.png", "gray.jpg", "bits.png", "gray alpha.png", "deep.png", "deep.tif", "integers.tif")
    for data in (encoded(gray.convert("P"), "PNG"), encoded(gray, "GIF"), *(USABLE[name] for name in names)):
        assert decode(data).mode == "L"
        assert looks_gray(data)
    for name in ("plain.jpg", "palette.png", "cmyk.jpg", "alpha.png"):
        assert not looks_gray(USABLE[name]), name
    assert looks_gray(b"")


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (31, 90), (16, 16), (7, 5), (200, 33)])
def test_a_square_is_the_middle_of_the_scaled_image(width: int, height: int) -> None:
    image, size = picture(2, width, height), 16
    found = square(image, size, 3)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    rows, columns = (size * side // min(width, height) for side in (height, width))
    top, left = (rows - size) // 2, (columns - size) // 2
    reference = bicubic(np.asarray(image, float), rows, columns)[top : top + size, left : left + size]
    assert np.abs(found - reference).max() <= 1.5


def bicubic(image: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Scale an image with the cubic filter a = -0.5, stretched when shrinking."""

    def weights(length: int, size: int) -> np.ndarray:
        scale = length / size
        centers = (np.arange(size) + 0.5) * scale
        t = np.abs((np.arange(length) + 0.5 - centers[:, None]) / max(scale, 1.0))
        a = -0.5
        near, far = ((a + 2) * t - (a + 3)) * t * t + 1, a * (((t - 5) * t + 8) * t - 4)
        found = np.where(t < 1, near, np.where(t < 2, far, 0))
        return found / found.sum(1, keepdims=True)

    height, width, _ = image.shape
    return np.clip(np.einsum("ih,hwc,jw->ijc", weights(height, rows), image, weights(width, columns)), 0, 255)


def test_shrinking_averages_instead_of_aliasing() -> None:
    lines = np.zeros((64, 64), np.uint8)
    lines[:, ::2] = 255
    found = square(Image.fromarray(lines), 8, 1).astype(int)
    assert np.abs(found - 127.5).max() < 6


def test_channels_are_as_asked_for() -> None:
    gray, color = picture(1, mode="L"), picture(1)
    three = square(gray, 16, 3)
    assert (three[..., 0] == three[..., 1]).all()
    assert (three[..., 0] == three[..., 2]).all()
    assert (three[..., :1] == square(gray, 16, 1)).all()
    assert (square(color, 16, 1)[..., 0] == square(color.convert("L"), 16, 1)[..., 0]).all()


def test_an_image_of_that_size_keeps_its_pixels() -> None:
    image = picture(1, 16, 16)
    assert (square(image, 16, 3) == np.asarray(image)).all()
