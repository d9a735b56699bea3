"""Tables of tasks on images: frozen rows as ``evaluate`` has them, shares of the labels, and fine-tuned rows."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from data_prep.errors import UserError
from lm.cli.main import main
from lm.data.image_files import LabeledImages, read_labeled
from lm.evaluation.frozen_features import ImageFeatures
from lm.evaluation.image_features import evaluate_images
from lm.evaluation.task_file import make_task
from lm.evaluation.task_table import FROZEN, IMAGE_ROWS, CellMaker, Task, read_task
from lm.evaluation.tuned_rows import Tuner, write_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def examples(pictures, image_run):
    folder = str(pictures.directory)
    return read_task(Task("pictures", "image_classification", folder, folder), image_run.image_format)


@pytest.fixture
def maker(image_run, tmp_path) -> CellMaker:
    features = ImageFeatures(image_run, image_run.load_image_model(CPU))
    return CellMaker(features, "weights", Tuner(image_run, CPU), tmp_path)


def test_a_task_reads_the_splits_of_a_dataset(examples, pictures):
    assert len(examples.train) == pictures.split("train").count
    assert len(examples.test) == pictures.split("validation").count
    assert examples.labels.names == ("left", "none", "top")
    assert list(examples.rows) == list(IMAGE_ROWS)


def test_frozen_rows_are_those_of_evaluate(examples, maker, image_run):
    found = evaluate_images(image_run)
    of_evaluate = {"": found["features"], "_pixels": found["baselines"]["raw_pixels"]}
    of_evaluate["_untrained"] = found["baselines"]["random_weights"]
    for end, expected in of_evaluate.items():
        for row, probe in (("knn", "knn"), ("probe", "linear")):
            cell = maker.cell(examples, row + end, 0)
            assert cell.metrics["accuracy"] == expected[probe]["accuracy"], row + end
            assert cell.note == expected[probe]["chosen"]
    usual = maker.cell(examples, "majority", 0).metrics["accuracy"]
    assert usual == found["baselines"]["majority"]["accuracy"]


def test_random_weights_are_those_of_the_seed_and_pixels_need_none(examples, maker):
    first, second = (maker.features.of(examples, "probe_untrained", seed).train for seed in (0, 1))
    assert np.abs(first - second).max() > 0.01
    pixels = [maker.features.of(examples, "knn_pixels", seed).train for seed in (0, 1)]
    assert (pixels[0] == pixels[1]).all()
    assert pixels[0].shape == (len(examples.train), 16 * 16 * 3)


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_a_share_of_the_labels_is_drawn_of_each_class_by_the_seed(examples, share):
    some = replace(examples, task=replace(examples.task, labels=share))
    classes, whole = examples.values(examples.train), np.bincount(examples.values(examples.train))
    drawn = [some.numbers(seed) for seed in range(4)]
    for numbers in drawn:
        assert np.bincount(classes[numbers]).tolist() == [max(1, round(count * share)) for count in whole]
        assert (np.diff(numbers) > 0).all()
    assert len({tuple(numbers) for numbers in drawn}) > 1
    assert np.array_equal(some.numbers(2), drawn[2])
    larger = replace(examples, task=replace(examples.task, labels=0.9))
    assert set(drawn[0]) <= set(larger.numbers(0))


def test_a_share_of_the_labels_is_what_rows_learn_from(examples, maker):
    some = replace(examples, task=replace(examples.task, labels=0.25))
    mine, numbers = some.of_seed(3), some.numbers(3)
    assert isinstance(mine.train, LabeledImages)
    assert len(mine.train) == len(numbers) < len(examples.train) / 3
    everywhere = np.arange(len(numbers))
    assert (mine.train.read(everywhere) == examples.train.read(numbers)).all()
    assert [example.label for example in mine.train] == [examples.train[n].label for n in numbers.tolist()]
    whole, part = (maker.features.of(each, "probe", 3) for each in (examples, some))
    assert (part.train == whole.train[numbers]).all()
    assert (part.test == whole.test).all()
    assert maker.cell(some, "probe", 3).source != maker.cell(examples, "probe", 3).source
    train, validation = mine.parts(3)
    assert len(train) + len(validation) == len(numbers)
    assert {example.label for example in train} == {"left", "none", "top"}


def test_images_are_written_for_fine_tuning_pixel_by_pixel(examples, image_run, tmp_path):
    write_images(tmp_path / "train.parquet", examples.train)
    again = read_labeled(str(tmp_path / "train.parquet"), image_run.image_format)
    numbers = np.arange(len(examples.train))
    assert (again.read(numbers) == examples.train.read(numbers)).all()
    assert [example.label for example in again] == [example.label for example in examples.train]


@pytest.mark.parametrize("row", ["untrained", "full"])
def test_fine_tuned_rows_answer_the_test_images(examples, maker, row):
    settings = {"epochs": 1, "batch_examples": 16, "threads": 1}
    some = replace(examples, task=replace(examples.task, labels=0.5, settings={row: settings}))
    cell = maker.cell(some, row, 0)
    outputs = np.array(cell.outputs)
    assert outputs.shape == (len(examples.test), 3)
    assert outputs.sum(1) == pytest.approx(1, abs=1e-4)
    assert cell.metrics["accuracy"] == (outputs.argmax(1) == examples.values(examples.test)).mean()
    assert cell.trained_parameters > 1000
    assert not (maker.out / "runs").exists()


def test_a_file_gives_a_table_for_each_share(image_run, pictures, tmp_path):
    shares = {"some": 0.3, "all": 1.0}
    lines = [f'[tasks.{name}]\ntask = "image_classification"\nlabels = {share}\n' for name, share in shares.items()]
    paths = f'train = "{pictures.directory}"\ntest = "{pictures.directory}"\n'
    (tmp_path / "tasks.toml").write_text("".join(line + paths for line in lines))
    rows = ("majority", "knn_pixels", "probe_pixels", "knn_untrained", "probe_untrained", "knn", "probe")
    command = ["tasks", str(image_run.path), "--tasks", str(tmp_path / "tasks.toml"), "--out", str(tmp_path / "out")]
    command += ["--rows", ",".join(rows), "--seeds", "0,1"]
    told = CliRunner().invoke(main, [*command, "--json"])
    assert told.exit_code == 0, told.output
    summaries = json.loads(told.stdout)
    assert [(each["task"], each["row"]) for each in summaries] == [(name, row) for name in shares for row in rows]
    shown = CliRunner().invoke(main, command)
    assert "The linear probe is" in shown.stdout
    assert "k-NN by raw pixels" in shown.stdout
    page = (tmp_path / "out" / "report.html").read_text()
    assert IMAGE_ROWS["probe_pixels"] in page
    assert (
        f"{sum(max(1, round(n * 0.3)) for n in np.bincount(pictures.split('train').labels))} training examples" in page
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "0"], "labels is 0.0: choose a share of the training examples, above 0 and at most 1"),
        (["--labels", "1.5"], "labels is 1.5"),
        (["--reads", "causal"], "--reads is for texts"),
        (["--rows", "tfidf"], 'there is no row "tfidf": choose from majority, knn_pixels'),
    ],
)
def test_mistakes_are_told(image_run, pictures, tmp_path, options, message):
    folder = str(pictures.directory)
    command = ["tasks", str(image_run.path), "--task", "image_classification", "--train", folder, "--test", folder]
    told = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "out"), *options])
    assert told.exit_code == 2
    assert message in told.output


def test_a_test_image_of_another_class_is_refused(image_run, pictures, tmp_path):
    from tests.lm.conftest import draw_pictures

    folder = draw_pictures(tmp_path / "files", 2)
    (folder / "top").rename(folder / "bottom")
    task = make_task(
        image_run,
        "t",
        {},
        {},
        {"task": "image_classification"},
        {"train": str(pictures.directory), "test": str(folder)},
    )
    with pytest.raises(UserError, match='label "bottom" does not occur'):
        read_task(task, image_run.image_format)


def test_frozen_rows_are_known():
    assert set(FROZEN) <= set(IMAGE_ROWS)
