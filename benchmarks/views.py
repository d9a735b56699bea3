"""Views of images per CPU second on one thread, compared with Pillow one by one, and with kornia and torchvision.

    python -m benchmarks.views [--rounds 7]

Each candidate makes one view of each of ``IMAGES`` random color images in memory: crop and flip, color changes, gray,
and blur in views of 96 pixels, with the default settings; each view has its own draw, except in torchvision's batch.
"pillow" does what torchvision's transforms of Pillow images do, in the same order, and ends with a float tensor. Kornia
and torchvision are only measured if they are installed.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import count

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from benchmarks.side_by_side import in_turn
from lm.config.view_settings import ViewsConfig
from lm.data.views import LARGEST_SIGMA, SMALLEST_BLURRED, SMALLEST_SIGMA, draw_views, make_views, without_color
from lm.model.device import keep_freed_memory

IMAGES = 256
SETTINGS = ViewsConfig()


def kindling(images: Tensor, settings: ViewsConfig) -> Callable[[], Tensor]:
    steps = count()

    def views() -> Tensor:
        drawn = draw_views(next(steps), np.arange(len(images)), 1, settings)[:, 0]
        return make_views(images, drawn, images.shape[1], settings)

    return views


def pillow_view(image: Image.Image, settings: ViewsConfig) -> Tensor:
    """A view of one image with the same distribution of draws: float32 (3, size, size)."""
    size, draw = image.width, random.random
    area, ratio = random.uniform(settings.crop_area, 1), settings.crop_ratio ** random.uniform(-1, 1)
    ratio = min(max(ratio, area), 1 / area)
    width, height = (min(size, size * side**0.5) for side in (area * ratio, area / ratio))
    left, top = draw() * (size - width), draw() * (size - height)
    box = (left, top, left + width, top + height)
    image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
    if draw() < settings.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if draw() < settings.color_jitter_rate:
        reach = 0.8 * settings.color_jitter
        changes: list[Callable[[Image.Image], Image.Image]] = [
            lambda image: ImageEnhance.Brightness(image).enhance(random.uniform(1 - reach, 1 + reach)),
            lambda image: ImageEnhance.Contrast(image).enhance(random.uniform(1 - reach, 1 + reach)),
            lambda image: ImageEnhance.Color(image).enhance(random.uniform(1 - reach, 1 + reach)),
            lambda image: turned_hue(image, random.uniform(-0.2, 0.2) * settings.color_jitter),
        ]
        random.shuffle(changes)
        for change in changes:
            image = change(image)
    if draw() < settings.grayscale:
        image = image.convert("L").convert("RGB")
    if size >= SMALLEST_BLURRED and draw() < settings.blur:
        image = image.filter(ImageFilter.GaussianBlur(random.uniform(SMALLEST_SIGMA, LARGEST_SIGMA)))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).to(torch.float32).div_(255)


def turned_hue(image: Image.Image, turns: float) -> Image.Image:
    """As torchvision's ``adjust_hue`` of a Pillow image."""
    hue, saturation, value = image.convert("HSV").split()
    turned = Image.fromarray(np.array(hue) + np.uint8(int(turns * 255) % 256))
    return Image.merge("HSV", (turned, saturation, value)).convert("RGB")


def pillow(images: Tensor) -> Callable[[], Tensor]:
    opened = [Image.fromarray(image) for image in images.numpy()]
    return lambda: torch.stack([pillow_view(image, SETTINGS) for image in opened])


def kornia(images: Tensor) -> Callable[[], Tensor]:
    import kornia.augmentation as K

    size, jitter = images.shape[1], SETTINGS.color_jitter
    changes = [
        K.RandomResizedCrop((size, size), scale=(SETTINGS.crop_area, 1), ratio=ratios()),
        K.RandomHorizontalFlip(SETTINGS.flip),
        K.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter, p=SETTINGS.color_jitter_rate),
        K.RandomGrayscale(p=SETTINGS.grayscale),
    ]
    if size >= SMALLEST_BLURRED:
        changes.append(K.RandomGaussianBlur((9, 9), (SMALLEST_SIGMA, LARGEST_SIGMA), p=SETTINGS.blur))
    change = K.AugmentationSequential(*changes, data_keys=["input"])
    return lambda: change(images.permute(0, 3, 1, 2).to(torch.float32) / 255)


def torchvision(images: Tensor, *, batch: bool) -> Callable[[], Tensor]:
    """Its transforms of tensors, one by one or with one draw for the whole batch."""
    from torchvision.transforms import v2

    size, jitter = images.shape[1], SETTINGS.color_jitter
    color = v2.ColorJitter(0.8 * jitter, 0.8 * jitter, 0.8 * jitter, 0.2 * jitter)
    changes = [
        v2.RandomResizedCrop(size, scale=(SETTINGS.crop_area, 1), ratio=ratios(), antialias=True),
        v2.RandomHorizontalFlip(SETTINGS.flip),
        v2.RandomApply([color], p=SETTINGS.color_jitter_rate),
        v2.RandomGrayscale(SETTINGS.grayscale),
    ]
    if size >= SMALLEST_BLURRED:
        changes.append(v2.RandomApply([v2.GaussianBlur(9, (SMALLEST_SIGMA, LARGEST_SIGMA))], p=SETTINGS.blur))
    change = v2.Compose([*changes, v2.ToDtype(torch.float32, scale=True)])
    rows = images.permute(0, 3, 1, 2).contiguous()
    return (lambda: change(rows)) if batch else (lambda: torch.stack([change(image) for image in rows]))


def ratios() -> tuple[float, float]:
    return 1 / SETTINGS.crop_ratio, SETTINGS.crop_ratio


def candidates(images: Tensor) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    yield "pillow", pillow(images)
    yield "kindling", kindling(images, SETTINGS)
    yield "kindling, crop and flip", kindling(images, without_color(SETTINGS))
    if find_spec("kornia"):
        yield "kornia, batch", kornia(images)
    if find_spec("torchvision"):
        yield "torchvision, one by one", torchvision(images, batch=False)
        yield "torchvision, one draw for all", torchvision(images, batch=True)


def compare(size: int, rounds: int) -> None:
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (IMAGES, size, size, 3), dtype=np.uint8))
    timings = in_turn(dict(candidates(images)), rounds=rounds)
    print(f"{size} pixels")
    for name, timing in timings.items():
        faster = timings["pillow"].cpu / timing.cpu
        print(f"  {name:30}{IMAGES / timing.cpu:8,.0f} views/CPU s  {faster:5.1f} times pillow", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    for pixels in (32, 96):
        compare(pixels, arguments.rounds)
