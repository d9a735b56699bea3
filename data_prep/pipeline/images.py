"""Build a dataset of images: sources → parts → decoded, cropped and scaled → shards.

It can be resumed like a build of text, and skips the steps that are done:

1. List the images, by names and sizes only, and divide them into parts.
2. Choose the threshold between training and validation, and the channels: the first images suffice, unless there are
   few or all are gray.
3. Make the shards of every part, in worker processes.
4. Write what turns pictures into model input, and the manifest.
"""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.pipeline.image_parts import ImageJob, ImagePart, ImageReport, build_image_part
from data_prep.pipeline.journal import Journal, PartRecord
from data_prep.pipeline.resuming import build_or_resume, part_size, refuse_changed_sources, stamp_of
from data_prep.pipeline.splitting import SplitRule, hash_of
from data_prep.pipeline.workers import run_calls
from data_prep.progress import ConsoleReporter, Reporter
from data_prep.settings import ImageSettings, available_cores, version_of
from data_prep.shards.images import (
    FILES,
    IMAGES_VERSION,
    LARGEST_RAW,
    PIXELS,
    ImageDataset,
    ImageFormat,
    ImageShardRecord,
    open_images,
)
from data_prep.shards.tokens import IMAGES_FORMAT, SPLITS
from data_prep.sources.decoding import BadImage, decode_noting, looks_gray
from data_prep.sources.formats import summary_of
from data_prep.sources.images import FILE, MEMBER, TEST, TRAIN, VALIDATION, ImageEntry, Listing, entries_of, list_images
from data_prep.sources.listing import grouped

PART_BYTES = 64 * 2**20
MOST_DIGITS = 20  # of a class that is a number
NEED_CONVERSION = (".heic", ".heif", ".dng", ".cr2", ".nef", ".arw")  # photos that Pillow does not read


@dataclass(frozen=True)
class ImagePlan:
    """What the sources hold, the parts of a build of images, and everything that determines the result."""

    settings: ImageSettings
    listings: tuple[Listing, ...]
    parts: tuple[ImagePart, ...]
    identity: dict[str, Any]

    @classmethod
    def of(cls, settings: ImageSettings) -> ImagePlan:
        """Plan a build. Raises ``UserError`` for invalid settings and for missing sources."""
        settings.check()
        listings = list_images(settings.sources)
        if settings.validation:
            for listing, text in zip(listings, settings.sources, strict=True):
                if any(item.split for item in listing.items):
                    raise UserError(
                        f'"{text}" has folders for validation or test: name its folder with the training images, or '
                        "leave out --validation"
                    )
            held_out = [_with_split(each, VALIDATION) for each in list_images(settings.validation)]
            listings = [*(_with_split(each, TRAIN) for each in listings), *held_out]
        else:
            listings = [_without_test(each) for each in listings]
        listings = list(_files_together(listings))
        most = min(PART_BYTES, part_size(sum(item.size for each in listings for item in each.items)))
        parts = [
            ImagePart(source, items, size)
            for source, listing in enumerate(listings)
            for items, size in grouped(((item, item.size) for item in listing.items), most)
        ]
        without = ("sources", "validation", "out", "workers")  # the list of sources has names without paths
        identity = {name: value for name, value in asdict(settings).items() if name not in without}
        identity |= {"format": IMAGES_FORMAT, "sources": [_describe(listing) for listing in listings]}
        return cls(settings, tuple(listings), tuple(parts), json.loads(json.dumps(identity)))

    def stamp(self) -> str:
        """Return a fingerprint of the names, sizes and modification times of all local files."""
        return stamp_of(item.path for part in self.parts for item in part.items)


def _with_split(listing: Listing, split: str) -> Listing:
    return replace(listing, split=split, items=[replace(item, split=split) for item in listing.items])


def _files_together(listings: Sequence[Listing]) -> Iterator[Listing]:
    """Make one source of successive files, as a shell names them for photos/*.jpg: each source has its own shards."""
    for (is_file, split), group in groupby(listings, lambda each: (each.is_file, each.split)):
        several = list(group)
        if not is_file or len(several) == 1:
            yield from several
        else:
            items = [item for each in several for item in each.items]
            yield Listing(f"{several[0].name} to {several[-1].name}", items, split=split)


def _without_test(listing: Listing) -> Listing:
    """Leave test images out if there are validation images too, and say so."""
    used = [item for item in listing.items if item.split != TEST]
    if left := len(listing.items) - len(used):
        note = f'"{listing.name}" has folders for training, validation and test: the {left:,} for test are left out'
        return replace(listing, items=used, notes=[*listing.notes, note])
    return listing


def _describe(listing: Listing) -> dict[str, Any]:
    return {
        "name": listing.name,
        "split": listing.split,
        "files": len({item.path for item in listing.items}),
        "bytes": sum(item.size for item in listing.items),
    }


def build_images(
    sources: Sequence[str | Path], out: str | Path, size: int, *, progress: Reporter | None = None, **settings: Any
) -> ImageDataset:
    """Build the dataset ``out`` from images, or resume an interrupted build there, and open it.

    Args:
        sources: folders, archives, "builtin:digits" and so on, as on the command line.
        size: pixels a side of the stored images.
        progress: where progress goes, by default to the terminal or notebook; pass
            ``data_prep.progress.SilentReporter()`` to hide it.
        settings: any setting of ``data_prep.settings.ImageSettings`` by name, for example ``channels=1``.

    Raises:
        UserError: a setting or source is invalid, or the build cannot be completed. A new build that fails before its
            first part is done leaves nothing behind.
    """
    made = ImageSettings.from_options(sources, out, size, **settings)
    build_image_dataset(made, progress=progress or ConsoleReporter())
    return open_images(made.out)


def build_image_dataset(settings: ImageSettings, *, progress: Reporter) -> dict[str, Any]:
    """Build or resume the dataset of images in ``settings.out``, and return its manifest.

    A finished dataset with the same settings is left unchanged. Raises ``UserError`` as ``build_images`` does.
    """
    plan = ImagePlan.of(settings)
    return build_or_resume(
        settings.out,
        plan.identity,
        stamp=plan.stamp,
        finished=lambda: open_images(settings.out).manifest,
        run=lambda journal: _ImageBuild(plan, journal, progress).run(),
        progress=progress,
    )


@dataclass
class _ImageBuild:
    plan: ImagePlan
    journal: Journal
    progress: Reporter

    def run(self) -> dict[str, Any]:
        for sentence in notes_of(self.plan.listings):
            self.progress.note(sentence)
        self._settle()
        return self._build_parts()

    def _settle(self) -> None:
        """Step 2: read until both are known, or to the end."""
        if self.journal.threshold is not None:
            return
        settings = self.plan.settings
        split, report, any_entry, any_image = SplitRule(settings.validation_fraction), ImageReport(), False, False
        splits = {item.split for part in self.plan.parts for item in part.items}
        by_hash = None in splits
        channels = settings.channels or 1
        for entry in self._entries():
            any_entry, settled = True, split.settled or not by_hash
            all_gray = channels == 1 and not settings.channels
            if any_image and settled and not all_gray:
                break
            divides = entry.split is None and not split.settled
            if not (divides or all_gray or (not any_image and entry.split != VALIDATION)):
                continue
            try:
                data = entry.read()
                if any_image and not divides and looks_gray(data):
                    continue
                image = decode_noting(data).image
            except BadImage as error:
                report.leave_out(entry.name, error)
                continue
            any_image = any_image or entry.split != VALIDATION
            if entry.split is None:
                split.add(hash_of(data))
            if all_gray and image.mode == "RGB":
                channels = 3
        if not any_image:
            why = "; ".join(f"{cases.images:,} {reason}" for reason, cases in report.left_out.items())
            none = "all are for validation" if any_entry else "there are none"
            raise UserError(f"none of the images can be used for training: {why or none}")
        by_hash = by_hash and not (split.all_equal and VALIDATION in splits)  # then a single image needs no division
        if by_hash and split.all_equal:
            raise UserError(
                "there is only one image, or all are the same, too few for a validation split: add images, name others "
                "with --validation, or skip validation with --validation-fraction 0"
            )
        self.journal.threshold = split.threshold(0) if by_hash else 0
        self.journal.channels = channels
        if channels == 1 and not settings.channels:
            self.progress.note("all images are gray: storing 1 channel (for 3 equal ones: --channels 3)")
        self.journal.save()

    def _entries(self) -> Iterator[ImageEntry]:
        columns = ImageJob(self.plan.settings).columns
        for part in self.plan.parts:
            for item in part.items:
                yield from entries_of(item, columns)

    def _build_parts(self) -> dict[str, Any]:
        """Step 3 and 4. Return the manifest, which does not depend on the time, the machine or the workers."""
        settings, parts = self.plan.settings, self.plan.parts
        job = ImageJob(settings, self.journal.channels, self.journal.threshold or 0)
        calls = [(job, number, part) for number, part in enumerate(parts)]
        total = sum(part.bytes for part in parts) if all(part.bytes for part in parts) else None
        with self.progress.stage("decoding", total) as advance:
            workers = settings.workers or available_cores()
            records: list[PartRecord] = run_calls(build_image_part, calls, workers=workers, advance=advance)
        refuse_changed_sources(settings.out, self.plan.stamp(), self.journal)
        report = ImageReport()
        for record in records:
            report.merge(ImageReport.from_json(record.summary or {}))
        for sentence in sentences_of(report):
            self.progress.note(sentence)
        shards = {split: [shard for record in records for shard in record.shards[split]] for split in SPLITS}
        if settings.validation and not shards[VALIDATION]:
            self.progress.note("note: none of the images named by --validation can be used")
        form = _format_of(settings.size, self.journal.channels, shards[TRAIN])
        form.save(settings.out / ImageFormat.file_name)
        return _manifest(form, shards, report, self.journal)


def notes_of(listings: Sequence[Listing]) -> Iterator[str]:
    """Yield a sentence for each thing to know about what was listed."""
    for listing in listings:
        yield from (f"note: {note}" for note in listing.notes)
        if listing.unread:
            files = "1 file" if len(listing.unread) == 1 else f"{len(listing.unread):,} files"
            convert = any(name.lower().endswith(NEED_CONVERSION) for name in listing.unread)
            yield (
                f'left out: {files} in "{listing.name}" without the name of an image: {summary_of(listing.unread)}'
                + ("; convert photos to .jpg or .png first" if convert else "")
            )
    for_training = [listing for listing in listings if listing.split != VALIDATION]
    if len(for_training) > 1 and all(_is_flat(listing) for listing in for_training):
        yield (
            f"note: these {len(for_training):,} sources have no classes: if each source is one, name the folder that "
            "holds them all"
        )


def _is_flat(listing: Listing) -> bool:
    return all(item.kind in (FILE, MEMBER) and item.label is None for item in listing.items)


def sentences_of(report: ImageReport) -> Iterator[str]:
    """Yield a sentence for each reason for which images were left out or changed, with the first of them."""
    for word, found in (("left out", report.left_out), ("note", report.changed)):
        for reason, cases in found.items():
            images = "1 image" if cases.images == 1 else f"{cases.images:,} images"
            yield f"{word}: {images}, {reason} (the first: {cases.first})"


def _format_of(size: int, channels: int, shards: Sequence[ImageShardRecord]) -> ImageFormat:
    """Return the format with the exact mean and standard deviation of the pixels of some shards."""
    pixels = sum(shard.images for shard in shards) * size * size
    if not pixels:
        raise UserError("none of the images is for training: name others, or lower --validation-fraction")
    mean, std = [], []
    for channel in range(channels):
        total = sum(shard.sums[channel] for shard in shards)
        squares = sum(shard.squares[channel] for shard in shards)
        mean.append(total / (255 * pixels))
        spread = math.sqrt(pixels * squares - total * total) / (255 * pixels)
        std.append(spread or 1.0)  # of a channel that is the same everywhere
    return ImageFormat(size, channels, tuple(mean), tuple(std))


def _manifest(
    form: ImageFormat, shards: dict[str, list[ImageShardRecord]], report: ImageReport, journal: Journal
) -> dict[str, Any]:
    """Return the manifest; ``docs/shard-format.md`` explains each entry."""
    settings = dict(journal.identity)
    names = {label for records in shards.values() for record in records for label in record.classes}
    classes = sorted(names, key=natural_order)
    return {
        "format": IMAGES_FORMAT,
        "version": IMAGES_VERSION,
        "processor": {"file": ImageFormat.file_name, "sha256": form.sha256} | asdict(form),
        "storage": PIXELS if form.size <= LARGEST_RAW else FILES,
        "classes": classes,
        "split_rule": {
            "validation_if": "the source says so, or the first 8 bytes of BLAKE2b (digest size 8) of the file, "
            "big-endian, are below",
            "threshold": f"0x{journal.threshold or 0:016x}",
        },
        "sources": settings.pop("sources"),
        "settings": settings,
        **report.to_json(),
        "splits": {
            split: {
                "images": sum(record.images for record in records),
                "classes": {name: sum(record.classes.get(name, 0) for record in records) for name in classes},
                "shards": [asdict(record) for record in records],
            }
            for split, records in shards.items()
        },
        "versions": {
            "kindling": version_of("kindling-lm") or "unknown",
            "pillow": version_of("pillow") or "unknown",
            "python": platform.python_version(),
        },
    }


def natural_order(name: str) -> tuple[int, int, str]:
    """Return what to sort classes by: numbers by value, then names."""
    return (0, int(name), name) if name.isdecimal() and len(name) < MOST_DIGITS else (1, 0, name)
