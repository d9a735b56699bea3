"""k-NN and linear probe of image runs, against scikit-learn, brute force and the baselines."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from sklearn.linear_model import LogisticRegression

import lm
from data_prep.errors import UserError
from data_prep.pipeline.images import build_images
from data_prep.shards.images import ImageFormat
from lm.cli.main import main
from lm.evaluation import image_features
from lm.evaluation.image_features import evaluate_images, verdict
from lm.evaluation.image_probes import pixel_reader, random_trunk
from lm.inference.image_embedding import image_vectors
from lm.objectives.images import feature_health
from lm.runs.directory import RESULT, Run
from lm.training.pretraining import train
from lm.training.reporter import NullReporter
from tests.lm.conftest import draw_pictures


@pytest.fixture(scope="module")
def result(image_run) -> dict:
    return evaluate_images(image_run)


def read(split):
    return split.read(np.arange(split.count))


def by_hand(train, labels, test, truth, found) -> None:
    """The accuracies that a result has for vectors: k-NN by loops in float64, the probe by scikit-learn."""
    k, strength = int(found["knn"]["chosen"].removeprefix("k ")), float(found["linear"]["chosen"].removeprefix("C "))
    train, test = train.astype(np.float64), test.astype(np.float64)
    right = 0
    for vector, label in zip(test, truth, strict=True):
        distances = 1 - train @ vector / np.linalg.norm(train, axis=1) / np.linalg.norm(vector)
        votes = np.bincount(labels[np.argsort(distances, kind="stable")[:k]], minlength=3)
        right += int(votes.argmax() == label)
    assert found["knn"]["accuracy"] == pytest.approx(right / len(truth))
    mean, std = train.mean(0), train.std(0)
    probe = LogisticRegression(C=strength, max_iter=2000).fit((train - mean) / std, labels)
    assert found["linear"]["accuracy"] == pytest.approx(probe.score((test - mean) / std, truth))


def test_accuracies_are_those_of_the_frozen_features(image_run, pictures, result):
    model = image_run.load_image_model(torch.device("cpu"))
    splits = pictures.split("train"), pictures.split("validation")
    first, second = (image_vectors(model, image_run.image_format, [read(split)]) for split in splits)
    by_hand(first, splits[0].labels, second, splits[1].labels, result["features"])
    for name, value in feature_health(second).items():
        assert result[name] == pytest.approx(value, rel=1e-5)


def test_baselines_are_pixels_and_random_weights_in_the_same_protocol(image_run, pictures, result):
    splits = pictures.split("train"), pictures.split("validation")
    form = image_run.image_format
    pixels = [
        ((read(each) / 255.0 - form.mean) / form.std).transpose(0, 3, 1, 2).reshape(each.count, -1) for each in splits
    ]
    by_hand(pixels[0], splits[0].labels, pixels[1], splits[1].labels, result["baselines"]["raw_pixels"])
    model = random_trunk(image_run.config.model, 0, torch.device("cpu"))
    assert all(weight.std() > 0 for weight in model.parameters() if weight.ndim > 1)
    random = [image_vectors(model, form, [read(each)]) for each in splits]
    by_hand(random[0], splits[0].labels, random[1], splits[1].labels, result["baselines"]["random_weights"])
    counts = np.bincount(splits[0].labels)
    assert result["baselines"]["majority"]["accuracy"] == (splits[1].labels == counts.argmax()).mean()


def test_large_images_are_averaged_for_the_baseline_of_raw_pixels():
    form = ImageFormat(32, 1, (0.5,), (0.25,))
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 1), dtype=np.uint8)
    expected = (images.reshape(3, 16, 2, 16, 2).mean((2, 4)) / 255 - 0.5) / 0.25
    assert np.abs(pixel_reader(form)(images) - expected.reshape(3, 256)).max() < 1e-5


def test_a_result_tells_its_size_error_and_difference(result, pictures):
    train_split, test_split = pictures.split("train"), pictures.split("validation")
    assert result["images"] == {"train": train_split.count, "test": test_split.count}
    assert result["classes"] == 3
    assert result["step"] == 4
    assert set(result["validation"]["simclr"]) >= {"loss", "spread", "effective_rank"}
    for probe in ("knn", "linear"):
        ours = result["features"][probe]
        # The standard deviation of a share p of n images is sqrt(p (1 - p) / n).
        assert ours["error"] == pytest.approx(
            (ours["accuracy"] * (1 - ours["accuracy"]) / test_split.count) ** 0.5, rel=0.1
        )
        for baseline in ("raw_pixels", "random_weights"):
            theirs = result["baselines"][baseline][probe]
            assert theirs["difference"] == pytest.approx(ours["accuracy"] - theirs["accuracy"])


def test_a_result_is_saved_for_the_report_and_read_again(image_run, result, monkeypatch):
    assert json.loads((image_run.path / RESULT).read_text()) == result
    monkeypatch.setattr(image_features, "_of_features", None)
    assert evaluate_images(image_run) == result


def test_folders_and_datasets_can_be_judged_on(image_run, pictures, tmp_path, result):
    folder = draw_pictures(tmp_path / "files", 8)
    on_folder = evaluate_images(image_run, train=str(folder), test=str(pictures.directory))
    assert on_folder["images"] == {"train": 24, "test": pictures.split("validation").count}
    assert on_folder["validation"] == {}
    assert f"({folder})" in on_folder["protocol"]
    tested = evaluate_images(image_run, test=str(folder))
    assert tested["images"] == {"train": pictures.split("train").count, "test": 24}
    assert json.loads((image_run.path / RESULT).read_text()) == result
    build_images([folder], tmp_path / "small", 8, validation_fraction=0.2, workers=1)
    with pytest.raises(UserError, match="has images of 8 pixels"):
        evaluate_images(image_run, test=str(tmp_path / "small"))
    with pytest.raises(UserError, match="has images of 8 pixels"):
        evaluate_images(image_run, data=str(tmp_path / "small"))


def test_classes_are_the_same_however_unicode_composes_their_names(image_run, tmp_path):
    folder = draw_pictures(tmp_path / "files", 8)
    (folder / "top").rename(folder / "u\u0308ber")  # as macOS names it
    build_images([folder], tmp_path / "data", 16, validation_fraction=0.4, workers=1)
    found = evaluate_images(image_run, data=str(tmp_path / "data"), train=str(folder))
    assert found["classes"] == 3


def test_one_training_image_of_each_class_is_enough(image_run, pictures, tmp_path):
    found = evaluate_images(image_run, train=str(draw_pictures(tmp_path, 1)), test=str(pictures.directory))
    assert found["features"]["knn"]["chosen"] == "k 1"
    assert found["images"]["train"] == found["classes"] == 3


def test_images_that_cannot_be_read_are_left_out_and_named(image_run, pictures, tmp_path):
    folder = draw_pictures(tmp_path, 2)
    (folder / "top" / "broken.png").write_bytes(b"no picture")
    command = ["evaluate", str(image_run.path), "--train", str(pictures.directory), "--test", str(folder)]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    assert "1 image was left out" in result.stdout
    assert "tested on 6 images" in result.stdout


def test_images_that_were_named_must_have_classes(image_run, tmp_path):
    folder = draw_pictures(tmp_path / "files", 3)
    with pytest.raises(UserError, match="no classes"):
        evaluate_images(image_run, test=str(folder / "top"))
    for name in ("left", "none"):
        shutil.rmtree(folder / name)
    shutil.copytree(folder / "top", tmp_path / "other" / "bottom")
    shutil.copytree(folder / "top", tmp_path / "other" / "left")
    with pytest.raises(UserError, match='label "bottom" does not occur in the training'):
        evaluate_images(image_run, test=str(tmp_path / "other"))


def test_without_classes_there_is_the_loss_and_a_sentence(seeing, tmp_path):
    folder = draw_pictures(tmp_path / "files", 20)
    build_images([folder / "top"], tmp_path / "flat", 16, validation_fraction=0.2, workers=1)
    config = seeing.replace(data=(str(tmp_path / "flat"),), steps=2, objective="mae")
    run = train(config, tmp_path / "run", NullReporter())
    found = evaluate_images(run)
    assert (found["features"], found["baselines"]) == ({}, {})
    assert found["validation"]["mae"]["loss"] > 0
    assert found["spread"] > 0
    told = CliRunner().invoke(main, ["evaluate", str(run.path)])
    assert told.exit_code == 0
    assert "have no classes" in told.stdout
    assert "effective rank" in told.stdout


def test_scikit_learn_is_asked_for(image_run, pictures, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UserError, match=r'pip install "kindling-lm\[tasks\]"'):
        evaluate_images(image_run, test=str(pictures.directory))


def test_the_command_prints_a_table_with_the_protocol_and_a_verdict(image_run, result):
    told = CliRunner().invoke(main, ["evaluate", str(image_run.path)])
    assert told.exit_code == 0, told.output
    for part in (
        "k-NN",
        "linear probe",
        "raw pixels (baseline)",
        "random weights",
        "frozen features",
        "By k-NN the features",
    ):
        assert part in told.stdout
    as_json = CliRunner().invoke(main, ["evaluate", str(image_run.path), "--json"])
    assert json.loads(as_json.stdout) == result


@pytest.mark.parametrize("option", [["--pairs", "x"], ["--reads", "causal"], ["--text", "x"]])
def test_options_for_text_are_refused(image_run, option):
    told = CliRunner().invoke(main, ["evaluate", str(image_run.path), *option])
    assert told.exit_code == 2
    assert f"reads images, and {option[0]} is for a run that reads text" in told.output


def test_options_for_images_are_refused_by_a_run_on_text(trained):
    told = CliRunner().invoke(main, ["evaluate", str(trained.path), "--test", "x"])
    assert told.exit_code == 2
    assert "reads text, and --test is for a run that reads images" in told.output
    with pytest.raises(UserError, match="reads text, and train and test are for a run that reads images"):
        lm.evaluate(trained.path, train="x", test="x")


def test_the_verdict_counts_differences_above_two_standard_errors():
    def told(difference, error):
        baseline = {"difference": difference, "difference_error": error}
        both = {"knn": baseline, "linear": baseline}
        found = {"features": both, "baselines": {"raw_pixels": both, "random_weights": both}, "objective": "mae"}
        return verdict(found)

    assert "By k-NN the features beat raw pixels (+5.0 points) and random weights (+5.0 points)." in told(0.05, 0.02)
    assert "are worse than raw pixels (-5.0 points)" in told(-0.05, 0.02)
    assert "do not clearly beat raw pixels (+5.0 points)" in told(0.05, 0.03)
    assert "k-NN misjudges features of mae" in told(0.05, 0.03)


def test_a_fine_tuned_run_is_refused(image_run, tmp_path):
    shutil.copytree(image_run.path, tmp_path / "run")
    tuned = image_run.config.replace(task="image_classification", base=str(image_run.path))
    with pytest.raises(UserError, match="is fine-tuned for image_classification: use"):
        evaluate_images(Run(tmp_path / "run", tuned))
