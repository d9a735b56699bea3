"""Runs on images: the one loop, resumed to the same bits, planned, and validated."""

from __future__ import annotations

import json
import shutil
import signal

import pytest
import torch

from data_prep.errors import UserError
from lm.config.settings import Config
from lm.model.image_transformer import ImageTransformer
from lm.runs.directory import Run, open_run
from lm.training.plan import plan_run
from lm.training.pretraining import train
from lm.training.reporter import NullReporter
from tests.conftest import Recorder, StopAt

OBJECTIVES = ("simclr", "moco", "byol", "dino", "dinov2", "mae", "beit")


@pytest.fixture(scope="module")
def config(pictures, seeing, visual_tokens) -> Config:
    return seeing.replace(data=(str(pictures.directory),), visual_tokenizer=str(visual_tokens))


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> dict[str, Run]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(config.replace(objective=name), folder / name, NullReporter()) for name in OBJECTIVES}


def same(one: Run, two: Run) -> bool:
    pairs = [(run.newest().model(), run.newest().optimizer(), run.newest().objective()) for run in (one, two)]
    return all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(*pairs, strict=True)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_run_learns_and_is_validated(undisturbed, objective):
    run = undisturbed[objective]
    validations = [line["validation"][objective] for line in run.metrics() if "validation" in line]
    assert len(validations) == 2
    own = {"dino": {"teacher_entropy"}, "dinov2": {"teacher_entropy"}, "beit": {"code_accuracy"}}.get(objective, set())
    assert set(validations[0]) == {"loss", "images", "spread", "effective_rank", "knn_accuracy"} | own
    if objective in ("simclr", "mae"):  # a teacher's targets change while it learns
        assert validations[1]["loss"] < validations[0]["loss"]
    lines = [line for line in run.metrics() if "loss" in line]
    assert lines[-1]["tokens"] == 6 * 12 * 16
    assert lines[-1]["images_per_second"] > 0
    assert run.image_format.size == 16
    assert isinstance(run.load_image_model(torch.device("cpu")), ImageTransformer)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_run_stopped_anywhere_ends_with_the_same_bits(config, undisturbed, objective, step, tmp_path):
    with pytest.raises(InterruptedError):
        train(config.replace(objective=objective), tmp_path / "run", StopAt(step))
    assert same(train(config.replace(objective=objective), tmp_path / "run", NullReporter()), undisturbed[objective])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_killed_run_ends_with_the_same_bits(config, undisturbed, process, objective, tmp_path):
    """By ``kill -9``, some time after its first checkpoint."""
    path, config = tmp_path / "run", config.replace(objective=objective)
    process.start(config, path)
    process.wait_for(lambda: any(path.glob("checkpoints/step_*[0-9]")))
    assert process.end(signal.SIGKILL) in (-signal.SIGKILL, 0), process.stderr_text()
    assert same(train(config, path, NullReporter()), undisturbed[objective])


def test_validation_does_not_depend_on_the_micro_batch(config, undisturbed, tmp_path):
    for objective in OBJECTIVES:
        changed = config.replace(objective=objective, micro_batch_rows=3)
        run = train(changed, tmp_path / objective, NullReporter())
        lines = [
            [line["validation"][objective] for line in each.metrics() if "validation" in line]
            for each in (run, undisturbed[objective])
        ]
        for mine, whole in zip(*lines, strict=True):
            assert mine == pytest.approx(whole, rel=1e-3)


def test_several_micro_batches_train_the_same_run(config, undisturbed, tmp_path):
    run = train(config.replace(micro_batch_rows=4), tmp_path / "run", NullReporter())
    mine, whole = (each.newest().model() for each in (run, undisturbed["simclr"]))
    for name, weight in whole.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-3, atol=1e-4)


def test_a_run_starts_from_the_trunk_of_another_objective(config, undisturbed, tmp_path):
    start = undisturbed["simclr"].path
    run = train(config.replace(objective="mae", init_from=str(start), steps=1), tmp_path / "run", NullReporter())
    moved = run.newest().model()["blocks.0.attention.query.weight"]
    assert torch.allclose(moved, undisturbed["simclr"].newest().model()["blocks.0.attention.query.weight"], atol=0.05)
    assert "head.mask" in run.newest().model()


def test_a_run_on_visual_tokens_keeps_its_codes_when_the_tokenizer_is_gone(
    config, undisturbed, visual_tokens, tmp_path
):
    tokens = shutil.copytree(visual_tokens, tmp_path / "tokens")
    changed = config.replace(objective="beit", visual_tokenizer=str(tokens))
    with pytest.raises(InterruptedError):
        train(changed, tmp_path / "run", StopAt(3))
    shutil.rmtree(tokens)
    assert same(train(changed, tmp_path / "run", NullReporter()), undisturbed["beit"])
    with pytest.raises(UserError, match=f'there is no visual tokenizer "{tokens}"'):
        train(changed, tmp_path / "new", NullReporter())
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="was started with visual_tokenizer"):
        train(config.replace(objective="beit"), tmp_path / "run", NullReporter())


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_plan_counts_images(config, objective):
    plan = plan_run(config.replace(objective=objective, steps=100))
    table = dict(plan.table())
    assert table["images"].startswith("100 steps x 12 images = 1,200 images, ")
    assert "images/s" in table["speed"]
    assert json.loads(json.dumps(plan.as_dict()))["images_per_second"] > 0
    assert plan.memory.activations > 0


def test_a_plan_without_data_needs_the_size_of_the_images(config):
    nothing = config.replace(data=())
    assert plan_run(nothing.replace(image_size=16)).memory.total > 0
    with pytest.raises(UserError, match="a plan needs --data, or --image-size instead of it"):
        plan_run(nothing)


def test_the_data_of_a_run_is_found_again_and_must_be_the_same(config, undisturbed, pictures):
    from lm.runs.run_data import open_data

    assert open_data(open_run(undisturbed["mae"].path)).fingerprint == pictures.fingerprint


def test_a_run_on_images_refuses_to_be_read_as_text(undisturbed):
    with pytest.raises(UserError, match="reads images, not text"):
        undisturbed["mae"].load_model(torch.device("cpu"))


def test_a_collapse_is_told_once(config, tmp_path, monkeypatch):
    """A learning rate of 0 and features that are all alike: from step 100 on, the first time only."""
    monkeypatch.setattr("lm.objectives.view_method.LEAST_SPREAD", 10.0)
    recorder = Recorder()
    changed = config.replace(objective="byol", steps=103, validate_every=1, checkpoint_every=103, validation_rows=2)
    train(changed, tmp_path / "run", recorder)
    told = [note for note in recorder.notes if "collapsed" in note]
    assert len(told) == 1
    assert told[0].startswith("the model has collapsed at step 100: all images have nearly the same features")
    assert all(line["comparable"] is False for line in open_run(tmp_path / "run").metrics() if "validation" in line)
