from __future__ import annotations

import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from data_prep.errors import UserError
from data_prep.shards.images import ImageFormat
from lm.config.finetune_settings import FinetuneConfig
from lm.data.image_files import (
    Unread,
    drawn_pictures,
    has_validation,
    pictures_of,
    pixels_of,
    pixels_of_file,
    read_image_task,
    read_labeled,
)
from tests.lm.conftest import draw_pictures

FORM = ImageFormat(16, 3, (0.5,) * 3, (0.25,) * 3)
GRAY = ImageFormat(16, 1, (0.5,), (0.25,))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("images") / "files", count=4)


def test_images_of_a_folder_come_by_name_with_their_class_and_pixels(folder):
    found = list(pictures_of(str(folder), FORM, Unread()))
    assert [each.name for each in found] == [
        f"files/{name}/{n:03d}.png" for name in ("left", "none", "top") for n in range(4)
    ]
    assert [each.label for each in found] == ["left"] * 4 + ["none"] * 4 + ["top"] * 4
    for each in found:
        assert (each.pixels == np.asarray(Image.open(folder.parent / each.name))).all()


def test_images_that_cannot_be_read_are_left_out_and_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "files")
    for number in range(4):
        (tmp_path / "files" / "none" / f"{number}.jpg").write_text("no picture")
    unread = Unread()
    assert len(list(pictures_of(str(tmp_path / "files"), FORM, unread))) == 12
    first = "; ".join(f"files/none/{n}.jpg: not an image" for n in range(3))
    assert str(unread) == f"4 images were left out: {first}, and 1 more"
    assert not str(Unread())
    assert f"{tmp_path / 'files'}: {unread}" in read_labeled(str(tmp_path / "files"), FORM).notes


def test_a_folder_an_archive_and_a_dataset_give_the_same_labeled_images(pictures, tmp_path):
    files = draw_pictures(tmp_path / "files")
    with tarfile.open(tmp_path / "files.tar", "w") as archive:
        archive.add(files, "files")
    numbers = np.array([25, 3, 59])
    one, two = (read_labeled(str(tmp_path / name), FORM) for name in ("files", "files.tar"))
    assert [example.label for example in one] == [example.label for example in two]
    assert (one.read(numbers) == two.read(numbers)).all()
    assert one.digest == two.digest
    form = pictures.format
    both = [read_labeled(str(pictures.directory), form, split) for split in ("train", "validation")]
    read = [part.read(np.arange(len(part))) for part in both]
    told = {e.place: (e.label, read[p][n]) for p, part in enumerate(both) for n, e in enumerate(part)}
    for number, example in enumerate(one):
        label, pixels = told[example.place]
        assert example.label == label
        assert (one.read(np.array([number]))[0] == pixels).all()


def test_the_content_of_other_images_is_another_one(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "files")
    Image.new("RGB", (16, 16), "red").save(tmp_path / "files" / "top" / "003.png")
    assert read_labeled(str(tmp_path / "files"), FORM).digest != read_labeled(str(folder), FORM).digest


def test_drawn_images_come_from_all_over_the_source_the_same_ones_each_time(folder, tmp_path):
    source = draw_pictures(tmp_path / "many", count=60)
    (source / "top" / "000.png").write_text("no picture")
    drawn, count = drawn_pictures(str(source), FORM, 40)
    found = list(drawn)
    assert count == 180
    assert len(found) == 40
    assert {each.label for each in found} == {"left", "none", "top"}
    assert {each.label for each in found[:12]} == {"left", "none", "top"}  # so that the first ones are a sample too
    assert len({each.name for each in found}) == len(found)
    assert [each.name for each in drawn_pictures(str(source), FORM, 40)[0]] == [each.name for each in found]
    by_name = {each.name: each for each in pictures_of(str(source), FORM, Unread())}
    assert all((by_name[each.name].pixels == each.pixels).all() for each in found)
    assert len(list(drawn_pictures(str(source), FORM, 180)[0])) == 179  # but for the one that cannot be read


def test_drawn_images_may_be_those_of_a_split_or_of_a_table(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "split" / "train")
    shutil.copytree(folder, tmp_path / "split" / "val")
    drawn, count = drawn_pictures(str(tmp_path / "split"), FORM, 100, split="train")
    names = [each.name for each in drawn]
    assert count == len(names) == 12
    assert all(name.startswith("split/train/") for name in names)
    files = [path for path in sorted(folder.rglob("*.png")) for _ in range(20)]
    images = [{"bytes": path.read_bytes(), "path": path.name} for path in files]
    table = pa.table({"image": images, "label": [path.parent.name for path in files]})
    pq.write_table(table, tmp_path / "images.parquet", row_group_size=80)  # a group for each class
    assert drawn_pictures(str(tmp_path / "images.parquet"), FORM, 60)[1] == 240
    for most in (60, 120):
        found = list(drawn_pictures(str(tmp_path / "images.parquet"), FORM, most)[0])
        assert most * 0.7 < len(found) <= most
        assert all(sum(each.label == name for each in found) > most / 6 for name in ("left", "none", "top"))


def test_an_image_file_with_more_pixels_than_allowed_is_refused(folder):
    data = (folder / "top" / "000.png").read_bytes()
    assert (pixels_of_file(data, FORM, 256) == np.asarray(Image.open(folder / "top" / "000.png"))).all()
    with pytest.raises(UserError, match=r"cannot be used: more than 0 megapixels \(16 x 16\)"):
        pixels_of_file(data, FORM, 255)


def test_validation_images_are_those_named_or_those_the_source_sets_aside(folder, pictures, tmp_path):
    for part in ("train", "val"):
        shutil.copytree(folder, tmp_path / "split" / part)
    shutil.rmtree(tmp_path / "split" / "val" / "none")

    def places(train, validation=""):
        found = read_image_task(FinetuneConfig(train=str(train), validation=str(validation)), FORM)
        return [[example.place for example in part] for part in found]

    assert not has_validation(str(folder))
    assert has_validation(str(tmp_path / "split"))
    assert [len(part) for part in places(folder)] == [12, 0]
    assert [len(part) for part in places(folder, tmp_path / "split")] == [12, 8]
    train, validation = places(tmp_path / "split")
    assert (len(train), len(validation)) == (12, 8)
    assert all("/train/" in place for place in train)
    assert all("/val/" in place for place in validation)
    assert list(map(len, places(pictures.directory))) == [
        pictures.split(name).count for name in ("train", "validation")
    ]


def test_images_without_a_class_are_counted_or_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "files")
    shutil.copy(folder / "top" / "000.png", tmp_path / "files" / "0.png")
    found = read_labeled(str(tmp_path / "files"), FORM)
    assert found.notes == [f"{tmp_path / 'files'}: 1 image without a class was left out"]
    assert len(found) == 12
    with pytest.raises(UserError, match="have no classes: put those of each class into a folder of its own"):
        read_labeled(str(folder / "top"), FORM)


def test_the_classes_of_a_table_are_in_a_column(folder, tmp_path):
    files = sorted(folder.rglob("*.png"))
    rows = [{"image": path.read_bytes(), "kind": path.parent.name, "label": None} for path in files]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    one = read_labeled(str(tmp_path / "x.parquet"), FORM, label_column="kind")
    two = read_labeled(str(folder), FORM)
    assert [example.label for example in one] == [example.label for example in two]
    assert one.digest == two.digest
    task = FinetuneConfig(train=str(tmp_path / "x.parquet"), label_column="kind")
    assert len(read_image_task(task, FORM)[0]) == 12
    with pytest.raises(UserError, match="have no classes: name their column with --label-column"):
        read_labeled(str(tmp_path / "x.parquet"), FORM)


def test_a_source_without_images_or_of_another_size_is_refused(pictures, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image in"):
        read_labeled(str(tmp_path / "empty"), FORM)
    with pytest.raises(UserError, match="there is no file or folder"):
        read_labeled(str(tmp_path / "none"), FORM)
    (tmp_path / "empty" / "a").mkdir()
    (tmp_path / "empty" / "a" / "0.png").write_text("no picture")
    with pytest.raises(UserError, match=r"no image of .*empty can be read: empty/a/0.png: not an image"):
        read_labeled(str(tmp_path / "empty"), FORM)
    with pytest.raises(UserError, match="prepare them with --size 8 --channels 3"):
        read_labeled(str(pictures.directory), ImageFormat(8, 3, (0.5,) * 3, (0.25,) * 3))


def test_a_path_an_array_and_a_pillow_image_are_one_picture(folder):
    path = folder / "top" / "000.png"
    image = Image.open(path)
    for form in (FORM, GRAY):
        wanted = pixels_of(path, form, "x")
        assert wanted.shape == (16, 16, form.channels)
        assert (pixels_of(image, form, "x") == wanted).all()
        assert (pixels_of(np.asarray(image), form, "x") == wanted).all()
    gray = np.asarray(image.convert("L"))
    assert (pixels_of(gray, GRAY, "x") == pixels_of(gray[:, :, None], GRAY, "x")).all()
    assert pixels_of(image.resize((40, 20)), FORM, "x").shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.zeros((4, 4, 3)), "x is an array of float64 with the shape \\(4, 4, 3\\)"),
        (np.zeros((4, 4, 2), np.uint8), "x is an array of uint8 with the shape \\(4, 4, 2\\)"),
        (3, "x is of type int: give a path, a Pillow image or a uint8 array"),
        ("none.png", "none.png: No such file or directory"),
        (__file__, "test_image_files.py: not an image"),
    ],
)
def test_what_is_no_image_is_refused_by_its_name(image, said):
    with pytest.raises(UserError, match=said):
        pixels_of(image, FORM, "x")
