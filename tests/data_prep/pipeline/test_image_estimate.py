from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.pipeline.image_estimate import estimate_images
from data_prep.pipeline.images import build_image_dataset
from data_prep.progress import SilentReporter
from data_prep.settings import ImageSettings
from tests.data_prep.handmade_images import encoded, picture, write_tree


def settings_for(source: Path, out: Path, size: int = 8) -> ImageSettings:
    return ImageSettings.from_options([source], out, size, workers=1, validation_fraction=0)


@pytest.mark.parametrize("size", [8, 100])
def test_an_estimate_is_near_what_a_build_makes_and_writes_nothing(tmp_path: Path, size: int) -> None:
    folder = write_tree(tmp_path / "x", {f"{n % 3}/{n}.png": encoded(picture(n), "PNG") for n in range(250)})
    (folder / "0" / "broken.jpg").write_bytes(b"x")
    settings = settings_for(folder, tmp_path / "out", size)
    found = estimate_images(settings)
    assert not (tmp_path / "out").exists()
    assert (found.files, found.images, found.channels, found.classes) == (251, 251, 3, ["0", "1", "2"])
    assert 100 < found.sampled <= 200
    assert found.seconds is not None
    assert found.seconds > 0
    build_image_dataset(settings, progress=SilentReporter())
    stored = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.bin"))
    assert found.disk_bytes is not None
    assert 0.9 < found.disk_bytes / stored < 1.25


def test_what_is_left_out_or_changed_in_the_sample_is_reported(tmp_path: Path) -> None:
    files = {"1.png": encoded(picture(1), "PNG"), "2.jpg": b"x", "3.jpg": encoded(picture(1).convert("CMYK"), "JPEG")}
    found = estimate_images(settings_for(write_tree(tmp_path / "x", files | {"a.txt": b""}), tmp_path / "out"))
    assert found.notes == [
        'left out: 1 file in "x" without the name of an image: 1 .txt (a.txt)',
        "left out: 1 image, not an image (the first: x/2.jpg); of the sample",
        "note: 1 image, in CMYK, converted to RGB (the first: x/3.jpg); of the sample",
    ]


def test_gray_images_are_noticed(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "x", {f"{n}.png": encoded(picture(n, mode="L"), "PNG") for n in range(3)})
    assert estimate_images(settings_for(folder, tmp_path / "out")).channels == 1


def test_without_a_usable_image_there_is_no_estimate(tmp_path: Path) -> None:
    folder = write_tree(tmp_path / "x", {"1.jpg": b"x"})
    with pytest.raises(UserError, match="no image of the sample can be used"):
        estimate_images(settings_for(folder, tmp_path / "out"))


def test_classes_of_tables_come_from_the_sample(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    found = estimate_images(ImageSettings.from_options(["builtin:digits"], tmp_path / "out", 8, workers=1))
    assert (found.images, found.classes) == (1797, [str(digit) for digit in range(10)])
