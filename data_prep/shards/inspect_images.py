"""Inspect a dataset of images: totals, classes, original sizes, what was left out, and pictures of each class."""

from __future__ import annotations

import base64
import io
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_prep.errors.wording import counted
from data_prep.shards.images import ImageDataset, ImageSplit
from data_prep.shards.tokens import SPLITS

QUANTILES = (0.0, 0.1, 0.5, 0.9, 1.0)
MOST_CLASSES = 50  # with pictures
MOST_PICTURES = 600  # in a split
SHOWN_SIDE = 96  # pixels; larger pictures are scaled down for the page
COMMON_SIZES = 12
BAR_WIDTH = 40
UNLABELED = "no class"


def inspect_images(dataset: ImageDataset, *, pictures: int, seed: int, pixels: bool = False) -> dict[str, Any]:
    """Describe each split, ready for JSON: totals, classes, sizes, sources, and ``pictures`` random images a class.

    Each of these has its number, source, width and height and, if ``pixels``, the stored pixels as ``png_of`` them.
    """
    manifest = dataset.manifest
    processor = {name: manifest["processor"][name] for name in ("size", "channels", "mean", "std")}
    return {
        "directory": str(dataset.directory),
        "fingerprint": dataset.fingerprint,
        "processor": processor,
        "storage": manifest["storage"],
        "classes": list(dataset.classes),
        "left_out": manifest["left_out"],
        "changed": manifest["changed"],
        "splits": {name: _inspect_split(dataset, dataset.split(name), pictures, seed, pixels) for name in SPLITS},
    }


def _inspect_split(dataset: ImageDataset, split: ImageSplit, pictures: int, seed: int, pixels: bool) -> dict[str, Any]:
    totals: dict[str, Any] = {
        "images": split.count,
        "labeled": sum(dataset.manifest["splits"][split.name]["classes"].values()),
        "classes": dataset.manifest["splits"][split.name]["classes"],
        "stored_bytes": sum(record.bin_bytes for record in split.records),
        "shards": len(split.records),
    }
    if not split.count:
        return totals
    sizes = split.sizes
    shorter = sizes.min(1)
    quantiles = {f"{q:.0%}": int(value) for q, value in zip(QUANTILES, np.quantile(shorter, QUANTILES), strict=True)}
    common = Counter(map(tuple, sizes.tolist())).most_common(COMMON_SIZES)
    by_source = Counter[str]()
    for record in split.records:
        by_source[dataset.manifest["sources"][record.source]["name"]] += record.images
    return totals | {
        "shorter_side": quantiles,
        "common_sizes": [{"width": width, "height": height, "images": count} for (width, height), count in common],
        "number_of_sizes": len(np.unique(sizes, axis=0)),
        "sources": [{"name": name, "images": images} for name, images in by_source.items()],
        "pictures": _pictures(dataset, split, pictures, np.random.default_rng(seed), pixels),
    }


def _pictures(
    dataset: ImageDataset, split: ImageSplit, pictures: int, rng: np.random.Generator, pixels: bool
) -> list[dict[str, Any]]:
    """Return random images of each class, those without one last, in the order of their numbers."""
    labels = split.labels
    groups = [(name, number) for number, name in enumerate(dataset.classes)] + [(UNLABELED, -1)]
    groups = [(name, number) for name, number in groups if (labels == number).any()][:MOST_CLASSES]
    if len(groups) == 1:
        pictures *= 10
    found = []
    for name, number in groups if pictures else []:
        members = np.flatnonzero(labels == number)
        count = min(pictures, len(members), max(1, MOST_PICTURES // len(groups)))
        chosen = np.sort(rng.choice(members, count, replace=False))
        images = [
            {
                "number": int(each),
                "source": split.source_of(int(each)),
                "width": int(split.sizes[each, 0]),
                "height": int(split.sizes[each, 1]),
            }
            for each in chosen
        ]
        if pixels:
            for image, stored in zip(images, split.read(chosen), strict=True):
                image["png"] = png_of(stored)
        found.append({"class": name, "of": len(members), "images": images})
    return found


def png_of(pixels: np.ndarray) -> str:
    """Return pixels, uint8 of shape ``(height, width, channels)``, as a PNG in base64, at most ``SHOWN_SIDE`` wide."""
    from PIL import Image

    image = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def render_images(found: dict[str, Any]) -> str:
    """Format the result of ``inspect_images`` as text."""
    form = found["processor"]
    color = "color" if form["channels"] == 3 else "gray"
    lines = [
        f"{found['directory']}: {color} images of {form['size']} x {form['size']} pixels, "
        + counted_classes(len(found["classes"])),
        f"mean {_numbers(form['mean'])}, standard deviation {_numbers(form['std'])} (of pixels from 0 to 1)",
    ]
    for name, split in found["splits"].items():
        lines += ["", f"{name}: {counted_images(split['images'])}, {split['labeled']:,} with a class"]
        if split["images"]:
            lines += _split_lines(split)
    for word, what in (("left_out", "left out"), ("changed", "changed")):
        lines += ["", f"{what}:"] if found[word] else []
        lines += [f"  {cases['images']:,} {why} (the first: {cases['first']})" for why, cases in found[word].items()]
    return "\n".join(lines)


def _split_lines(split: dict[str, Any]) -> Iterator[str]:
    quantiles = "  ".join(f"{share}: {side:,}" for share, side in split["shorter_side"].items())
    yield f"  shorter side of the originals in pixels  {quantiles}"
    shown = ", ".join(f"{row['width']} x {row['height']} ({row['images']:,})" for row in split["common_sizes"][:5])
    more = " …" if split["number_of_sizes"] > 5 else ""
    yield f"  sizes: {shown}{more}"
    if len(split["sources"]) > 1:
        yield from (f"    {row['name']}: {row['images']:,}" for row in split["sources"])
    most = max([1, *split["classes"].values()])  # classes may occur in the other split only
    for name, count in list(split["classes"].items())[:MOST_CLASSES]:
        yield f"    {name:>20} {'█' * -(-count * BAR_WIDTH // most):{BAR_WIDTH}} {count:,}"
    if len(split["classes"]) > MOST_CLASSES:
        yield f"    and {len(split['classes']) - MOST_CLASSES:,} more classes"
    for group in split["pictures"]:
        yield f"  {group['class']}, for example {', '.join(image['source'] for image in group['images'][:2])}"


def counted_images(number: int) -> str:
    """Return how many images there are, in words."""
    return counted(number, "image")


def counted_classes(number: int) -> str:
    """Return how many classes there are, in words for a heading."""
    return "no classes" if number == 0 else "1 class" if number == 1 else f"{number:,} classes"


def _numbers(values: list[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
