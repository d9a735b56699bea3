"""The commands on runs that read images: embed, predict and finetune, and what the others say."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lm.inference.image_embedding import image_vectors
from tests.lm.cli.test_main import assert_refused, kindling
from tests.lm.conftest import draw_pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return draw_pictures(tmp_path_factory.mktemp("images") / "files", count=3)


@pytest.fixture
def mixed(folder, tmp_path):
    """A folder with pictures and a file that is none."""
    shutil.copytree(folder, tmp_path / "mixed")
    (tmp_path / "mixed" / "none" / "b.png").write_text("no picture")
    return tmp_path / "mixed"


def test_embed_writes_a_row_for_each_image_and_beside_it_the_names(seeing_run, mixed, tmp_path):
    told = kindling("embed", seeing_run.path, "--input", mixed, "--output", tmp_path / "v.npy", "--device", "cpu")
    names = (tmp_path / "v.txt").read_text().splitlines()
    assert names == [f"mixed/{name}/{n:03d}.png" for name in ("left", "none", "top") for n in range(3)]
    pixels = np.stack([np.asarray(Image.open(mixed.parent / name)) for name in names])
    model = seeing_run.load_image_model(torch.device("cpu"))
    wanted = image_vectors(model, seeing_run.image_format, [pixels])
    assert np.array_equal(np.load(tmp_path / "v.npy"), wanted)
    assert "9 images, 32 numbers each" in told.stderr
    assert "1 image was left out: mixed/none/b.png: not an image" in told.stderr
    kindling("embed", seeing_run.path, "--input", mixed, "--output", tmp_path / "v.jsonl", "--device", "cpu")
    lines = [json.loads(line) for line in (tmp_path / "v.jsonl").read_text().splitlines()]
    assert [line["image"] for line in lines] == names
    assert np.array_equal(np.array([line["embedding"] for line in lines], dtype=np.float32), wanted)
    piped = kindling("embed", seeing_run.path, "--input", mixed, "--output", "-", "--device", "cpu")
    assert [json.loads(line) for line in piped.stdout.splitlines()] == lines


def test_predict_names_each_image_and_measures_folders_of_known_classes(image_classifier, folder, mixed, tmp_path):
    run = image_classifier.path
    told = kindling("predict", run, "--input", mixed, "--output", tmp_path / "a.jsonl", "--device", "cpu")
    answers = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [list(answer) for answer in answers] == [["image", "label", "probabilities"]] * 9
    right = [answer["label"] == answer["image"].split("/")[1] for answer in answers]
    assert f"9 answers; accuracy {np.mean(right):.4f}; 1 image was left out: mixed/none/b.png" in told.stderr
    kindling("predict", run, "--input", mixed, "--output", tmp_path / "a.csv", "--device", "cpu")
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert [row["label"] for row in rows] == [answer["label"] for answer in answers]
    assert list(rows[0]) == ["image", "label", "probability left", "probability none", "probability top"]
    (mixed / "top").rename(mixed / "other")
    told = kindling("predict", run, "--input", mixed, "--output", tmp_path / "b.jsonl", "--device", "cpu")
    assert "of 6 images, without 3 of classes that" in told.stderr
    told = kindling("predict", run, "--input", folder / "top", "--output", "-", "--device", "cpu")
    assert "accuracy" not in told.stderr


def test_finetune_trains_on_a_folder_and_says_what_to_do_next(seeing_run, folder, tmp_path):
    arguments = ["--task", "image_classification", "--train", folder, "--run", tmp_path / "run", "--epochs", 1]
    told = kindling("finetune", seeing_run.path, *arguments, "--device", "cpu", "--threads", 1)
    assert "training images are cropped to at least 60% of their area" in told.stderr
    assert "3 classes: left, none, top" in told.stderr
    assert f"predict {tmp_path / 'run'} --input DIR" in told.stderr
    settings = (tmp_path / "run" / "config.toml").read_text()
    assert "crop_area = 0.6" in settings
    assert "color_jitter = 0.0" in settings


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("embed {plain} --input none --output v.npy", 'there is no file or folder "none"'),
        ("embed {plain} --input {text} --output {out}.npy", "can be read: a.txt: not an image"),
        ("embed {plain} --input {folder} --output v.npy --reads causal", "--reads is for texts"),
        ("embed {plain} --input {folder} --output v.npy --text-column a --pooling last", "--pooling and --text-column"),
        (
            "embed {tuned} --input {folder} --output v.npy",
            "is fine-tuned for image_classification: use kindling predict",
        ),
        ("predict {plain} --input {folder}", "was not fine-tuned on a task with a head"),
        ("predict {tuned} --input none", 'there is no file or folder "none"'),
        ("predict {tuned} --input {text} --output {out}.csv", "can be read: a.txt: not an image"),
        ("predict {tuned} --input {folder} --with-text", "--with-text is for texts"),
        ("sample {plain} --prompt a", "reads images, not text: kindling embed and kindling evaluate use it"),
        ("sample {tuned} --prompt a", "reads images, not text: kindling predict uses it"),
        ("serve {plain} --max-tokens 5 --compile", "--max-tokens and --compile are for texts"),
        ("harness {plain} --tasks a", "reads images, not text"),
        ("merge {plain} --out {out}", "is not fine-tuned"),
        ("finetune {plain} --run {out} --task classification --train {text}", "choose image_classification"),
        ("finetune {plain} --run {out} --task image_classification --train none", 'no file or folder "none"'),
        ("finetune {plain} --run {out} --task image_classification --train {folder}/top", "have no classes"),
        ("finetune {plain} --run {out} --task image_classification --train {text}", "a.txt: not an image"),
        ("finetune {words} --run {out} --task image_classification --train {folder}", "which reads text"),
    ],
)
def test_what_makes_no_sense_is_said_in_a_sentence(
    command, said, seeing_run, image_classifier, trained, folder, tmp_path
):
    (tmp_path / "a.txt").write_text("words")
    places = {"plain": seeing_run.path, "tuned": image_classifier.path, "words": trained.path, "folder": folder}
    given = command.format(**places, text=tmp_path / "a.txt", out=tmp_path / "out")
    assert_refused(kindling(*given.split()), said)
    assert {path.name for path in tmp_path.iterdir()} == {"a.txt"}
