"""Build a dataset of visual tokens from a dataset of images: patches → codes → shards of tokens.

Each image becomes a document, in the same split and order: the codes of its patches, row by row, and an end of text.
The codes are learned from training images first (``kmeans``). A build can be resumed like one of text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.errors import UserError
from data_prep.files import write_atomically
from data_prep.pipeline.journal import Journal, PartRecord
from data_prep.pipeline.kmeans import encode, fit_codes, random_numbers
from data_prep.pipeline.resuming import build_or_resume
from data_prep.pipeline.workers import Advance, run_calls
from data_prep.progress import ConsoleReporter, Reporter
from data_prep.settings import VisualTokenSettings, available_cores
from data_prep.shards.codebook import CODEBOOK_FILE, Codebook, load_codebook, patches_of
from data_prep.shards.images import ImageDataset, open_images
from data_prep.shards.manifest import make_manifest
from data_prep.shards.tokens import SPLITS, TOKENIZER_FILE, Dataset, ShardWriter, open_dataset

SAMPLE = 2**17  # training patches that the codes are learned from
IMAGES_AT_ONCE = 256


@dataclass(frozen=True)
class Part:
    """Images ``[start, stop)`` of a split, those of one shard of ``bytes``, all from the source number ``source``."""

    split: str
    start: int
    stop: int
    source: int
    bytes: int


def build_visual_tokens(
    images: str | Path, out: str | Path, patch_size: int, *, progress: Reporter | None = None, **settings: Any
) -> Dataset:
    """Build the dataset ``out`` of visual tokens from a dataset of images, or resume that, and open it.

    Args:
        images: a dataset that ``build_images`` made.
        patch_size: side of a patch in pixels.
        progress: as of ``build_images``.
        settings: any setting of ``data_prep.settings.VisualTokenSettings`` by name, for example ``codes=1024``.

    Raises:
        UserError: a setting is invalid, or there is no such dataset, or it is damaged.
    """
    made = VisualTokenSettings.from_options(images, out, patch_size, **settings)
    build_token_dataset(made, progress=progress or ConsoleReporter())
    return open_dataset(made.out)


def build_token_dataset(settings: VisualTokenSettings, *, progress: Reporter) -> dict[str, Any]:
    """Build or resume the dataset in ``settings.out``, and return its manifest; errors as of the above."""
    settings.check()
    images = open_images(settings.images)
    size, patch = images.format.size, settings.patch_size
    if size % patch:
        fitting = ", ".join(str(side) for side in range(1, size + 1) if size % side == 0)
        raise UserError(f"--patch-size {patch} does not divide the images' {size} pixels: choose one of {fitting}")
    if not images.split("train").count:
        raise UserError(f'"{settings.images}" has no training images to learn codes from')
    identity = {name: value for name, value in asdict(settings).items() if name not in ("images", "out", "workers")}
    identity |= {"images_sha256": images.fingerprint}
    identity |= {"sources": [{"name": each["name"], "weight": 1.0} for each in images.manifest["sources"]]}
    return build_or_resume(
        settings.out,
        identity,
        stamp=lambda: "",  # the fingerprint of the images says more
        finished=lambda: open_dataset(settings.out).manifest,
        run=lambda journal: _build(settings, images, journal, progress),
        progress=progress,
    )


def _build(settings: VisualTokenSettings, images: ImageDataset, journal: Journal, progress: Reporter) -> dict[str, Any]:
    out = settings.out
    images.verify()
    if not (out / CODEBOOK_FILE).is_file():
        with progress.stage("learning codes", None) as advance:
            write_atomically(out / CODEBOOK_FILE, _learned(images, settings, advance).to_bytes())
    codebook = load_codebook(out)
    tokenizer = codebook.tokenizer()
    tokenizer.save(out / TOKENIZER_FILE)
    parts = list(_parts(images))
    calls = [(settings, tokenizer.vocab_size, number, part) for number, part in enumerate(parts)]
    with progress.stage("encoding", sum(part.bytes for part in parts)) as advance:
        records: list[PartRecord] = run_calls(
            build_part, calls, workers=settings.workers or available_cores(), advance=advance
        )
    own = dict(journal.identity)
    manifest = make_manifest(
        tokenizer,
        {split: [shard for record in records for shard in record.shards[split]] for split in SPLITS},
        split_rule={"validation_if": "the image is in that split of the dataset of images"},
        sources=own.pop("sources"),
        settings=own,
        left_out={},
        cleaning={},
        corpus_sha256=None,
        encoders={},
    )
    manifest["visual_tokenizer"] = {
        "file": CODEBOOK_FILE,
        "sha256": codebook.sha256,
        "codes": codebook.codes,
        "patch_size": codebook.size,
        "image_size": images.format.size,
        "channels": codebook.channels,
        "splits": {split: _measured(split, parts, records, images) for split in SPLITS},
    }
    return manifest


def _learned(images: ImageDataset, settings: VisualTokenSettings, advance: Advance) -> Codebook:
    """The codes of random training patches, or of all if they are few."""
    split, channels, patch = images.split("train"), images.format.channels, settings.patch_size
    per_image = (images.format.size // patch) ** 2
    total = split.count * per_image
    everything = total <= SAMPLE
    chosen = np.arange(total) if everything else np.sort(random_numbers(SAMPLE, settings.seed) % np.uint64(total))
    of_image, place = np.divmod(chosen.astype(np.int64), per_image)
    sample = np.empty((len(chosen), patch * patch * channels), np.uint8)
    for start in range(0, split.count, IMAGES_AT_ONCE):
        low, high = np.searchsorted(of_image, (start, start + IMAGES_AT_ONCE))
        numbers, local = np.unique(of_image[low:high], return_inverse=True)
        sample[low:high] = patches_of(split.read(numbers), patch)[local * per_image + place[low:high]]
    advance(sample.nbytes)
    found = fit_codes(sample, settings.codes, settings.seed)
    return Codebook(found.reshape(settings.codes, patch, patch, channels))


def _parts(images: ImageDataset) -> Iterator[Part]:
    for name in SPLITS:
        start = 0
        for shard in images.split(name).records:
            yield Part(name, start, start + shard.images, shard.source, shard.bin_bytes)
            start += shard.images


def build_part(settings: VisualTokenSettings, vocab_size: int, number: int, part: Part, advance: Advance) -> PartRecord:
    """Make the shards of part ``number``, or resume where an interrupted call stopped."""
    record = PartRecord.open(settings.out, number)
    if record.summary is not None:
        advance(part.bytes)
        return record
    codebook, split = load_codebook(settings.out), open_images(settings.images).split(part.split)
    flat = codebook.pixels.reshape(codebook.codes, -1)
    end_of_text = np.array([codebook.tokenizer().end_of_text_id])
    spelled = np.array([len(f"<{code}>") for code in range(codebook.codes)])
    counts, squared_error = np.zeros(codebook.codes, np.int64), 0
    writer = partial(
        ShardWriter,
        settings.out,
        vocab_size=vocab_size,
        part=number,
        source=part.source,
        shard_tokens=settings.shard_tokens,
    )
    done = part.start + sum(shard.documents for shard in record.shards[part.split])
    with record.writers(writer) as writers:
        for start in range(part.start, part.stop, IMAGES_AT_ONCE):
            numbers = np.arange(start, min(start + IMAGES_AT_ONCE, part.stop))
            codes, distances = encode(flat, patches_of(split.read(numbers), codebook.size))
            counts += np.bincount(codes, minlength=codebook.codes)
            squared_error += int(distances.sum())
            for image, own in zip(numbers.tolist(), codes.reshape(len(numbers), -1), strict=True):
                if image >= done:
                    writers[part.split].add(
                        np.concatenate([own, end_of_text]),
                        text_bytes=int(spelled[own].sum()),
                        words=len(own),
                        origin=split.source_of(image),
                    )
    advance(part.bytes)
    record.finish({"counts": counts.tolist(), "squared_error": squared_error})
    return record


def _measured(split: str, parts: list[Part], records: list[PartRecord], images: ImageDataset) -> dict[str, Any]:
    """How many codes a split uses, how evenly, and how far its pixels are from those of their codes."""
    summaries = [record.summary or {} for part, record in zip(parts, records, strict=True) if part.split == split]
    if not summaries:
        return {"used_codes": 0, "perplexity": None, "pixel_error": None}
    counts = np.sum([summary["counts"] for summary in summaries], axis=0)
    shares = counts[counts > 0] / counts.sum()
    values = images.split(split).count * images.format.size**2 * images.format.channels
    error = sum(summary["squared_error"] for summary in summaries) / values
    return {
        "used_codes": int((counts > 0).sum()),
        "perplexity": round(float(np.exp(-(shares * np.log(shares)).sum())), 2),
        "pixel_error": round(error**0.5, 3),
    }
