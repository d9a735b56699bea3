"""Images made for tests: of every mode and format, broken in many ways, and folders and archives of them."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ORIENTATION = 0x0112


def picture(seed: int, width: int = 20, height: int = 16, mode: str = "RGB") -> Image.Image:
    """A smooth picture, different for each seed, without symmetry."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x * a / width + y * b / height + c) for a, b, c in rng.uniform(1, 5, (3, 3))]
    return Image.fromarray(((np.stack(waves, -1) + 1) * 127).astype(np.uint8)).convert(mode)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def with_exif(image: Image.Image, orientation: int, kind: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, kind, exif=exif.tobytes())


def png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says it is so large but has hardly any data, as a decompression bomb."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = zlib.compress(bytes(1 << 20))
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", data) + png_chunk(b"IEND", b"")


def frames(kind: str) -> bytes:
    first, *others = (picture(seed) for seed in range(3))
    return encoded(first, kind, save_all=True, append_images=others, duration=50)


def usable_images() -> dict[str, bytes]:
    """Images that a build converts, by a file name that says what is special."""
    rgb, gray = picture(0), picture(1, mode="L")
    alpha = picture(2).convert("RGBA")
    alpha.putalpha(picture(3, mode="L"))
    gray_alpha = gray.convert("LA")
    gray_alpha.putalpha(Image.new("L", gray.size, 128))
    palette = rgb.quantize(16)
    deep = np.asarray(gray, np.uint16) * 257
    jpeg = encoded(rgb, "JPEG", quality=95)
    icon = rgb.quantize(8)
    icon.info["transparency"] = 3
    return {
        "plain.jpg": jpeg,
        "plain.png": encoded(rgb, "PNG"),
        "plain.webp": encoded(rgb, "WEBP", lossless=True),
        "plain.bmp": encoded(rgb, "BMP"),
        "plain.tif": encoded(rgb, "TIFF"),
        "plain.ppm": encoded(rgb, "PPM"),
        "gray.png": encoded(gray, "PNG"),
        "gray.jpg": encoded(gray, "JPEG"),
        "bits.png": encoded(gray.convert("1"), "PNG"),
        "palette.png": encoded(palette, "PNG"),
        "palette.gif": encoded(palette, "GIF"),
        "clear palette.png": encoded(icon, "PNG", transparency=3),
        "alpha.png": encoded(alpha, "PNG"),
        "alpha.webp": encoded(alpha, "WEBP"),
        "gray alpha.png": encoded(gray_alpha, "PNG"),
        "clear color.png": encoded(rgb, "PNG", transparency=(0, 0, 0)),
        "cmyk.jpg": encoded(rgb.convert("CMYK"), "JPEG"),
        "deep.png": encoded(Image.fromarray(deep), "PNG"),
        "deep.tif": encoded(Image.fromarray(deep), "TIFF"),
        "integers.tif": encoded(Image.fromarray(deep.astype(np.int32)), "TIFF"),
        "fractions.tif": encoded(Image.fromarray(np.asarray(gray, np.float32) / 255), "TIFF"),
        "animated.gif": frames("GIF"),
        "animated.webp": frames("WEBP"),
        "animated.png": frames("PNG"),
        "pages.tif": frames("TIFF"),
        "turned.jpg": with_exif(rgb, 6),
        "turned.png": with_exif(rgb, 3, "PNG"),
        "turned.webp": with_exif(rgb, 8, "WEBP"),
        "damaged exif.jpg": encoded(rgb, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\x7f junk"),
        "impossible exif.jpg": with_exif(rgb, 99),
        "PNG inside.jpg": encoded(rgb, "PNG"),
        "junk behind.jpg": jpeg + b"junk" * 100,
        "small.png": encoded(picture(4, 5, 4), "PNG"),
        "wide.png": encoded(picture(5, 60, 4), "PNG"),
        "new\nline.png": encoded(picture(6), "PNG"),
    }


def unusable_images() -> dict[str, tuple[str, bytes]]:
    """Files that are left out: the beginning of the reason, and their bytes."""
    jpeg, png = encoded(picture(0, 64, 64), "JPEG"), encoded(picture(0, 64, 64), "PNG")
    gif, webp = encoded(picture(0, 64, 64).quantize(16), "GIF"), encoded(picture(0, 64, 64), "WEBP")
    wide_range = np.full((8, 8), 7e5, np.float32)
    not_numbers = np.full((8, 8), np.nan, np.float32)
    return {
        "empty.jpg": ("empty", b""),
        "text.jpg": ("not an image", b"This is a text, not an image.\n" * 20),
        "letters.jpg": ("not an image", b"BMW builds cars."),
        "zeros.png": ("not an image", bytes(1000)),
        "page.gif": ("not an image", b"<!doctype html><title>Not found</title>"),
        "vectors.png": ("not an image", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'),
        "program.png": ("not an image", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"),
        "truncated.jpg": ("damaged", jpeg[: len(jpeg) // 2]),
        "first bytes.jpg": ("damaged", jpeg[:20]),
        "truncated.png": ("damaged", png[: len(png) // 2]),
        "truncated.gif": ("damaged", gif[: len(gif) // 2]),
        "truncated.webp": ("damaged", webp[: len(webp) // 2]),
        "checksum.png": ("damaged", png[:60] + bytes([png[60] ^ 255]) + png[61:]),
        "header only.png": ("damaged", png[:33]),
        "bomb.png": ("more than", png_of_size(30_000, 30_000)),
        "large.png": ("more than", png_of_size(12_000, 12_000)),
        "flat.png": ("a side below", encoded(picture(0, 200, 1), "PNG")),
        "pixel.gif": ("a side below", encoded(picture(0, 1, 1).quantize(2), "GIF")),
        "strip.png": ("more than 20 times", encoded(picture(0, 4, 5000), "PNG")),
        "heights.tif": ("pixels of unknown range", encoded(Image.fromarray(wide_range), "TIFF")),
        "gaps.tif": ("pixels of unknown range", encoded(Image.fromarray(not_numbers), "TIFF")),
        "negative.tif": ("pixels of unknown range", encoded(Image.fromarray(np.full((8, 8), -5, np.int32)), "TIFF")),
    }


def write_tree(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path
