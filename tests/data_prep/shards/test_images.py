from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import build_images, open_images
from data_prep.errors import UserError
from data_prep.progress import SilentReporter
from data_prep.shards.images import ImageFormat, ImageShardWriter, holds_images
from data_prep.shards.tokens import open_dataset
from data_prep.sources.images import BadImage, find_images
from tests.data_prep.handmade_images import encoded, picture, with_exif, write_tree

FORM = ImageFormat(8, 3, (0.1, 0.2, 0.3), (0.25, 0.5, 0.75))


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {f"{name}/{n}.png": encoded(picture(10 * n + k), "PNG") for k, name in enumerate("ab") for n in range(9)}
    return write_tree(tmp_path_factory.mktemp("photos") / "photos", files | {"c.png": encoded(picture(99), "PNG")})


@pytest.fixture(scope="module", params=[8, 100])
def built(request: pytest.FixtureRequest, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored as pixels, and as files; several shards."""
    out = tmp_path_factory.mktemp("built") / "out"
    size = request.param
    several = 900 if size == 8 else 2500  # bytes of a few images
    build_images([photos], out, size, shard_bytes=several, validation_fraction=0.3, progress=SilentReporter())
    return out


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "copy")


def test_any_numbers_are_read_in_their_order(built: Path) -> None:
    split = open_images(built).split("train")
    assert len(split.records) > 2
    everything = np.concatenate([split.read(np.array([n])) for n in range(split.count)])
    numbers = np.random.default_rng(1).integers(0, split.count, 50)
    assert (split.read(numbers) == everything[numbers]).all()
    assert split.read(np.empty(0, np.int64)).shape == (0, *everything.shape[1:])
    assert everything.dtype == np.uint8
    for number in (-1, split.count):
        with pytest.raises(IndexError):
            split.read(np.array([0, number]))
        with pytest.raises(IndexError):
            split.source_of(number)


def test_several_threads_read_at_once(built: Path) -> None:
    split = open_images(built).split("train")
    numbers = np.arange(split.count)
    expected = split.read(numbers)
    with ThreadPoolExecutor(4) as threads:
        assert all((found == expected).all() for found in threads.map(split.read, [numbers] * 20))


def test_labels_sizes_and_sources_belong_to_the_images(built: Path, photos: Path) -> None:
    dataset = open_images(built)
    assert dataset.classes == ("a", "b")
    names = set()
    for name in ("train", "validation"):
        split = dataset.split(name)
        assert split.labels.dtype == np.int64
        assert split.labels.shape == (split.count,)
        for number in range(split.count):
            path = photos.parent / split.source_of(number)
            names.add(path)
            label = dataset.classes[split.labels[number]] if split.labels[number] >= 0 else "photos"
            assert label == path.parent.name
            with Image.open(path) as image:
                assert tuple(split.sizes[number]) == image.size
                assert (split.read(np.array([number]))[0] == dataset.format.pixels(image)).all()
    assert names == set(photos.rglob("*.png"))


def test_the_files_are_as_the_docs_describe_them(built: Path) -> None:
    """Read by NumPy and JSON alone."""
    manifest = json.loads((built / "manifest.json").read_text())
    size, channels = manifest["processor"]["size"], manifest["processor"]["channels"]
    split = open_images(built).split("train")
    start = 0
    for shard in manifest["splits"]["train"]["shards"]:
        index = np.fromfile(built / f"{shard['name']}.idx", "<i8").reshape(-1, 4)
        names = (built / f"{shard['name']}.txt").read_text(encoding="utf-8").splitlines()
        content = (built / f"{shard['name']}.bin").read_bytes()
        assert len(index) == len(names) == shard["images"]
        assert index[-1, 3] == len(content) == shard["bin_bytes"]
        for number, (label, width, height, end) in enumerate(index.tolist()):
            assert names[number] == split.source_of(start + number)
            assert (width, height) == (20, 16)
            expected = manifest["classes"][split.labels[start + number]] if label >= 0 else None
            assert (list(shard["classes"])[label] if label >= 0 else None) == expected
            stored = content[index[number - 1, 3] if number else 0 : end]
            if manifest["storage"] == "pixels":
                pixels = np.frombuffer(stored, np.uint8).reshape(size, size, channels)
                assert (pixels == split.read(np.array([start + number]))[0]).all()
            else:
                assert stored.startswith(b"\x89PNG")
        start += shard["images"]
    assert start == manifest["splits"]["train"]["images"]


@pytest.mark.parametrize("ending", [".bin", ".idx", ".txt"])
def test_verify_finds_a_changed_byte(copy: Path, ending: str) -> None:
    open_images(copy).verify()
    path = sorted(copy.glob(f"train-*{ending}"))[-1]
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{path.name}\" is damaged: its checksum differs"):
        open_images(copy).verify()


def test_a_shard_may_be_exactly_full(photos: Path, tmp_path: Path) -> None:
    options = {"validation_fraction": 0, "workers": 1, "progress": SilentReporter()}
    split = build_images([photos], tmp_path / "out", 8, shard_bytes=3 * 8 * 8 * 3, **options).split("train")
    assert [record.images for record in split.records] == [3, 3, 3, 3, 3, 3, 1]


@pytest.mark.parametrize("end", ["half", "nothing"])
def test_verify_finds_an_index_that_does_not_fit(copy: Path, end: str) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    shard = manifest["splits"]["train"]["shards"][0]
    path = copy / f"{shard['name']}.idx"
    index = np.fromfile(path, "<i8").reshape(-1, 4)
    index[0, 3] = index[0, 3] // 2 if end == "half" else 0
    path.write_bytes(index.tobytes())
    shard["idx_sha256"] = hashlib.sha256(index.tobytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    if manifest["storage"] == "pixels" or end == "nothing":
        with pytest.raises(UserError, match="is inconsistent"):
            open_images(copy).verify()
    else:
        with pytest.raises(UserError, match="has an image that cannot be decoded"):
            open_images(copy).split("train").read(np.arange(1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: sorted(path.glob("*.bin"))[0].unlink(), r"\.bin\" is missing: copy or build"),
        (lambda path: sorted(path.glob("*.idx"))[0].write_bytes(b"x"), "has 1 bytes instead of"),
        (lambda path: sorted(path.glob("*.txt"))[0].write_bytes(b""), "has 0 bytes instead of"),
        (lambda path: (path / "processor.json").unlink(), r"there is no .*processor\.json"),
        (lambda path: (path / "processor.json").write_text("{}"), "is damaged: copy or build it again"),
        (lambda path: FORM.save(path / "processor.json"), "is not the one of this dataset"),
        (lambda path: (path / "manifest.json").write_text("{}"), "is damaged or not a manifest of kindling-images"),
        (lambda path: (path / "manifest.json").write_text("["), "is damaged or not a manifest"),
    ],
)
def test_an_incomplete_dataset_is_refused(copy: Path, change: Callable[[Path], object], message: str) -> None:
    change(copy)
    with pytest.raises(UserError, match=message) as error:
        open_images(copy)
    assert "\n" not in str(error.value)


def test_a_newer_version_is_refused(copy: Path) -> None:
    path = copy / "manifest.json"
    path.write_text(path.read_text().replace('"version": 1', '"version": 9', 1))
    with pytest.raises(UserError, match="has version 9, but this program reads version 1"):
        open_images(copy)


def test_datasets_of_images_and_of_text_are_told_apart(built: Path, tmp_path: Path) -> None:
    assert holds_images(built)
    with pytest.raises(UserError, match="is a dataset of images, not of text"):
        open_dataset(built)
    (tmp_path / "manifest.json").write_text('{"format": "kindling-shards"}')
    with pytest.raises(UserError, match="is a dataset of text, not of images"):
        open_images(tmp_path)
    for path in (tmp_path, tmp_path / "nothing", tmp_path / "manifest.json"):
        assert not holds_images(path)
    (tmp_path / "manifest.json").write_text("[")
    assert not holds_images(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        open_images(tmp_path / "nothing")
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json.*prep images"):
        open_images(tmp_path)
    (tmp_path / "build.json").write_text("{}")
    with pytest.raises(UserError, match="is not finished: run the same command again"):
        open_images(tmp_path)
    with pytest.raises(UserError, match='there is no split "test"'):
        open_images(built).split("test")


def test_a_format_is_read_back_as_it_was_saved(tmp_path: Path) -> None:
    path = tmp_path / FORM.file_name
    FORM.save(path)
    assert ImageFormat.load(path) == FORM
    assert FORM.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads(path.read_text()) == {"size": 8, "channels": 3, "mean": [0.1, 0.2, 0.3], "std": [0.25, 0.5, 0.75]}


def test_pixels_of_a_turned_transparent_photo_are_those_a_build_stores(tmp_path: Path) -> None:
    image = picture(1).convert("RGBA")
    image.putalpha(picture(2, mode="L"))
    folder = write_tree(tmp_path / "x", {"1.webp": encoded(image, "WEBP"), "2.jpg": with_exif(picture(3), 6)})
    dataset = build_images([folder], tmp_path / "out", 8, validation_fraction=0, progress=SilentReporter())
    stored = dataset.split("train").read(np.arange(2))
    for number, name in enumerate(("1.webp", "2.jpg")):
        with Image.open(folder / name) as opened:
            assert (dataset.format.pixels(opened) == stored[number]).all()
    deep = Image.fromarray(np.full((8, 8), 1e6, np.float32))
    with pytest.raises(BadImage, match="unknown range"):
        dataset.format.pixels(deep)


def test_a_writer_that_fails_leaves_no_file(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    with (
        pytest.raises(ZeroDivisionError),
        ImageShardWriter(tmp_path, "train", part=0, source=0, shard_bytes=100) as writer,
    ):
        writer.add(pixels, pixels.tobytes(), label=None, size=(8, 8), origin="a")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_find_images_gives_what_a_build_reads(built: Path, photos: Path) -> None:
    dataset = open_images(built)
    splits = [dataset.split(name) for name in ("train", "validation")]
    sources = {split.source_of(number) for split in splits for number in range(split.count)}
    assert {each.name for each in find_images([photos])} == sources
