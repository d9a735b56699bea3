"""Builds of images: what is made of what a person has, and builds that were interrupted."""

from __future__ import annotations

import json
import os
import shutil
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.pipeline import images as pipeline
from data_prep.pipeline import resuming, workers
from data_prep.pipeline.build import build_dataset
from data_prep.pipeline.image_parts import ImageJob, build_image_part
from data_prep.pipeline.images import build_image_dataset, natural_order
from data_prep.pipeline.splitting import hash_of
from data_prep.progress import SilentReporter
from data_prep.settings import BuildSettings, ImageSettings
from data_prep.shards.images import ImageDataset, open_images
from data_prep.sources.decoding import decode, square
from tests.data_prep.handmade_images import encoded, picture, unusable_images, usable_images, write_tar, write_tree
from tests.data_prep.pipeline.conftest import ends_before_file

Tree = Callable[[Path], dict[str, bytes]]
SIZE = 8


def settings_for(source: Path | str, out: Path, **changes: Any) -> ImageSettings:
    options = {"workers": 1, "validation_fraction": 0.3, "shard_bytes": 400} | changes
    return ImageSettings.from_options([source], out, options.pop("size", SIZE), **options)


def build(settings: ImageSettings, notes: list[str] | None = None) -> dict[str, Any]:
    reporter = SilentReporter()
    if notes is not None:
        reporter.note = notes.append  # type: ignore[method-assign]
    return build_image_dataset(settings, progress=reporter)


def build_until(settings: ImageSettings, count: int, monkeypatch: pytest.MonkeyPatch) -> bool:
    return ends_before_file(count, lambda: build(settings), monkeypatch)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "PART_BYTES", 5000)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {f"{name}/{n}.png": encoded(picture(17 * n + k), "PNG") for k, name in enumerate("ab") for n in range(12)}
    files |= {"a/broken.jpg": b"no image", "b/gray.png": encoded(picture(99, mode="L"), "PNG"), "note.txt": b"x"}
    return write_tree(tmp_path_factory.mktemp("photos") / "photos", files)


@pytest.fixture(scope="module")
def undisturbed(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "PART_BYTES", 5000)
        build(settings_for(photos, out))
    return out


def content(dataset: ImageDataset) -> dict[str, tuple[str, str, np.ndarray]]:
    """Of each image by its source: split, class and pixels."""
    found = {}
    for name in ("train", "validation"):
        split = dataset.split(name)
        for number, pixels in enumerate(split.read(np.arange(split.count))):
            label = dataset.classes[split.labels[number]] if split.labels[number] >= 0 else ""
            found[split.source_of(number)] = name, label, pixels
    return found


def test_a_dataset_has_each_image_as_pillow_shows_it(undisturbed: Path, photos: Path) -> None:
    dataset = open_images(undisturbed)
    dataset.verify()
    found = content(dataset)
    assert len(found) == 25
    threshold = int(dataset.manifest["split_rule"]["threshold"], 16)
    for name, (split, label, pixels) in found.items():
        path = photos.parent / name
        image = Image.open(path).convert("RGB")
        side = min(image.size)
        left = (image.width - side) / 2
        expected = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=(left, 0, left + side, side))
        assert (pixels == np.asarray(expected)).all()
        assert label == path.parent.name
        assert split == ("validation" if hash_of(path.read_bytes()) < threshold else "train")
    assert {split for split, *_ in found.values()} == {"train", "validation"}
    assert dataset.manifest["left_out"] == {"not an image": {"images": 1, "first": "photos/a/broken.jpg"}}
    assert dataset.manifest["changed"] == {"gray, repeated in 3 channels": {"images": 1, "first": "photos/b/gray.png"}}
    counts = {name: split["classes"] for name, split in dataset.manifest["splits"].items()}
    assert counts["train"]["a"] + counts["validation"]["a"] == 12
    assert counts["train"]["b"] + counts["validation"]["b"] == 13


def test_mean_and_deviation_are_those_of_the_training_pixels(undisturbed: Path) -> None:
    dataset = open_images(undisturbed)
    split = dataset.split("train")
    pixels = split.read(np.arange(split.count)).astype(np.float64).reshape(-1, 3) / 255
    np.testing.assert_allclose(dataset.format.mean, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(dataset.format.std, pixels.std(0), rtol=1e-12)


def test_stopped_before_any_file_it_resumes_to_the_same_bytes(
    undisturbed: Path, photos: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    expected = tree(undisturbed)
    shards = (len(expected) - 2) // 3
    assert shards > 6, "some parts have several shards"
    for count in range(1000):
        settings = settings_for(photos, tmp_path / str(count))
        if build_until(settings, count, monkeypatch):
            break
        build(settings)
        assert tree(settings.out) == expected, f"stopped before file {count}"
    assert count > 3 * shards, "every file of a shard was a point to stop at"


@pytest.mark.parametrize("method", ["spawn", workers.START_METHOD])
def test_workers_change_no_byte(
    method: str, undisturbed: Path, photos: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "START_METHOD", method)
    assert not build_until(settings_for(photos, tmp_path / "out"), 9, monkeypatch)
    build(settings_for(photos, tmp_path / "out", workers=2))
    assert tree(tmp_path / "out") == tree(undisturbed)


def test_finished_shards_are_not_written_again(
    undisturbed: Path, photos: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(photos, tmp_path / "out")
    assert not build_until(settings, 14, monkeypatch)
    records = [json.loads(path.read_text()) for path in sorted(settings.out.glob("work/part-*.json"))]
    done = [shard["name"] for record in records for split in record["shards"].values() for shard in split]
    assert done
    before = {name: (settings.out / f"{name}.bin").stat().st_mtime_ns for name in done}
    build(settings)
    assert {name: (settings.out / f"{name}.bin").stat().st_mtime_ns for name in done} == before
    assert tree(settings.out) == tree(undisturbed)


def test_a_finished_build_is_left_as_it_is(
    undisturbed: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    notes: list[str] = []
    monkeypatch.setattr(pipeline, "run_calls", None)  # nothing is read again
    manifest = build(settings_for(photos, out), notes)
    assert manifest == json.loads((out / "manifest.json").read_text())
    assert "already built" in notes[0]
    with pytest.raises(UserError, match=r"channels was 0, now 1; size was 8, now 16.*choose another --out"):
        build(settings_for(photos, out, size=16, channels=1))


def test_a_build_of_text_and_one_of_images_refuse_each_other(
    undisturbed: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_text(out: Path) -> None:
        (tmp_path / "a.txt").write_text("one two\n\n" * 50)
        options = {"tokenizer_kind": "bytes", "max_document_bytes": 90, "validation_fraction": 0, "workers": 1}
        made = BuildSettings.from_options([tmp_path / "a.txt"], out, **options)
        build_dataset(made, progress=SilentReporter())

    build_text(tmp_path / "text")
    with pytest.raises(UserError, match="is a dataset of text, not of images"):
        build(settings_for(photos, tmp_path / "text"))
    with pytest.raises(UserError, match="is a dataset of images, not of text"):
        build_text(undisturbed)
    begun = settings_for(photos, tmp_path / "begun")
    assert not build_until(begun, 9, monkeypatch)
    with pytest.raises(UserError, match="has a build of images: choose another --out"):
        build_text(begun.out)


def test_hostile_images_are_left_out_or_converted_and_the_rest_is_built(tmp_path: Path) -> None:
    usable, unusable = usable_images(), unusable_images()
    folder = write_tree(tmp_path / "x", usable | {name: data for name, (_, data) in unusable.items()})
    (folder / "circle.jpg").symlink_to(folder / "circle.jpg")
    (folder / "folder.jpg").mkdir()
    notes: list[str] = []
    manifest = build(settings_for(folder, tmp_path / "out"), notes)
    dataset = open_images(tmp_path / "out")
    dataset.verify()
    found = content(dataset)
    assert sorted(found) == sorted(f"x/{name}".replace("\n", "\\n") for name in usable)
    for name, data in usable.items():
        assert (found[f"x/{name}".replace("\n", "\\n")][2] == square(decode(data), SIZE, 3)).all(), name
    assert sum(cases["images"] for cases in manifest["left_out"].values()) == len(unusable)
    for reason, cases in (manifest["left_out"] | manifest["changed"]).items():
        assert sum(f"{reason} (the first: {cases['first']})" in note for note in notes) == 1
    assert manifest["changed"]["animated or with several pages, of which the first was used"]["images"] == 4
    assert manifest["changed"]["smaller than --size, enlarged"]["images"] == 2
    assert 'note: 1 broken link is not followed in "x": circle.jpg' in notes


def test_all_gray_images_keep_one_channel(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "x", {f"{n}.png": encoded(picture(n, mode="L"), "PNG") for n in range(9)})
    notes: list[str] = []
    build(settings_for(folder, tmp_path / "gray"), notes)
    assert any("all images are gray: storing 1 channel" in note for note in notes)
    gray = open_images(tmp_path / "gray")
    assert gray.format.channels == len(gray.format.mean) == 1
    build(settings_for(folder, tmp_path / "color", channels=3))
    color = open_images(tmp_path / "color")
    pixels = color.split("train").read(np.arange(2))
    assert (pixels == gray.split("train").read(np.arange(2))).all()
    assert pixels.shape == (2, SIZE, SIZE, 3)
    (folder / "z.png").write_bytes(encoded(picture(1), "PNG"))
    build(settings_for(folder, tmp_path / "mixed"))
    assert open_images(tmp_path / "mixed").format.channels == 3
    manifest = build(settings_for(folder, tmp_path / "made gray", channels=1))
    assert manifest["changed"] == {"in color, made gray": {"images": 1, "first": "x/z.png"}}


@pytest.mark.parametrize("size", [96, 97])
def test_large_images_are_stored_as_files(size: int, tmp_path: Path) -> None:
    small, large = encoded(picture(1, 120, 100), "JPEG"), encoded(picture(2, 400, 300), "BMP")
    gray = encoded(picture(3, 130, 130, "L"), "PNG")
    folder = write_tree(tmp_path / "x", {"1.jpg": small, "2.bmp": large, "3.png": gray, "4.jpg": small})
    build(settings_for(folder, tmp_path / "out", size=size, validation_fraction=0, shard_bytes=2**20))
    dataset = open_images(tmp_path / "out")
    dataset.verify()
    split = dataset.split("train")
    found = split.read(np.array([3, 1, 2, 0, 1]))
    expected = [square(decode(data), size, 3) for data in (small, large, gray, small, large)]
    assert (found == np.stack(expected)).all()
    stored = b"".join(path.read_bytes() for path in sorted((tmp_path / "out").glob("train-*.bin")))
    assert dataset.manifest["storage"] == ("pixels" if size == 96 else "files")
    assert stored.startswith(small) == (size > 96)
    assert size == 96 or len(stored) < 2 * size * size * 3, "what is larger than its pixels is not stored as it came"


def test_folders_of_splits_are_used(tmp_path: Path) -> None:
    paths = [f"{split}/{name}/{n}.png" for split in ("train", "test") for name in "ab" for n in range(3)]
    tree = {path: encoded(picture(n), "PNG") for n, path in enumerate(paths)}
    notes: list[str] = []
    build(settings_for(write_tar(tmp_path / "x.tar", tree), tmp_path / "out"), notes)
    assert 'note: "x" has folders for training and test: the test images are for validation' in notes
    for name, (split, label, _) in content(open_images(tmp_path / "out")).items():
        assert split == ("validation" if "/test/" in name else "train")
        assert label == name.split("/")[2]
    tree |= {"val/a/1.png": encoded(picture(1), "PNG")}
    build(settings_for(write_tar(tmp_path / "y.tar", tree), tmp_path / "three"), notes)
    assert 'note: "y" has folders for training, validation and test: the 6 for test are left out' in notes
    assert open_images(tmp_path / "three").split("validation").count == 1


def test_validation_images_may_be_named(tmp_path: Path) -> None:
    files = {f"{n}.png": encoded(picture(n), "PNG") for n in range(4)}
    mine, others = write_tree(tmp_path / "mine", files), write_tree(tmp_path / "others", {"1.png": files["1.png"]})
    build(settings_for(mine, tmp_path / "out", validation=[str(others)]))
    found = content(open_images(tmp_path / "out"))
    assert {name: split for name, (split, *_) in found.items()} == {
        **{f"mine/{n}.png": "train" for n in range(4)},
        "others/1.png": "validation",
    }
    assert str(tmp_path) not in (tmp_path / "out" / "manifest.json").read_text(), "it says nothing of the machine"
    broken, notes = write_tree(tmp_path / "broken", {"1.png": b"x"}), list[str]()
    build(settings_for(mine, tmp_path / "none", validation=[str(broken)]), notes)
    assert "note: none of the images named by --validation can be used" in notes
    splits = write_tree(tmp_path / "s", {"train/1.png": files["1.png"], "test/2.png": files["2.png"]})
    with pytest.raises(UserError, match="has folders for validation or test: name its folder with the training"):
        build(settings_for(splits, tmp_path / "no", validation=[str(others)]))


def test_a_single_image_may_join_others_that_have_validation_images(tmp_path: Path) -> None:
    files = {f"{split}/{n}.png": encoded(picture(n), "PNG") for n, split in enumerate(("train", "val"))}
    splits, one = write_tree(tmp_path / "x", files), write_tree(tmp_path / "one", {"1.png": encoded(picture(9), "PNG")})
    build(ImageSettings.from_options([splits, one], tmp_path / "out", SIZE, validation_fraction=0.5, workers=1))
    found = {name: split for name, (split, *_) in content(open_images(tmp_path / "out")).items()}
    assert found == {"x/train/0.png": "train", "x/val/1.png": "validation", "one/1.png": "train"}
    (one / "1.png").write_bytes(b"broken")
    manifest = build(ImageSettings.from_options([splits, one], tmp_path / "other", SIZE, workers=1))
    assert manifest["split_rule"]["threshold"] == "0x0000000000000000"


def test_identical_images_are_in_the_same_split(tmp_path: Path) -> None:
    files = {f"{n}-{copy}.png": encoded(picture(n), "PNG") for n in range(20) for copy in range(3)}
    build(settings_for(write_tree(tmp_path / "x", files), tmp_path / "out"))
    found = content(open_images(tmp_path / "out"))
    splits = [{found[f"x/{n}-{copy}.png"][0] for copy in range(3)} for n in range(20)]
    assert all(len(each) == 1 for each in splits)
    assert {name for each in splits for name in each} == {"train", "validation"}


def test_classes_of_several_sources_are_one_list_in_natural_order(tmp_path: Path) -> None:
    first = write_tree(tmp_path / "x", {f"{name}/1.png": encoded(picture(1), "PNG") for name in ("10", "9", "b")})
    second = write_tree(tmp_path / "y", {f"{name}/2.png": encoded(picture(2), "PNG") for name in ("b", "a", "9")})
    settings = ImageSettings.from_options([first, second], tmp_path / "out", SIZE, validation_fraction=0, workers=1)
    build(settings)
    dataset = open_images(tmp_path / "out")
    assert dataset.classes == ("9", "10", "a", "b")
    assert {name: label for name, (_, label, _) in content(dataset).items()} == {
        **{f"x/{name}/1.png": name for name in ("10", "9", "b")},
        **{f"y/{name}/2.png": name for name in ("b", "a", "9")},
    }


def test_numbers_come_by_value_and_very_long_ones_are_names() -> None:
    long = "9" * 5000  # Python makes no number of so many digits
    assert sorted(["b", long, "10", "9", "010"], key=natural_order) == ["9", "010", "10", long, "b"]


def test_several_flat_folders_may_be_classes_by_mistake(tmp_path: Path) -> None:
    folders = [write_tree(tmp_path / name, {"1.png": encoded(picture(n), "PNG")}) for n, name in enumerate("ab")]
    notes: list[str] = []
    build(ImageSettings.from_options(folders, tmp_path / "out", SIZE, workers=1), notes)
    assert any("these 2 sources have no classes: if each source is one, name the folder" in note for note in notes)


def test_files_that_a_shell_names_one_by_one_share_a_shard(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "x", {f"{n}.png": encoded(picture(n), "PNG") for n in range(6)})
    one = write_tree(tmp_path / "one", {"7.png": encoded(picture(7), "PNG")})
    files, notes = [folder / f"{n}.png" for n in range(6)], list[str]()
    sources = [*files[:3], one, *files[3:5]]
    build(ImageSettings.from_options(sources, tmp_path / "out", SIZE, validation=files[5:], workers=1), notes)
    dataset = open_images(tmp_path / "out")
    assert [source["name"] for source in dataset.manifest["sources"]] == [
        "0.png to 2.png",
        "one",
        "3.png to 4.png",
        "5.png",
    ]
    assert [record.images for record in dataset.split("train").records] == [3, 1, 2]
    expected = {f"{n}.png": "train" for n in range(5)} | {"one/7.png": "train", "5.png": "validation"}
    assert {name: split for name, (split, *_) in content(dataset).items()} == expected


@pytest.mark.parametrize(
    ("files", "changes", "message"),
    [
        (
            {"1.jpg": b"x", "2.jpg": b""},
            {},
            "none of the images can be used for training: 1 not an image; 1 empty file",
        ),
        ({"1.png": encoded(picture(1), "PNG")}, {}, "only one image, or all are the same"),
        ({"1.png": encoded(picture(1), "PNG")}, {"size": 3}, "--size 3 must be from 4 to 2,048 pixels"),
        ({"1.png": encoded(picture(1), "PNG")}, {"channels": 2}, r"--channels 2 must be 3 \(color\), 1 \(gray\)"),
        ({"1.png": encoded(picture(1), "PNG")}, {"validation_fraction": 1.0}, "must be at least 0 and below 1"),
        ({"1.png": encoded(picture(1), "PNG")}, {"shard_bytes": 0}, "--shard-bytes 0 must be from 1"),
    ],
)
def test_what_cannot_be_built_is_refused_and_leaves_nothing(
    files: dict[str, bytes], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write_tree(tmp_path / "x", files)
    with pytest.raises(UserError, match=message):
        build(settings_for(folder, tmp_path / "new" / "out", **changes))
    assert not (tmp_path / "new").exists()


def test_a_table_without_rows_is_refused(tmp_path: Path) -> None:
    table = pyarrow.table({"image": pyarrow.array([], pyarrow.binary())})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="none of the images can be used for training: there are none"):
        build(settings_for(tmp_path / "x.parquet", tmp_path / "out"))


def test_one_image_is_enough_without_validation(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "x", {"1.png": encoded(Image.new("RGB", (9, 9), (255, 0, 9)), "PNG")})
    build(settings_for(folder, tmp_path / "out", validation_fraction=0))
    dataset = open_images(tmp_path / "out")
    assert (dataset.split("train").count, dataset.split("validation").count) == (1, 0)
    assert dataset.split("validation").read(np.arange(0)).shape == (0, SIZE, SIZE, 3)
    assert dataset.format.std == (1.0, 1.0, 1.0), "a constant channel is not divided by 0"


def test_sources_that_change_meanwhile_are_noticed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    settings = settings_for(folder, tmp_path / "out")
    assert not build_until(settings, 9, monkeypatch)
    os.utime(folder / "a" / "1.png", ns=(1, 1))
    with pytest.raises(UserError, match="the sources changed since the build in"):
        build(settings)


def test_sources_that_change_during_the_build_are_noticed(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(photos, tmp_path / "photos")
    run_calls = pipeline.run_calls

    def run_and_change(*arguments: Any, **options: Any) -> list[Any]:
        found = run_calls(*arguments, **options)
        os.utime(folder / "a" / "1.png", ns=(1, 1))
        return found

    monkeypatch.setattr(pipeline, "run_calls", run_and_change)
    with pytest.raises(UserError, match="the sources changed since the build in"):
        build(settings_for(folder, tmp_path / "out"))


def test_there_are_enough_parts_for_several_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resuming, "SMALLEST_PART_BYTES", 1)
    monkeypatch.setattr(pipeline, "PART_BYTES", 10**9)
    folder = write_tree(tmp_path / "x", {f"{n:02}.png": encoded(picture(n), "PNG") for n in range(40)})
    plan = pipeline.ImagePlan.of(settings_for(folder, tmp_path / "out"))
    assert len(plan.parts) >= resuming.FEWEST_PARTS
    assert [item.name for part in plan.parts for item in part.items] == [f"x/{n:02}.png" for n in range(40)]


def test_progress_is_counted_in_bytes_whether_sizes_are_known_or_not(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "x", {f"{n}.png": encoded(picture(n), "PNG") for n in range(3)})
    settings = settings_for(folder, tmp_path / "out")
    (part,) = pipeline.ImagePlan.of(settings).parts
    unknown = replace(part, items=tuple(replace(item, size=0) for item in part.items))
    (tmp_path / "out" / "work").mkdir(parents=True)
    for number, each in enumerate((part, unknown, part)):
        done: list[int] = []
        build_image_part(ImageJob(settings, channels=3), min(number, 1), each, done.append)
        assert sum(done) == part.bytes == sum(path.stat().st_size for path in folder.iterdir())
    assert done == [part.bytes], "a finished part is not read again"


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_few_images_are_decoded_to_settle_split_and_channels(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_tree(tmp_path / "x", {f"{n}.png": encoded(picture(n, mode=mode), "PNG") for n in range(9)})
    watched = {
        name: Mock(side_effect=getattr(pipeline, name)) for name in ("entries_of", "decode_noting", "looks_gray")
    }
    for name, watch in watched.items():
        monkeypatch.setattr(pipeline, name, watch)
    build(settings_for(folder, tmp_path / "out", validation_fraction=0))
    assert watched["entries_of"].call_count == (9 if mode == "L" else 2), "the sources are not read to their end"
    assert watched["decode_noting"].call_count == 1
    assert watched["looks_gray"].call_count == (8 if mode == "L" else 0)


def test_memory_does_not_grow_with_the_images(tmp_path: Path) -> None:
    """40 files of 0.5 MB in one part; Pillow's own memory is not counted."""
    image = encoded(picture(0, 400, 400), "BMP")
    folder = write_tree(tmp_path / "x", {f"{n}.bmp": image[:-1] + bytes([n]) for n in range(40)})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "PART_BYTES", 10**9)
        patch.setattr(resuming, "SMALLEST_PART_BYTES", 10**9)
        tracemalloc.start()
        build(settings_for(folder, tmp_path / "out", shard_bytes=2**20))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 5 * len(image)
