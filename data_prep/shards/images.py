"""Datasets of images; no other file knows their bytes. ``docs/shard-format.md`` describes them for other programs.

A dataset is a directory::

    manifest.json       the contents, with a checksum of every file; written last, so it marks a finished dataset
    processor.json      what turns a picture into model input: size, channels, mean and standard deviation
    train-00000.bin     the pixels of each image or, above ``LARGEST_RAW`` pixels a side, encoded files
    train-00000.idx     per image four 64-bit integers: class, width and height of the original, end in .bin
    train-00000.txt     per image a line: where it came from
    validation-…        the same for the validation split
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, Self

import numpy as np

from data_prep.errors import UserError
from data_prep.errors.command_names import command
from data_prep.errors.wording import counted
from data_prep.files import atomic_file, parse_json, sha256_of_file, write_atomically
from data_prep.shards.tokens import IMAGES_FORMAT, JOURNAL, MANIFEST, MOST_OPEN_SHARDS, SPLITS
from data_prep.shards.writing import PartWriter
from data_prep.sources.decoding import BadImage, decode, square, upright

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGES_VERSION = 1
PIXELS, FILES = "pixels", "files"
LARGEST_RAW = 96  # pixels a side
INDEX = np.dtype([("class", "<i8"), ("width", "<i8"), ("height", "<i8"), ("end", "<i8")])
ENDINGS = (".bin", ".idx", ".txt")
MOST_OPEN_NAMES = 8  # shards whose names are in memory at once


@dataclass(frozen=True)
class ImageFormat:
    """What turns a picture into model input: ``processor.json`` in datasets and runs.

    ``mean`` and ``std`` have a number per channel, of pixels / 255 over the train split. ``channels`` is 1 (gray) or 3.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    file_name: ClassVar[str] = "processor.json"

    @property
    def shape(self) -> str:
        """Size and channels, in words."""
        return f"{self.size} pixels and {counted(self.channels, 'channel')}"

    @property
    def sha256(self) -> str:
        """The SHA-256 of the file that ``save`` writes."""
        return hashlib.sha256(self._content()).hexdigest()

    def _content(self) -> bytes:
        return (json.dumps(asdict(self), indent=2) + "\n").encode()

    def save(self, path: Path) -> None:
        """Write the format to a JSON file."""
        write_atomically(path, self._content())

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read the file that ``save`` wrote. Raises ``UserError`` if it is missing or damaged."""
        try:
            found = parse_json(path.read_bytes())
            made = cls(
                int(found["size"]),
                int(found["channels"]),
                tuple(map(float, found["mean"])),
                tuple(map(float, found["std"])),
            )
            if made.size < 1 or not made.channels == len(made.mean) == len(made.std):
                raise ValueError
            return made
        except FileNotFoundError:
            raise UserError(f'there is no "{path}"') from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f'"{path}" is damaged: copy or build it again') from None

    def pixels(self, image: Image) -> np.ndarray:
        """Return the pixels of any open Pillow image, exactly as a build stores them.

        Upright, gray or RGB, the shorter side scaled to ``size`` and the middle cut out: uint8, shape
        ``(size, size, channels)``. Raises ``BadImage`` as ``data_prep.sources.decoding.upright`` does.
        """
        return square(upright(image).image, self.size, self.channels)


@dataclass(frozen=True)
class ImageShardRecord:
    """The entry for one shard in the manifest.

    ``source`` is an index into the manifest's sources. ``classes`` counts the images of each class, in the order of
    the numbers in the index. ``sums`` and ``squares`` have, for each channel, the sum of all pixels and of their
    squares.
    """

    name: str
    source: int
    images: int
    bin_bytes: int
    txt_bytes: int
    classes: dict[str, int]
    sums: list[int]
    squares: list[int]
    bin_sha256: str
    idx_sha256: str
    txt_sha256: str
    first: str
    last: str


class ImageShardWriter(PartWriter[ImageShardRecord, "_OpenShard"]):
    """A context manager that writes a part's images of one split as shards; leaving it finishes the last shard.

    ``finished`` lists the shards that an interrupted call already wrote; writing continues after them. ``on_finished``
    is called with the record of each new shard once all of its files are on disk.
    """

    def __init__(
        self,
        directory: Path,
        split: str,
        *,
        part: int,
        source: int,
        shard_bytes: int,
        finished: Sequence[ImageShardRecord] = (),
        on_finished: Callable[[ImageShardRecord], None] = lambda record: None,
    ) -> None:
        super().__init__(f"{split}-{part:05d}", finished, on_finished)
        self._directory = directory
        self._source = source
        self._shard_bytes = shard_bytes

    def add(self, pixels: np.ndarray, stored: bytes, *, label: str | None, size: tuple[int, int], origin: str) -> None:
        """Append one image.

        Args:
            pixels: uint8, shape ``(size, size, channels)``.
            stored: what goes into the shard, the same pixels or a file that decodes to them.
            label: its class, or None.
            size: width and height of the original.
            origin: where it is in the source.
        """
        full = self._open is not None and self._open.bytes + len(stored) > self._shard_bytes
        shard = self._shard(full=full, begin=lambda name: _OpenShard(self._directory, name, self._source))
        shard.add(pixels, stored, label, size, origin)


class _OpenShard:
    """The shard being written: images go straight to disk, only their index entries and names stay in memory."""

    def __init__(self, directory: Path, name: str, source: int) -> None:
        self.bytes = 0
        self._directory = directory
        self._name = name
        self._source = source
        self._classes: dict[str, int] = {}
        self._counts: list[int] = []
        self._index: list[tuple[int, int, int, int]] = []
        self._origins: list[str] = []
        self._sums = self._squares = np.zeros(1, np.int64)  # becomes one per channel
        self._hash = hashlib.sha256()
        self.stack = ExitStack()
        self._file: IO[bytes] = self.stack.enter_context(atomic_file(directory / f"{name}.bin", sync_name=False))

    def add(self, pixels: np.ndarray, stored: bytes, label: str | None, size: tuple[int, int], origin: str) -> None:
        self._hash.update(stored)
        self._file.write(stored)
        self.bytes += len(stored)
        number = -1
        if label is not None:
            number = self._classes.setdefault(label, len(self._classes))
            self._counts += [0] if number == len(self._counts) else []
            self._counts[number] += 1
        self._index.append((number, *size, self.bytes))
        self._origins.append(origin)
        by_channel = np.ascontiguousarray(pixels.reshape(-1, pixels.shape[-1]).T).astype(np.int32)
        self._sums = self._sums + by_channel.sum(1, dtype=np.int64)
        self._squares = self._squares + (by_channel * by_channel).sum(1, dtype=np.int64)

    def finish(self) -> ImageShardRecord:
        self.stack.close()
        index = np.array(self._index, "<i8").tobytes()
        origins = "".join(f"{origin}\n" for origin in self._origins).encode()
        for ending, content in ((".txt", origins), (".idx", index)):
            with atomic_file(self._directory / f"{self._name}{ending}", sync_name=ending == ".idx") as file:
                file.write(content)
        return ImageShardRecord(
            name=self._name,
            source=self._source,
            images=len(self._index),
            bin_bytes=self.bytes,
            txt_bytes=len(origins),
            classes=dict(zip(self._classes, self._counts, strict=True)),
            sums=self._sums.tolist(),
            squares=self._squares.tolist(),
            bin_sha256=self._hash.hexdigest(),
            idx_sha256=hashlib.sha256(index).hexdigest(),
            txt_sha256=hashlib.sha256(origins).hexdigest(),
            first=self._origins[0],
            last=self._origins[-1],
        )


def stored_bytes(pixels: np.ndarray, data: bytes) -> bytes:
    """Return what a shard stores of an image: its pixels or, above ``LARGEST_RAW``, a file that decodes to them.

    That is the file it came in or, if this is larger than the pixels themselves, a PNG of the pixels.
    """
    size, _, channels = pixels.shape
    if size <= LARGEST_RAW:
        return pixels.tobytes()
    if len(data) <= pixels.size:
        return data
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels if channels == 3 else pixels[:, :, 0]).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


class ImageSplit:
    """One split of a dataset, read by image number across its shards. Reading is thread-safe."""

    def __init__(self, directory: Path, name: str, manifest: dict[str, Any], form: ImageFormat) -> None:
        totals = manifest["splits"][name]
        self.name = name
        self.count: int = totals["images"]
        self.records = [ImageShardRecord(**record) for record in totals["shards"]]
        self._directory = directory
        self._format = form
        self._raw = manifest["storage"] == PIXELS
        self._class_numbers = {label: number for number, label in enumerate(manifest["classes"])}
        self._ends = np.cumsum([record.images for record in self.records], dtype=np.int64)
        self._bytes_of = lru_cache(maxsize=MOST_OPEN_SHARDS)(self._map)
        self._index_of = lru_cache(maxsize=MOST_OPEN_SHARDS)(self._read_index)
        self._origins_of = lru_cache(maxsize=MOST_OPEN_NAMES)(self._read_origins)

    @cached_property
    def labels(self) -> np.ndarray:
        """The class of each image, an index into the dataset's ``classes``, or -1: int64, shape ``(count,)``."""
        found = [np.empty(0, np.int64)]
        for shard, record in enumerate(self.records):
            numbers = np.array([*(self._class_numbers[label] for label in record.classes), -1], np.int64)
            found.append(numbers[self._index_of(shard)["class"]])  # -1 is the last one
        return np.concatenate(found)

    @cached_property
    def sizes(self) -> np.ndarray:
        """Width and height of each original image, after it was turned upright: int64, shape ``(count, 2)``."""
        found = [np.empty((0, 2), np.int64)]
        for shard in range(len(self.records)):
            index = self._index_of(shard)
            found.append(np.stack([index["width"], index["height"]], axis=1))
        return np.concatenate(found)

    def read(self, numbers: np.ndarray) -> np.ndarray:
        """Return the images of these numbers, in their order: uint8, shape ``(n, size, size, channels)``."""
        numbers = np.asarray(numbers, np.int64)
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < self.count):
            raise IndexError(f"images {numbers.min()} to {numbers.max()} of a split of {self.count}")
        size, channels = self._format.size, self._format.channels
        out = np.empty((len(numbers), size, size, channels), np.uint8)
        shards = np.searchsorted(self._ends, numbers, side="right")
        for shard in np.unique(shards).tolist():
            chosen = shards == shard
            local = numbers[chosen] - (int(self._ends[shard]) - self.records[shard].images)
            stored = self._bytes_of(shard)
            if self._raw:
                out[chosen] = stored.reshape(-1, size, size, channels)[local]
            else:
                ends = self._index_of(shard)["end"]
                for place, number in zip(np.flatnonzero(chosen).tolist(), local.tolist(), strict=True):
                    start = int(ends[number - 1]) if number else 0
                    out[place] = self._decoded(shard, stored[start : int(ends[number])].tobytes())
        return out

    def _decoded(self, shard: int, data: bytes) -> np.ndarray:
        try:
            return self._format.pixels(decode(data))
        except BadImage as error:
            path = self._directory / f"{self.records[shard].name}.bin"
            raise UserError(
                f'"{path}" has an image that cannot be decoded ({error}): build the dataset again'
            ) from None

    def source_of(self, number: int) -> str:
        """Return where an image came from, like ``photos/cat/1.jpg``."""
        if not 0 <= number < self.count:
            raise IndexError(f"image {number} of a split of {self.count}")
        shard = int(np.searchsorted(self._ends, number, side="right"))
        return self._origins_of(shard)[number - (int(self._ends[shard]) - self.records[shard].images)]

    def check_index(self, record: ImageShardRecord) -> None:
        """Raise ``UserError`` unless the index and the names of a shard fit its images."""
        shard = self.records.index(record)
        index, size = self._index_of(shard), self._format.size
        steps = np.diff(index["end"], prepend=0)
        fits = int(index["end"][-1]) == record.bin_bytes and steps.min() > 0
        if self._raw:
            fits = fits and (steps == size * size * self._format.channels).all()
        counts = np.bincount(index["class"] + 1, minlength=len(record.classes) + 1)[1:].tolist()
        if not fits or counts != list(record.classes.values()) or len(self._origins_of(shard)) != record.images:
            raise UserError(f'"{self._directory / record.name}.idx" is inconsistent: build the dataset again')

    def _map(self, shard: int) -> np.ndarray:
        return np.asarray(np.memmap(self._directory / f"{self.records[shard].name}.bin", np.uint8, "r"))

    def _read_index(self, shard: int) -> np.ndarray:
        return np.fromfile(self._directory / f"{self.records[shard].name}.idx", INDEX)

    def _read_origins(self, shard: int) -> list[str]:
        return (self._directory / f"{self.records[shard].name}.txt").read_text(encoding="utf-8").split("\n")[:-1]


class ImageDataset:
    """A finished dataset of images, checked when it was opened. Use ``open_images`` to get one."""

    def __init__(self, directory: Path, manifest: dict[str, Any], fingerprint: str, form: ImageFormat) -> None:
        self.directory = directory
        self.manifest = manifest
        #: SHA-256 of manifest.json. The manifest has the checksum of every file, so this identifies all content.
        self.fingerprint = fingerprint
        self.format = form
        self.classes: tuple[str, ...] = tuple(manifest["classes"])
        self._splits = {name: ImageSplit(directory, name, manifest, form) for name in SPLITS}

    @property
    def location(self) -> str:
        """The path of its folder."""
        return str(self.directory)

    @property
    def is_verified(self) -> bool:
        """Whether it need not be verified again: any program may have changed it since."""
        return False

    def split(self, name: str) -> ImageSplit:
        """Return the split ``train`` or ``validation``; an empty split has no images."""
        if name not in self._splits:
            raise UserError(f'there is no split "{name}": choose {" or ".join(SPLITS)}')
        return self._splits[name]

    def check_files(self) -> None:
        """Raise ``UserError`` unless every file exists with the right size. Reads no images."""
        for split in self._splits.values():
            for record in split.records:
                sizes = (record.bin_bytes, record.images * INDEX.itemsize, record.txt_bytes)
                for ending, size in zip(ENDINGS, sizes, strict=True):
                    path = self.directory / f"{record.name}{ending}"
                    if not path.is_file():
                        raise UserError(f'"{path}" is missing: copy or build the whole dataset again')
                    if (there := path.stat().st_size) != size:
                        raise UserError(f'"{path}" has {there:,} bytes instead of {size:,}: copy or build it again')

    def verify(self, on_file: Callable[[str, int], None] = lambda name, size: None) -> None:
        """Read everything, and raise ``UserError`` at the first file that has changed since the build.

        ``on_file`` is called with the name and size of each intact file.
        """
        for split in self._splits.values():
            for record in split.records:
                for ending, expected in zip(
                    ENDINGS, (record.bin_sha256, record.idx_sha256, record.txt_sha256), strict=True
                ):
                    path = self.directory / f"{record.name}{ending}"
                    if sha256_of_file(path) != expected:
                        raise UserError(f'"{path}" is damaged: its checksum differs from the one in {MANIFEST}')
                    on_file(path.name, path.stat().st_size)
                split.check_index(record)


def holds_images(path: str | Path) -> bool:
    """Return whether a directory is a finished dataset of images, by its manifest."""
    try:
        return bool(parse_json((Path(path) / MANIFEST).read_bytes())["format"] == IMAGES_FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def open_images(directory: str | Path) -> ImageDataset:
    """Open a finished dataset of images. Only sizes are checked, so this is fast for datasets of any size.

    Raises ``UserError`` if the directory is not a finished dataset of images, or if a file is missing or has the wrong
    size.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    if not directory.is_dir():
        raise UserError(
            f'"{directory}" is a file, not a dataset' if directory.is_file() else f'there is no folder "{directory}"'
        )
    if not path.is_file() and (directory / JOURNAL).is_file():
        raise UserError(f'the build of "{directory}" is not finished: run the same command again to resume it')
    if not path.is_file():
        raise UserError(
            f'"{directory}" is not a Kindling dataset (it has no {MANIFEST}); make one with: '
            f"{command('prep images')} YOUR_IMAGES --out {directory} --size 32"
        )
    content = path.read_bytes()
    try:
        manifest = parse_json(content)
        if manifest["format"] != IMAGES_FORMAT:
            raise UserError(f'"{directory}" is a dataset of text, not of images')
        if manifest["version"] != IMAGES_VERSION:
            raise UserError(
                f'"{path}" has version {manifest["version"]}, but this program reads version {IMAGES_VERSION}: '
                "build it again"
            )
        form = ImageFormat.load(directory / ImageFormat.file_name)
        if form.sha256 != manifest["processor"]["sha256"]:
            raise UserError(f'"{directory / ImageFormat.file_name}" is not the one of this dataset: build it again')
        dataset = ImageDataset(directory, manifest, hashlib.sha256(content).hexdigest(), form)
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f'"{path}" is damaged or not a manifest of {IMAGES_FORMAT}: build the dataset again') from None
    dataset.check_files()
    return dataset
