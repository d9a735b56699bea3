"""Random views of images: crop, flip, colors, blur and solarization, a draw of its own for each image and view.

A view is a few small matrices: its pixels are color x (rows x image x columns) + offset, where ``rows`` and ``columns``
crop, resize, flip and blur one axis each, and ``color`` mixes the channels. So a batch of views is three batched matrix
products, on any device. Values are limited to [0, 1] once, at the end, and not after each change.
"""

from __future__ import annotations

import dataclasses
import math
from enum import IntEnum

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from lm.config.view_settings import ViewsConfig
from lm.data.keyed_random import Stream, key, uniform_at

SMALLEST_BLURRED = 64  # pixels; blur in smaller views costs accuracy (SimCLR's own recipe for CIFAR-10 has none)
LARGEST_SIGMA = 2.0
SMALLEST_SIGMA = 0.1
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as Pillow's mode L
CHUNK = 2**18  # pixel values at a time on a CPU, so that the steps of one chunk find it in the cache


class Draw(IntEnum):
    """The columns of the draws of a view."""

    AREA = 0  # of the crop, as a share of the image's
    RATIO = 1  # width / height of the crop in pixels, before it is made to fit into the image
    LEFT = 2  # where the crop is, as a share of the room that it has: 0: at the left, 1: at the right
    TOP = 3
    FLIP = 4  # 1: mirrored left to right
    BRIGHTNESS = 5  # factors; 1: unchanged
    CONTRAST = 6
    SATURATION = 7  # 0: gray
    HUE = 8  # turns of the color circle
    BLUR = 9  # standard deviation of the Gaussian in pixels of the view (Pillow's radius); 0: none
    SOLARIZE = 10  # 1: values above one half are inverted


COLUMNS = len(Draw)


def without_color(settings: ViewsConfig) -> ViewsConfig:
    """These settings with crop and flip only, as MAE wants it."""
    return dataclasses.replace(alike(settings), color_jitter=0.0, grayscale=0.0, blur=0.0, solarize=0.0)


def alike(settings: ViewsConfig) -> ViewsConfig:
    """These settings without what sets the first or the second view apart."""
    return dataclasses.replace(settings, first_blur=0.0, second_solarize=0.0)


def draw_views(
    seed: int, numbers: NDArray[np.int64], views: int, settings: ViewsConfig, stream: Stream = Stream.VIEWS
) -> Tensor:
    """Draw views: float32 (len(numbers), views, COLUMNS) on the CPU, with the columns of ``Draw``.

    Each view's draws depend on the seed, on its number in ``numbers`` and on its place among the views only, so they
    are the same in every batch and on every rank. The first view may have a rate of blur of its own, and the second one
    of solarization. Areas are uniform and ratios log-uniform, as in torchvision's RandomResizedCrop (Szegedy et al.
    2015); the strengths of color changes are SimCLR's (Chen et al. 2020, appendix A).
    """
    count = 14
    draws = uniform_at(key(seed, stream), numbers[:, None], np.arange(views * count))
    draws = draws.reshape(len(numbers), views, count)
    area, ratio, left, top, flip, jitter, brightness, contrast, saturation, hue, gray, blur, sigma, solarize = (
        np.moveaxis(draws, -1, 0)
    )
    blur_rate, solarize_rate = np.full(views, settings.blur), np.full(views, settings.solarize)
    blur_rate[:1] += settings.first_blur
    solarize_rate[1:2] += settings.second_solarize
    strength = settings.color_jitter * (jitter < settings.color_jitter_rate)
    found = np.empty((len(numbers), views, COLUMNS), dtype=np.float32)
    found[..., Draw.AREA] = settings.crop_area + (settings.largest_crop - settings.crop_area) * area
    found[..., Draw.RATIO] = np.exp(math.log(settings.crop_ratio) * (2 * ratio - 1))
    found[..., Draw.LEFT] = left
    found[..., Draw.TOP] = top
    found[..., Draw.FLIP] = flip < settings.flip
    found[..., Draw.BRIGHTNESS] = 1 + 0.8 * strength * (2 * brightness - 1)
    found[..., Draw.CONTRAST] = 1 + 0.8 * strength * (2 * contrast - 1)
    found[..., Draw.SATURATION] = (1 + 0.8 * strength * (2 * saturation - 1)) * (gray >= settings.grayscale)
    found[..., Draw.HUE] = 0.2 * strength * (2 * hue - 1)
    found[..., Draw.BLUR] = (SMALLEST_SIGMA + (LARGEST_SIGMA - SMALLEST_SIGMA) * sigma) * (blur < blur_rate)
    found[..., Draw.SOLARIZE] = solarize < solarize_rate
    return torch.from_numpy(found)


def make_views(images: Tensor, draws: Tensor, size: int, settings: ViewsConfig) -> Tensor:
    """One view of each image: float32 (n, C, size, size) in [0, 1], on the images' device.

    ``images`` is uint8 (n, height, width, C) with 1 or 3 channels, ``draws`` (n, COLUMNS) of ``draw_views`` with the
    same ``settings``, which say what need not be looked at. Blur needs a ``size`` of at least 64; gray images (C = 1)
    have no saturation and hue. A view of an image depends on no other row, up to the rounding of float32.
    """
    count, height, width, channels = images.shape
    views = torch.empty(count, channels, size, size, device=images.device)
    draws = draws.to(images.device)
    step = max(1, CHUNK // (height * width * channels)) if images.device.type == "cpu" else max(1, count)
    with torch.autocast(images.device.type, enabled=False):
        for first in range(0, count, step):
            part = slice(first, first + step)
            _make(images[part], draws[part], settings, views[part])
    return views


def _make(images: Tensor, draws: Tensor, settings: ViewsConfig, out: Tensor) -> None:
    """Write the views of ``images`` to ``out`` (n, C, size, size)."""
    count, height, width, channels = images.shape
    size = out.shape[-1]
    rows, columns = _crops(draws, height, width, size)
    if (settings.blur or settings.first_blur) and size >= SMALLEST_BLURRED:
        blurred = draws[:, Draw.BLUR].nonzero()[:, 0]
        blur = _blurs(draws[blurred, Draw.BLUR], size)
        rows[blurred], columns[blurred] = blur @ rows[blurred], blur @ columns[blurred]
    pixels = torch.bmm(rows, images.reshape(count, height, width * channels).to(torch.float32))
    pixels = pixels.view(count, size, width, channels).permute(0, 3, 1, 2).reshape(count, channels * size, width)
    pixels = torch.bmm(pixels, columns.transpose(1, 2)).view(count, channels, size * size)
    if (settings.color_jitter and settings.color_jitter_rate) or settings.grayscale:
        matrix, offset = _colors(draws, pixels.mean(2))
        pixels = torch.baddbmm(offset[:, :, None], matrix, pixels)
    pixels = pixels.view_as(out)
    torch.clamp(pixels, 0, 1, out=out)
    if settings.solarize or settings.second_solarize:
        torch.where(draws[:, Draw.SOLARIZE, None, None, None] > 0, torch.minimum(out, 1 - out), out, out=out)


def _crops(draws: Tensor, height: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """What resamples rows (n, size, height) and columns (n, size, width) to the crop; the latter also divides by 255.

    The crop's area is as drawn; its ratio is the nearest to the drawn one with which it fits into the image.
    """
    area, ratio = draws[:, Draw.AREA], draws[:, Draw.RATIO]
    ratio = ratio.clamp(min=area * (width / height), max=(width / height) / area)
    crop_width = (area * ratio * (width * height)).sqrt().clamp(max=width)
    crop_height = (area / ratio * (width * height)).sqrt().clamp(max=height)
    places = (torch.arange(size, device=draws.device) + 0.5) / size
    flipped = torch.where(draws[:, Draw.FLIP, None] > 0, 1 - places, places)
    rows = _resampling(draws[:, Draw.TOP] * (height - crop_height), crop_height, places, height)
    columns = _resampling(draws[:, Draw.LEFT] * (width - crop_width), crop_width, flipped, width)
    return rows, columns / 255


def _resampling(start: Tensor, extent: Tensor, places: Tensor, length: int) -> Tensor:
    """Weights (n, size, length) of an axis' pixels in a resized crop of it, each row with the sum 1.

    As Pillow's ``resize(box=...)`` with BILINEAR: a triangle as wide as a pixel of the image or of the view, whichever
    is larger, so a crop is averaged, not sampled, where it shrinks. ``start`` and ``extent`` (n,) are in pixels,
    ``places`` (size,) or (n, size) are the centers of the view's pixels as shares of the crop.
    """
    centers = start[:, None] + extent[:, None] * places
    reach = (extent / places.shape[-1]).clamp(min=1)
    pixels = torch.arange(length, device=start.device) + 0.5
    weights = (1 - (pixels - centers[:, :, None]).abs_().div_(reach[:, None, None])).relu_()
    return weights.div_(weights.sum(2, keepdim=True))


def _blurs(sigma: Tensor, size: int) -> Tensor:
    """Gaussian blur of an axis with standard deviation ``sigma`` (n,): (n, size, size); the edge pixels continue."""
    reach = math.ceil(4 * LARGEST_SIGMA)
    distances = torch.arange(-reach, reach + 1, device=sigma.device)
    kernels = torch.softmax(-0.5 * (distances / sigma[:, None]) ** 2, dim=1)
    margin = size - 1 - reach
    weights = F.pad(kernels, (margin, margin)).unfold(1, size, 1).flip(1)  # of output o and input i: kernels at i - o
    beyond = kernels[:, :reach].cumsum(1)  # what falls outside, from the output ``reach`` - 1 to the one at the edge
    weights[:, :reach, 0] += beyond.flip(1)
    weights[:, size - reach :, -1] += beyond
    return weights


def _colors(draws: Tensor, mean: Tensor) -> tuple[Tensor, Tensor]:
    """The color changes as a matrix (n, C, C) and an offset (n, C); ``mean`` (n, C) is that of each view's pixels.

    Brightness multiplies, contrast mixes with the view's mean luma, saturation with the pixel's own, in any order; then
    hue turns the color about the gray axis. That keeps its mean and its distance from gray, where HSV's hue keeps its
    largest and smallest channel: on CIFAR-10 a tenth of a turn differs by 4.6 levels of 255 on average.
    """
    brightness, contrast, saturation, hue = draws[:, Draw.BRIGHTNESS : Draw.HUE + 1].unbind(1)
    if mean.shape[1] == 1:
        matrix, luma = torch.ones_like(mean)[:, :, None], mean
    else:
        weights = mean.new_tensor(LUMA)
        thirds = mean.new_full((3, 3), 1 / 3)
        quarter_turn = mean.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
        angle, share = 2 * math.pi * hue[:, None, None], saturation[:, None, None]
        turned = thirds + angle.cos() * (torch.eye(3, device=mean.device) - thirds) + angle.sin() * quarter_turn
        matrix, luma = share * turned + (1 - share) * weights, (mean @ weights)[:, None]
    offset = (brightness * (1 - contrast))[:, None] * luma
    return (brightness * contrast)[:, None, None] * matrix, offset.expand_as(mean)


def contact_sheet(images: Tensor, settings: ViewsConfig, seed: int, views: int) -> NDArray[np.uint8]:
    """A picture with a row for each image (n, S, S, C): the image, then that many views of it at the same size.

    It is (height, width, 3) for color images and (height, width) for gray ones, with white lines between the tiles.
    """
    count, size, _, channels = images.shape
    draws = draw_views(seed, np.arange(count), views, settings).to(images.device)
    columns = [images.permute(0, 3, 1, 2).to(torch.float32) / 255]
    columns += [make_views(images, draws[:, view], size, settings) for view in range(views)]
    gap = max(1, size // 16)
    tiles = F.pad(torch.stack(columns, dim=1), (0, gap, 0, gap), value=1.0)  # (n, 1 + views, C, S + gap, S + gap)
    grid = tiles.permute(0, 3, 1, 4, 2).reshape(count * (size + gap), (1 + views) * (size + gap), channels)
    picture = (grid[:-gap, :-gap] * 255).round().to(torch.uint8)
    return (picture if channels > 1 else picture[:, :, 0]).cpu().numpy()
