"""Process one part of a build of images. The result depends only on the part and the job.

::

    read → decode → split → crop and scale → shards, and a record of what was left out or changed
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Self

from data_prep.pipeline.journal import PartRecord
from data_prep.pipeline.splitting import hash_of
from data_prep.pipeline.workers import Advance
from data_prep.settings import ImageSettings
from data_prep.shards.images import ImageShardRecord, ImageShardWriter, stored_bytes
from data_prep.shards.tokens import SPLITS
from data_prep.sources.decoding import BadImage, decode_noting, square
from data_prep.sources.images import TRAIN, VALIDATION, Columns, ImageItem, entries_of

ENLARGED = "smaller than --size, enlarged"
MADE_COLOR = "gray, repeated in 3 channels"
MADE_GRAY = "in color, made gray"


@dataclass(frozen=True)
class ImagePart:
    """What one worker reads at a time. ``bytes`` is the size of the items, 0 if unknown."""

    source: int
    items: tuple[ImageItem, ...]
    bytes: int


@dataclass(frozen=True)
class ImageJob:
    """What a worker needs to know to process any part of a build of images."""

    settings: ImageSettings
    channels: int = 0
    threshold: int = 0

    @property
    def columns(self) -> Columns:
        return Columns(self.settings.image_column, self.settings.label_column)


@dataclass
class Cases:
    """How many images something happened to, and the first of them."""

    images: int
    first: str


@dataclass
class ImageReport:
    """What was left out, by reason, and what was changed in images that were kept."""

    left_out: dict[str, Cases] = field(default_factory=dict)
    changed: dict[str, Cases] = field(default_factory=dict)

    def leave_out(self, name: str, error: BadImage) -> None:
        """Count an image that cannot be used."""
        _count(self.left_out, error.reason, f"{name}: {error.detail}" if error.detail else name)

    def change(self, name: str, changes: Iterator[str]) -> None:
        """Count what was changed in an image."""
        for each in changes:
            _count(self.changed, each, name)

    def merge(self, other: ImageReport) -> None:
        """Add the report of another part. Merging in the order of the parts gives the same result every time."""
        for mine, others in ((self.left_out, other.left_out), (self.changed, other.changed)):
            for reason, cases in others.items():
                mine.setdefault(reason, Cases(0, cases.first)).images += cases.images

    def to_json(self) -> dict[str, Any]:
        """Return the report ready for JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Self:
        """Read what ``to_json`` returned."""
        return cls(*({why: Cases(**cases) for why, cases in found[name].items()} for name in ("left_out", "changed")))


def _count(cases: dict[str, Cases], reason: str, first: str) -> None:
    cases.setdefault(reason, Cases(0, first)).images += 1


def build_image_part(job: ImageJob, number: int, part: ImagePart, advance: Advance) -> PartRecord:
    """Make the shards of part ``number``, or resume where an interrupted call stopped."""
    record = PartRecord.open(job.settings.out, number, ImageShardRecord)
    if record.summary is not None:
        advance(part.bytes)
        return record
    report = ImageReport()
    finished = {split: sum(shard.images for shard in record.shards[split]) for split in SPLITS}
    size, channels = job.settings.size, job.channels
    writer = partial(
        ImageShardWriter, job.settings.out, part=number, source=part.source, shard_bytes=job.settings.shard_bytes
    )
    with record.writers(writer) as writers:
        for item in part.items:
            for entry in entries_of(item, job.columns):
                try:
                    data = entry.read()
                    decoded = decode_noting(data)
                except BadImage as error:
                    report.leave_out(entry.name, error)
                    continue
                if not item.size:
                    advance(len(data))
                image = decoded.image
                report.change(entry.name, _changes(decoded.changes, image.size, image.mode, job))
                split = entry.split or (VALIDATION if hash_of(data) < job.threshold else TRAIN)
                finished[split] -= 1
                if finished[split] < 0:
                    pixels = square(image, size, channels)
                    writers[split].add(
                        pixels, stored_bytes(pixels, data), label=entry.label, size=image.size, origin=entry.name
                    )
            advance(item.size)
    record.finish(report.to_json())
    return record


def _changes(decoding: tuple[str, ...], size: tuple[int, int], mode: str, job: ImageJob) -> Iterator[str]:
    yield from decoding
    if min(size) < job.settings.size:
        yield ENLARGED
    if (mode == "L") != (job.channels == 1):
        yield MADE_COLOR if mode == "L" else MADE_GRAY
