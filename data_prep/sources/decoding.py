"""Decode image files with Pillow: upright, 8 bits a channel, gray or RGB, or a reason why not."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL.Image import Image

# What Pillow may read; its other formats are rare, run programs (EPS) or have no mark to know them by (TGA).
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
MARKS = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"\0\0\0\x0cjP")  # how image files begin
MOST_BYTES = 1 << 29  # of one file
MOST_PIXELS = 128_000_000
SHORTEST_SIDE, LARGEST_ASPECT = 4, 20

# What makes an image upright, by its EXIF tag: numbers of ``PIL.Image.Transpose``.
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}

# Why an image was left out.
EMPTY = "empty file"
NOT_AN_IMAGE = "not an image"
DAMAGED = "damaged or truncated"
TOO_LARGE = f"more than {MOST_PIXELS // 10**6} megapixels"
TOO_SMALL = f"a side below {SHORTEST_SIDE} pixels"
TOO_LONG = f"more than {LARGEST_ASPECT} times as long as wide"
UNREADABLE = "unreadable file"
UNKNOWN_RANGE = "pixels of unknown range"

# What was changed in an image.
TURNED = "turned upright by their EXIF tag"
FRAMES = "animated or with several pages, of which the first was used"
TRANSPARENT = "transparent, laid over white"
CMYK = "in CMYK, converted to RGB"
DEEP = "with more than 8 bits a channel, scaled to 8"


class BadImage(Exception):  # noqa: N818 - a condition of the input, not a failure
    """An image that cannot be used. ``reason`` is one of a few, to count by; ``detail`` is what Pillow said, or ""."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} ({detail})" if detail else reason)
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class Decoded:
    """An image, upright and of mode L (gray) or RGB, and what was changed to make it so."""

    image: Image
    changes: tuple[str, ...]


def decode(data: bytes, most_pixels: int = MOST_PIXELS) -> Image:
    """Decode the bytes of an image file. Returns a Pillow image, upright by its EXIF tag, of mode L (gray) or RGB.

    Raises:
        BadImage: the bytes are not an image that can be used, or have more than ``most_pixels`` pixels.
    """
    return decode_noting(data, most_pixels).image


def decode_noting(data: bytes, most_pixels: int = MOST_PIXELS) -> Decoded:
    """Decode an image as ``decode`` does, and say what was changed."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise BadImage(EMPTY)
    try:
        image = Image.open(io.BytesIO(data), formats=_formats())
        _check_size(*image.size, most_pixels)
        image.load()
        several = image.format != "MPO" and bool(getattr(image, "is_animated", False))  # MPO: photos of two lenses
        plain = upright(image)
    except (BadImage, MemoryError):
        raise
    except UnidentifiedImageError:
        known = data.startswith(MARKS) or data[8:12] in (b"WEBP", b"avif")
        raise BadImage(DAMAGED if known else NOT_AN_IMAGE) from None
    except Image.DecompressionBombError:
        raise BadImage(_too_large(most_pixels)) from None
    except Exception as error:  # Pillow's plugins raise what they like for broken files
        raise BadImage(DAMAGED, (str(error).strip() or type(error).__name__).splitlines()[0]) from None
    return Decoded(plain.image, (*plain.changes, *([FRAMES] if several else [])))


def upright(image: Image) -> Decoded:
    """Return an open Pillow image of any mode upright and as gray (L) or RGB with 8 bits a channel.

    Transparent parts become white; colors are read as sRGB; color profiles are ignored.
    Raises ``BadImage`` if it has no pixels, or holds numbers of unknown range.
    """
    from PIL.Image import Transpose

    if 0 in image.size:
        raise BadImage(TOO_SMALL, f"{image.width} x {image.height}")
    changes = []
    if (method := TURNS.get(_orientation(image))) is not None:
        kept = {name: value for name, value in image.info.items() if name == "transparency"}
        image = image.transpose(Transpose(method))
        image.info.clear()  # of the tag, or it would be turned again
        image.info.update(kept)
        changes.append(TURNED)
    if image.mode in ("L", "RGB") and "transparency" not in image.info:
        return Decoded(image, tuple(changes))
    if image.mode.startswith(("I", "F")):
        return Decoded(_scaled(image), (*changes, DEEP))
    if image.mode == "CMYK":
        return Decoded(image.convert("RGB"), (*changes, CMYK))
    is_gray = _is_gray(image)
    if image.has_transparency_data:
        with_alpha = image.convert("RGBA")
        if np.asarray(with_alpha)[:, :, 3].min() < 255:
            changes.append(TRANSPARENT)
        image = _over_white(with_alpha)
    return Decoded(image.convert("L" if is_gray else "RGB"), tuple(changes))


def square(image: Image, size: int, channels: int) -> np.ndarray:
    """Scale the shorter side of an image, of mode L or RGB, to ``size`` by Pillow's bicubic filter; cut out the middle.

    The filter averages when it shrinks, so nothing is aliased. Lengths are rounded down, as the image processors of
    transformers do: an exported model gets the same pixels. Returns uint8, shape ``(size, size, channels)``.
    """
    from PIL import Image

    mode = "RGB" if channels == 3 else "L"
    if image.mode != mode:
        image = image.convert(mode)
    if image.size != (size, size):
        shorter = min(image.size)
        width, height = (size * side // shorter for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image).reshape(size, size, channels)


def looks_gray(data: bytes) -> bool:
    """Return whether an image file says that it is gray, or cannot be read; its pixels are not decoded."""
    from PIL import Image

    try:
        return _is_gray(Image.open(io.BytesIO(data), formats=_formats()))
    except Exception:  # decoding reports what is wrong
        return True


@cache
def _formats() -> tuple[str, ...]:
    """Those of ``FORMATS`` that this Pillow was built with."""
    from PIL import Image

    # Of damaged metadata and of large images, for which there are rules here; not for a while, as catch_warnings would,
    # because other threads may read images too.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _orientation(image: Image) -> int:
    """Return the EXIF tag of an image, 1 if it has none or if its metadata is damaged."""
    try:
        return int(image.getexif().get(0x0112, 1))
    except Exception:  # Pillow raises what it likes for damaged metadata, which harms no pixel
        return 1


def _too_large(most_pixels: int) -> str:
    return f"more than {most_pixels // 10**6} megapixels"


def _check_size(width: int, height: int, most_pixels: int) -> None:
    if width * height > most_pixels:
        raise BadImage(_too_large(most_pixels), f"{width:,} x {height:,}")
    if min(width, height) < SHORTEST_SIDE:
        raise BadImage(TOO_SMALL, f"{width:,} x {height:,}")
    if max(width, height) > LARGEST_ASPECT * min(width, height):
        raise BadImage(TOO_LONG, f"{width:,} x {height:,}")


def _scaled(image: Image) -> Image:
    """Return an image of 16-bit or 32-bit integers, or of floating-point numbers, as 8-bit gray."""
    from PIL import Image

    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        if not (low >= 0 and high <= 1):
            raise BadImage(UNKNOWN_RANGE, "floating-point numbers must be from 0 to 1")
        return Image.fromarray(np.rint(values * 255).astype(np.uint8))
    if low < 0 or high > 65535:
        raise BadImage(UNKNOWN_RANGE, "integers must be from 0 to 65,535")
    return Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))


def _is_gray(image: Image) -> bool:
    if image.mode == "P":
        red, green, blue = np.array(image.getpalette("RGB"), np.uint8).reshape(-1, 3).T
        return bool((red == green).all() and (green == blue).all())
    return image.mode in ("1", "L", "LA", "La") or image.mode.startswith(("I", "F"))


def _over_white(image: Image) -> Image:
    from PIL import Image

    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image)
