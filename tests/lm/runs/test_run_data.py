"""A run finds its data from everywhere, and no other data in its place."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep.errors import UserError
from lm.data.corpora import open_corpora
from lm.evaluation.validation_loss import evaluate
from lm.finetuning.finetune import finetune
from lm.runs.directory import open_run
from lm.runs.run_data import held_out_pictures, located, open_data, training_pictures
from lm.training.reporter import NullReporter
from tests.lm.conftest import draw_pictures


@pytest.fixture
def project(small, quietly, dataset, tmp_path, monkeypatch) -> Path:
    """A folder with data and a run that was trained there by relative names."""
    folder = tmp_path / "project"
    shutil.copytree(dataset.directory, folder / "data" / "d")
    monkeypatch.chdir(folder)
    quietly(small.replace(data=("data/d",), steps=1), Path("runs/r"))
    (tmp_path / "elsewhere").mkdir()
    return folder


def test_data_is_found_from_another_working_directory(project, tmp_path, monkeypatch):
    assert located(open_run("runs/r")).config.data.data == ("data/d",)
    here = evaluate(open_run("runs/r"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = open_run("../project/runs/r")
    (project / "runs/r/evaluation.json").unlink()
    assert evaluate(run)["validation"] == here["validation"]
    assert run.config.data.data == ("data/d",)  # as the user typed it


def test_data_is_found_after_the_run_moved_away(project, tmp_path, monkeypatch):
    (project / "runs/r").rename(tmp_path / "elsewhere" / "r")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert located(open_run("r")).config.data.data == (str(project / "data/d"),)


def test_data_is_found_after_run_and_data_moved_together(project, tmp_path, monkeypatch):
    project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert located(open_run("../moved/runs/r")).config.data.data == (str(tmp_path / "moved/data/d"),)


def test_other_data_of_that_name_is_not_taken_for_it(project, other_dataset, tmp_path, monkeypatch):
    shutil.copytree(other_dataset.directory, tmp_path / "elsewhere" / "data" / "d")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert located(open_run("../project/runs/r")).config.data.data == (str(project / "data/d"),)


def test_training_resumes_from_elsewhere_and_keeps_the_name(project, quietly, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = open_run("../project/runs/r").config.replace(steps=2)
    run = quietly(config, Path("../project/runs/r"))
    assert run.newest().step == 2
    assert open_run("../project/runs/r").config.data.data == ("data/d",)


def test_missing_data_is_reported_with_the_places_and_the_option(project, quietly, tmp_path, monkeypatch):
    shutil.rmtree(project / "data")
    monkeypatch.chdir(tmp_path / "elsewhere")
    run = open_run("../project/runs/r")
    with pytest.raises(UserError) as error:
        open_data(run)
    for words in (
        'its config.toml names "data/d"',
        f"which is neither in {tmp_path / 'elsewhere'}, nor in {project}, where it was trained, nor, with the same",
        "--data says where it is now",
    ):
        assert words in str(error.value)
    monkeypatch.chdir(project)
    with pytest.raises(UserError, match=f"neither in {project}, nor, with the same content, in a folder above the run"):
        open_data(open_run("runs/r"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="--data says where it is now"):
        quietly(run.config.replace(steps=2), run.path)
    (run.path / "config.toml").write_text((run.path / "config.toml").read_text().replace("data/d", "/gone"))
    with pytest.raises(UserError, match=r'names "/gone", which is not there: --data says where it is now'):
        open_data(open_run(run.path))


def test_a_folder_whose_name_ends_like_a_weight_is_that_folder(dataset, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(dataset.directory, "v@2")
    assert open_corpora(["v@2"]).datasets[0].directory == Path("v@2")
    both = open_corpora(["v@2@3", f"{dataset.directory}@2"])
    assert (both.datasets[0].directory, [*map(int, both.weights)]) == (Path("v@2"), [3, 2])
    with pytest.raises(UserError, match='there is no folder "w@2", nor "w", with @2 taken as its weight'):
        open_corpora(["w@2"])


def test_images_of_a_run_come_from_all_over_its_training_split(seeing_run, pictures, tmp_path):
    drawn, count = training_pictures(seeing_run, 10)
    found, split = list(drawn), pictures.split("train")
    assert (len(found), count) == (10, split.count)
    numbers = {split.source_of(number): number for number in range(split.count)}
    chosen = np.array([numbers[each.name] for each in found])
    assert (np.stack([each.pixels for each in found]) == split.read(chosen)).all()
    assert [each.label for each in found] == [pictures.classes[split.labels[number]] for number in chosen]
    assert len({each.label for each in found}) == 3
    held_out = {pictures.split("validation").source_of(n) for n in range(pictures.split("validation").count)}
    assert {each.name for each in held_out_pictures(seeing_run, 4)} < held_out
    gone = replace(seeing_run, config=seeing_run.config.replace(data=(str(tmp_path / "gone"),)))
    assert held_out_pictures(gone, 4) == []
    with pytest.raises(UserError, match="is missing"):
        training_pictures(gone, 10)


def test_images_of_a_fine_tuned_run_are_its_examples(image_classifier, pictures, tmp_path):
    def train_on(source: Path):
        run = image_classifier
        return replace(run, config=run.config.replace(train=str(source)))

    drawn, count = training_pictures(image_classifier, 10)
    assert (len(list(drawn)), count) == (10, pictures.split("train").count)
    files = draw_pictures(tmp_path / "mine" / "train", count=2)
    shutil.copytree(files, tmp_path / "mine" / "val")
    drawn, count = training_pictures(train_on(tmp_path / "mine"), 10)
    names = {each.name for each in drawn}
    assert len(names) == count == 6
    assert all(name.startswith("mine/train/") for name in names)
    with pytest.raises(UserError, match="there is no file or folder"):
        training_pictures(train_on(tmp_path / "gone"), 10)


def test_examples_of_a_fine_tuned_run_are_found_from_another_working_directory(image_settings, tmp_path, monkeypatch):
    draw_pictures(tmp_path / "there" / "mine", count=2)
    monkeypatch.chdir(tmp_path / "there")
    finetune(image_settings(train="mine", epochs=1), Path("run"), NullReporter())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    drawn, count = training_pictures(open_run("../there/run"), 10)
    assert len(list(drawn)) == count == 6
