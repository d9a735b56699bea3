from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import Result
from PIL import Image

from data_prep import build_images
from data_prep.progress import SilentReporter
from data_prep.shards.images import ImageDataset
from data_prep.shards.inspect_images import SHOWN_SIDE, inspect_images, png_of, render_images
from data_prep.shards.inspect_page import render_images_page
from tests.data_prep.handmade_images import encoded, picture, write_tree

Prep = Callable[..., Result]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    """Two classes with 5 and 9 images, an image without one, and one that is broken; the names try to be HTML."""
    folder = tmp_path_factory.mktemp("x")
    files = {f"photos/cat/{n}.png": encoded(picture(n), "PNG") for n in range(5)}
    files |= {f"photos/<b>dog/{n}.png": encoded(picture(10 + n, 30, 30), "PNG") for n in range(9)}
    files |= {"photos/loose.png": encoded(picture(50), "PNG"), "photos/cat/<i>.jpg": b"broken"}
    write_tree(folder, files)
    options = {"validation_fraction": 0, "workers": 1, "progress": SilentReporter()}
    return build_images([folder / "photos"], folder / "out", 8, **options)


def test_numbers_are_those_of_the_dataset(dataset: ImageDataset) -> None:
    found = inspect_images(dataset, pictures=3, seed=0)
    json.dumps(found)
    train = found["splits"]["train"]
    assert (train["images"], train["labeled"], train["classes"]) == (15, 14, {"<b>dog": 9, "cat": 5})
    assert train["shorter_side"] == {"0%": 16, "10%": 16, "50%": 30, "90%": 30, "100%": 30}
    assert train["common_sizes"] == [
        {"width": 30, "height": 30, "images": 9},
        {"width": 20, "height": 16, "images": 6},
    ]
    assert found["splits"]["validation"]["images"] == 0
    assert found["left_out"] == {"not an image": {"images": 1, "first": "photos/cat/<i>.jpg"}}
    groups = {group["class"]: group for group in train["pictures"]}
    assert {name: (group["of"], len(group["images"])) for name, group in groups.items()} == {
        "<b>dog": (9, 3),
        "cat": (5, 3),
        "no class": (1, 1),
    }
    for name, group in groups.items():
        for image in group["images"]:
            assert image["source"] == dataset.split("train").source_of(image["number"])
            assert name == "no class" or f"/{name}/" in image["source"]
            assert "png" not in image
    assert inspect_images(dataset, pictures=3, seed=0) == found
    assert inspect_images(dataset, pictures=3, seed=1) != found


def test_the_text_has_bars_and_reasons(dataset: ImageDataset) -> None:
    shown = render_images(inspect_images(dataset, pictures=2, seed=0))
    assert "color images of 8 x 8 pixels, 2 classes" in shown
    assert "train: 15 images, 14 with a class" in shown
    assert "sizes: 30 x 30 (9), 20 x 16 (6)" in shown
    assert "1 not an image (the first: photos/cat/<i>.jpg)" in shown
    bars = {line.split()[0]: line.count("█") for line in shown.splitlines() if "█" in line}
    assert bars == {"<b>dog": 40, "cat": 23}


class Reader(HTMLParser):
    """Collects the pictures and the tags of a page."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.images: list[dict[str, str | None]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "img":
            self.images.append(dict(attrs))


def test_the_page_shows_the_stored_pixels(dataset: ImageDataset) -> None:
    found = inspect_images(dataset, pictures=4, seed=0, pixels=True)
    page = render_images_page(found)
    reader = Reader()
    reader.feed(page)
    assert not {"b", "script"} & reader.tags, "names are escaped"
    assert not re.search(r'(?:src|href)="(?!data:)', page), "the page needs no other file"
    numbers = [image["number"] for group in found["splits"]["train"]["pictures"] for image in group["images"]]
    assert len(reader.images) == len(numbers) == 9
    for number, shown in zip(numbers, reader.images, strict=True):
        data = base64.b64decode((shown["src"] or "").removeprefix("data:image/png;base64,"))
        assert (np.asarray(Image.open(io.BytesIO(data))) == dataset.split("train").read(np.array([number]))[0]).all()
        width, height = dataset.split("train").sizes[number]
        assert shown["title"] == f"{dataset.split('train').source_of(number)}, {width} x {height}"
    assert "not an image" in page


def test_large_and_gray_pictures_are_small_on_the_page() -> None:
    pixels = np.asarray(picture(1, 200, 200, "L"))[..., None]
    image = Image.open(io.BytesIO(base64.b64decode(png_of(pixels))))
    assert image.size == (SHOWN_SIDE, SHOWN_SIDE)
    assert image.mode == "L"


def test_the_command_writes_text_json_or_a_page(prep: Prep, dataset: ImageDataset, tmp_path: Path) -> None:
    assert "15 images" in prep("inspect", dataset.directory).stdout
    found = json.loads(prep("inspect", dataset.directory, "--json", "--pictures", 1).stdout)
    assert found["classes"] == ["<b>dog", "cat"]
    result = prep("inspect", dataset.directory, "--html", tmp_path / "page.html")
    assert result.stdout == f"in: {tmp_path / 'page.html'}\n"
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    assert prep("inspect", dataset.directory, "--page", "-").stdout.startswith("<!doctype html>")
    for option in (("--ids",), ("--documents", 2)):
        result = prep("inspect", dataset.directory, *option)
        assert (result.exit_code, result.stdout) == (2, "")
        assert "is a dataset of images: --documents and --ids are for text" in result.stderr


def test_without_classes_there_is_one_group(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "x", {f"{n}.png": encoded(picture(n), "PNG") for n in range(5)})
    options = {"validation_fraction": 0, "workers": 1, "progress": SilentReporter()}
    found = inspect_images(build_images([folder], tmp_path / "out", 8, **options), pictures=1, seed=0, pixels=True)
    (group,) = found["splits"]["train"]["pictures"]
    assert (group["class"], len(group["images"])) == ("no class", 5)
    assert "8 x 8 pixels, no classes" in render_images(found)
    assert "8 x 8 pixels, no classes; dataset" in render_images_page(found)


def test_the_classes_may_all_be_in_the_other_split(tmp_path: Path) -> None:
    pets = write_tree(tmp_path / "pets", {f"{name}/1.png": encoded(picture(n), "PNG") for n, name in enumerate("ab")})
    loose = write_tree(tmp_path / "loose", {"1.png": encoded(picture(9), "PNG")})
    options = {"validation": [loose], "workers": 1, "progress": SilentReporter()}
    found = inspect_images(build_images([pets], tmp_path / "out", 8, **options), pictures=1, seed=0, pixels=True)
    assert found["splits"]["validation"]["classes"] == {"a": 0, "b": 0}
    _, validation = render_images(found).split("validation: ")
    assert "a " + " " * 40 + " 0" in validation
    assert validation.startswith("1 image, 0 with a class")
    assert "no class, for example loose/1.png" in validation
    assert "validation: 1 image</h2>" in render_images_page(found)


def test_many_classes_are_cut(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "x", {f"{n}/1.png": encoded(picture(n), "PNG") for n in range(60)})
    options = {"validation_fraction": 0, "workers": 1, "progress": SilentReporter()}
    many = build_images([folder], tmp_path / "out", 8, **options)
    found = inspect_images(many, pictures=1, seed=0, pixels=True)
    assert len(found["splits"]["train"]["pictures"]) == 50
    assert "and 10 more classes" in render_images(found)
    assert "and 10 more classes" in render_images_page(found)
