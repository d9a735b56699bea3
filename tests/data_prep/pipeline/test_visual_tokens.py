"""Builds of visual tokens: what they hold, and builds that were interrupted."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import Result

from data_prep import build_images, build_visual_tokens
from data_prep.errors import UserError
from data_prep.pipeline import visual_tokens as pipeline
from data_prep.progress import SilentReporter
from data_prep.shards.codebook import load_codebook
from data_prep.shards.images import open_images
from data_prep.shards.tokens import Dataset, open_dataset
from tests.data_prep.handmade_images import encoded, picture, write_tree

Tree = Callable[[Path], dict[str, bytes]]
Prep = Callable[..., Result]
SETTINGS = {"codes": 10, "shard_tokens": 20, "workers": 1}


class KilledError(BaseException):
    """Stands for a kill: nothing in the program expects it."""


def build(images: Path, out: Path, **changes: Any) -> Dataset:
    return build_visual_tokens(images, out, 4, progress=SilentReporter(), **(SETTINGS | changes))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    files = {f"{name}/{n}.png": encoded(picture(17 * n + k), "PNG") for k, name in enumerate("ab") for n in range(9)}
    photos = write_tree(folder / "photos", files)
    settings = {"workers": 1, "validation_fraction": 0.3, "shard_bytes": 1600}
    build_images([photos], folder / "out", 12, progress=SilentReporter(), **settings)
    return folder / "out"


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(images, tmp_path_factory.mktemp("undisturbed") / "out").directory


def test_each_image_is_a_document_of_the_nearest_codes(images: Path, undisturbed: Path) -> None:
    dataset, pictures = open_dataset(undisturbed), open_images(images)
    dataset.verify()
    codebook = load_codebook(undisturbed).pixels.astype(np.float64)
    assert codebook.shape == (10, 4, 4, 3)
    for name in ("train", "validation"):
        split, shown = dataset.split(name), pictures.split(name)
        assert split.documents == shown.count
        assert split.document_lengths().tolist() == [10] * shown.count
        tokens = split.read(0, split.tokens).reshape(-1, 10)
        assert (tokens[:, 9] == dataset.tokenizer.end_of_text_id).all()
        squared = []
        for number, image in enumerate(shown.read(np.arange(shown.count)).astype(np.float64)):
            for place in range(9):
                row, column = divmod(place, 3)
                patch = image[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
                distances = ((codebook - patch) ** 2).sum((1, 2, 3))
                assert tokens[number, place] == distances.argmin()
                squared.append(distances.min() / 48)
        counts = np.bincount(tokens[:, :9].ravel(), minlength=10)
        shares = counts[counts > 0] / counts.sum()
        measured = dataset.manifest["visual_tokenizer"]["splits"][name]
        assert measured["used_codes"] == (counts > 0).sum()
        assert measured["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), abs=0.01)
        assert measured["pixel_error"] == pytest.approx(np.mean(squared) ** 0.5, abs=1e-3)
        text = dataset.tokenizer.decode(tokens[:, :9].ravel().tolist())
        assert split.text_bytes == len(text)
        assert split.records[0].first == shown.source_of(0)


def test_stopped_before_any_file_it_resumes_to_the_same_bytes(
    images: Path, undisturbed: Path, tmp_path: Path, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    rename = Path.replace
    for count in range(1000):
        left = count

        def rename_or_die(path: Path, target: Path) -> Path:
            nonlocal left
            left -= 1
            if left < 0:
                raise KilledError
            return rename(path, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", rename_or_die)
            try:
                build(images, tmp_path / str(count))
                break
            except KilledError:
                pass
        build(images, tmp_path / str(count))
        assert tree(tmp_path / str(count)) == tree(undisturbed), f"stopped before file {count}"
    shards = len(list(undisturbed.glob("*.bin")))
    assert shards > 6, "some parts have several shards"
    assert count > 2 * shards + 3, "every file was a point to stop at"


def test_killed_while_it_encodes_it_resumes_to_the_same_bytes(
    images: Path, undisturbed: Path, tmp_path: Path, tree: Tree
) -> None:
    code = (
        "import os, signal, data_prep.pipeline.visual_tokens as v; done = []; encode = v.encode\n"
        "def dies(*a):\n    done.append(1)\n    if len(done) == 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return encode(*a)\n"
        f"v.encode = dies; v.build_visual_tokens({str(images)!r}, {str(tmp_path / 'out')!r}, 4, **{SETTINGS})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(list((tmp_path / "out").glob("*.bin"))) < len(list(undisturbed.glob("*.bin")))
    build(images, tmp_path / "out")
    assert tree(tmp_path / "out") == tree(undisturbed)


def test_workers_change_no_byte(images: Path, undisturbed: Path, tmp_path: Path, tree: Tree) -> None:
    assert tree(build(images, tmp_path / "out", workers=2).directory) == tree(undisturbed)


def test_the_codes_may_be_learned_from_a_sample(
    images: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "SAMPLE", 40)
    monkeypatch.setattr(pipeline, "IMAGES_AT_ONCE", 5)
    given: list[np.ndarray] = []
    fit = pipeline.fit_codes
    monkeypatch.setattr(pipeline, "fit_codes", lambda sample, *others: (given.append(sample), fit(sample, *others))[1])
    build(images, tmp_path / "out")
    pixels = open_images(images).split("train").read(np.arange(open_images(images).split("train").count))
    rows = range(0, 12, 4)
    known = {image[y : y + 4, x : x + 4].tobytes() for image in pixels for y in rows for x in rows}
    assert given[0].shape == (40, 48)
    assert {patch.tobytes() for patch in given[0]} < known
    assert len({patch.tobytes() for patch in given[0]}) > 25


def test_a_damaged_codebook_is_named(undisturbed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(undisturbed, tmp_path / "out")
    content = bytearray((out / "codebook.npy").read_bytes())
    content[-1] ^= 1
    (out / "codebook.npy").write_bytes(content)
    with pytest.raises(UserError, match=r'codebook\.npy" is missing or not the tokenizer that produced these tokens'):
        open_dataset(out)


def test_other_settings_and_other_images_need_another_folder(images: Path, undisturbed: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"codes was 10, now 11.*choose another --out"):
        build(images, undisturbed, codes=11)
    other = shutil.copytree(images, tmp_path / "images")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"images sha256 was"):
        build(other, undisturbed)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            ("--patch-size", "5"),
            "--patch-size 5 does not divide the images' 12 pixels: choose one of 1, 2, 3, 4, 6, 12",
        ),
        (("--patch-size", "0"), "--patch-size 0 must be at least 1 pixel"),
        (("--patch-size", "4", "--codes", "1"), "--codes 1 must be from 2 to 32,768"),
        (("--patch-size", "4", "--codes", "3000"), "different patches: choose --codes at most that"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(
    prep: Prep, images: Path, tmp_path: Path, options: tuple[str, ...], told: str
) -> None:
    result = prep("visual-tokens", images, "--out", tmp_path / "out", "--workers", "1", *options)
    assert result.exit_code == 2
    assert told in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_command_says_how_well_the_codes_are_used_and_what_to_do_next(
    prep: Prep, images: Path, undisturbed: Path, tmp_path: Path, tree: Tree
) -> None:
    options = ("--out", tmp_path / "out", "--patch-size", "4", "--codes", "10", "--shard-tokens", "20")
    result = prep("visual-tokens", images, *options)
    assert result.exit_code == 0, result.stderr
    assert tree(tmp_path / "out") == tree(undisturbed)
    assert "10 of 10" in result.stdout
    assert f"--data {images} --visual-tokenizer {tmp_path / 'out'}" in result.stdout
    found = json.loads(prep("visual-tokens", images, *options, "--json").stdout)
    assert found["splits"]["train"]["used_codes"] == 10
    assert prep("visual-tokens", tmp_path / "out", "--out", tmp_path / "x", "--patch-size", "4").exit_code == 2
    assert "tokenizer of 14 tokens" in prep("inspect", tmp_path / "out").stdout
    assert prep("verify", tmp_path / "out").exit_code == 0
