"""The command ``images`` as a person calls it."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from data_prep.shards.images import open_images
from tests.data_prep.handmade_images import encoded, picture, write_tar, write_tree

Prep = Callable[..., Result]
Tree = Callable[[Path], dict[str, bytes]]
SMALL = ("--size", "8", "--workers", "1")


@pytest.fixture(scope="module")
def pets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {f"{name}/{n}.png": encoded(picture(10 * n + k), "PNG") for k, name in enumerate("ab") for n in range(9)}
    return write_tree(tmp_path_factory.mktemp("pets") / "pets", files)


@pytest.fixture(scope="module")
def made(pets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from data_prep import build_images
    from data_prep.progress import SilentReporter

    out = tmp_path_factory.mktemp("made") / "out"
    build_images([pets], out, 8, workers=1, progress=SilentReporter())
    return out


def test_a_build_says_what_it_made_and_what_to_do_next(prep: Prep, pets: Path, made: Path, tmp_path: Path) -> None:
    result = prep("images", pets, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.stderr
    split = open_images(tmp_path / "out").split("train")
    assert f"train {split.count}" in " ".join(result.stdout.split())
    assert "images: color, 8 x 8 pixels; 2 classes (a, b)" in result.stdout
    assert f"--data {tmp_path / 'out'} --run runs/out" in result.stdout
    assert "images-simclr" in result.stdout
    found = json.loads(prep("images", pets, "--out", tmp_path / "out", *SMALL, "--json").stdout)
    assert found["splits"]["train"]["images"] == split.count
    assert found["classes"] == ["a", "b"]


def test_the_python_face_makes_the_same_bytes(prep: Prep, pets: Path, made: Path, tmp_path: Path, tree: Tree) -> None:
    prep("images", pets, "--out", tmp_path / "out", *SMALL)
    assert tree(tmp_path / "out") == tree(made)


def test_help_says_what_a_source_is(prep: Prep) -> None:
    shown = " ".join(prep("images", "--help-all").stdout.split())
    for words in ("builtin:digits", ".parquet", "photos.tar/train", "--size INTEGER", "--channels", "--dry-run"):
        assert words in shown
    assert "Exit status 3" in shown


def test_exit_status_3_says_that_images_were_left_out(prep: Prep, pets: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(pets, tmp_path / "pets")
    (folder / "a" / "broken.jpg").write_bytes(b"x")
    (folder / "a" / "notes.txt").write_bytes(b"x")
    result = prep("images", folder, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 3
    assert "left out: not an image 1\n" in result.stdout
    assert "left out: 1 image, not an image (the first: pets/a/broken.jpg)" in result.stderr
    assert 'left out: 1 file in "pets" without the name of an image: 1 .txt (notes.txt)' in result.stderr
    (folder / "a" / "broken.jpg").unlink()
    assert prep("images", folder, "--out", tmp_path / "other", *SMALL).exit_code == 0, "other files do not matter"


def test_a_dry_run_writes_nothing(prep: Prep, pets: Path, tmp_path: Path) -> None:
    result = prep("images", pets, "--out", tmp_path / "out", *SMALL, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("18 images in 18 files")
    assert "2 classes (a, b); 3 channels" in result.stdout
    assert "nothing was written; 18 images were decoded" in result.stdout
    assert not (tmp_path / "out").exists()
    found = json.loads(prep("images", pets, "--out", tmp_path / "out", *SMALL, "--dry-run", "--json").stdout)
    assert found["images"] == 18


def test_verify_counts_images(prep: Prep, made: Path) -> None:
    assert "is intact: 18 images, all checksums match" in prep("verify", made).stdout
    assert json.loads(prep("verify", made, "--json").stdout)["images"] == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("images", "PETS", "--out", "OUT"), "missing option '--size'"),
        (("images", "--out", "OUT", "--size", "8"), "missing argument 'SOURCE...'"),
        (("images", "PETS", "--out", "-", "--size", "8"), "--out names a folder"),
        (("images", "PETS", "--out", "OUT", "--size", "8x8"), "'8x8' is not a valid integer"),
        (("images", "PETS", "--out", "OUT", "--size", "0"), "--size 0 must be from 4 to 2,048 pixels"),
        (("images", "PETS", "--out", "OUT", "--size", "8", "--channels", "4"), "--channels 4 must be 3"),
        (("images", "nothing", "--out", "OUT", "--size", "8"), 'there is no file or folder "nothing"'),
        (("images", "PETS", "--out", "OUT", "--image-size", "8"), 'did you mean "--size"?'),
        (("images", "PETS", "--out", "OUT", "--size", "8", "--tokenizer", "x"), "no such option"),
        (("convert", "MADE", "--to", "nanogpt", "--out", "OUT"), "is a dataset of images, not of text"),
        (("build", "PETS", "--out", "OUT"), 'no text in "'),
        (("build", "MADE", "--out", "OUT"), "is a dataset of images, which has no text"),
    ],
)
def test_mistakes_get_a_sentence(
    arguments: tuple[str, ...], message: str, prep: Prep, pets: Path, made: Path, tmp_path: Path
) -> None:
    places = {"PETS": pets, "OUT": tmp_path / "out", "MADE": made}
    result = prep(*(places.get(each, each) for each in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_text_with_pictures_is_refused(prep: Prep, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two\n\n" * 200)
    arguments = ("--tokenizer-kind", "bytes", "--max-document-bytes", 100, "--workers", 1)
    assert prep("build", tmp_path / "a.txt", "--out", tmp_path / "text", *arguments).exit_code == 0
    result = prep("inspect", tmp_path / "text", "--pictures", 3)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "is a dataset of text: --pictures is for images" in result.stderr


def test_killed_at_any_time_it_resumes_to_the_same_bytes(tmp_path: Path, tree: Tree, prep: Prep) -> None:
    files = {f"{n % 2}/{n:03}.bmp": encoded(picture(n, 150, 150), "BMP") for n in range(60)}
    archive = write_tar(tmp_path / "x.tar", files)
    assert prep("images", archive, "--out", tmp_path / "whole", "--size", 64, "--workers", 1).exit_code == 0
    arguments = ["images", str(archive), "--out", str(tmp_path / "out"), "--size", "64", "--workers"]
    for workers, ending in (("2", "train-00000.bin"), ("1", "train-00003.idx")):
        command = [sys.executable, "-m", "data_prep", *arguments, workers]
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        while child.poll() is None and not (tmp_path / "out" / ending).exists():
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        child.wait()
    result = prep(*arguments, "1")
    assert result.exit_code == 0, result.stderr
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")
