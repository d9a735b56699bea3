"""Estimate what a build of images would do from a small sample, without writing anything."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from data_prep.errors import UserError
from data_prep.pipeline.image_parts import ImageJob, ImageReport
from data_prep.pipeline.images import ImagePlan, natural_order, notes_of, sentences_of
from data_prep.settings import ImageSettings, available_cores
from data_prep.shards.images import INDEX, stored_bytes
from data_prep.sources.decoding import BadImage, decode_noting, square
from data_prep.sources.images import ImageEntry, entries_of

SAMPLED_ITEMS, SAMPLED_ROWS = 200, 50  # files, and images of each table or dataset among them


@dataclass(frozen=True)
class ImageEstimate:
    """What a build would read and write: sizes in bytes, time in seconds.

    ``images`` is None if a source does not say how many it has; then so are ``disk_bytes`` and ``seconds``.
    ``classes`` has the names that folders give and those in the sample. ``notes`` are sentences about the sources and
    about the sample.
    """

    files: int
    file_bytes: int
    parts: int
    images: int | None
    channels: int
    classes: list[str]
    sampled: int
    disk_bytes: int | None
    seconds: float | None
    workers: int
    notes: list[str]


def estimate_images(settings: ImageSettings) -> ImageEstimate:
    """Estimate a build from names, sizes and a sample of the images.

    Raises ``UserError`` as a build would.
    """
    plan = ImagePlan.of(settings)
    items = [item for part in plan.parts for item in part.items]
    report, kept, stored, channels = ImageReport(), 0, 0, settings.channels or 1
    sample = list(_sample(plan))
    began = time.perf_counter()
    for entry in sample:
        try:
            data = entry.read()
            decoded = decode_noting(data)
        except BadImage as error:
            report.leave_out(entry.name, error)
            continue
        report.change(entry.name, iter(decoded.changes))
        if decoded.image.mode == "RGB" and not settings.channels:
            channels = 3
        kept += 1
        stored += len(stored_bytes(square(decoded.image, settings.size, channels), data)) + INDEX.itemsize
    seconds = time.perf_counter() - began
    notes = [*notes_of(plan.listings), *(f"{sentence}; of the sample" for sentence in sentences_of(report))]
    if not kept:
        raise UserError("\n".join(["no image of the sample can be used", *notes]))
    labels = {item.label for item in items} | {entry.label for entry in sample}
    known = all(item.images for item in items)
    images = sum(item.images for item in items) if known else None
    workers = settings.workers or available_cores()
    return ImageEstimate(
        files=len({item.path for item in items}),
        file_bytes=sum(item.size for item in items),
        parts=len(plan.parts),
        images=images,
        channels=channels,
        classes=sorted((label for label in labels if label is not None), key=natural_order),
        sampled=len(sample),
        disk_bytes=None if images is None else images * stored // len(sample),
        seconds=None if images is None else images * seconds / len(sample) / workers,
        workers=workers,
        notes=notes,
    )


def _sample(plan: ImagePlan) -> Iterator[ImageEntry]:
    """Yield images from evenly spaced items, several from those that hold more than one."""
    items = [item for part in plan.parts for item in part.items]
    columns = ImageJob(plan.settings).columns
    for item in items[:: -(-len(items) // SAMPLED_ITEMS)]:
        yield from islice(entries_of(item, columns), SAMPLED_ROWS)
