"""Classifying images: learned by every method, augmented, resumed to the same bits, and read the same everywhere."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from lm import api
from lm.data.views import COLUMNS, Draw
from lm.finetuning.finetune import Finetuning, finetune
from lm.finetuning.merge import merge
from lm.finetuning.predict import open_predictor, predict_images
from lm.inference.image_embedding import image_vectors
from lm.runs import checkpoint
from lm.runs.base_weights import BASE, keep_base, starting_trunk
from lm.runs.directory import open_run
from lm.training.distributed import Ranks
from lm.training.reporter import NullReporter
from tests.conftest import StopAt
from tests.lm.conftest import draw_pictures

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "changes", [{}, {"method": "lora", "lora_rank": 4}, {"method": "probe", "epochs": 20}, {"weights": "random"}]
)
def test_every_method_learns_and_moves_only_what_it_may(changes, image_settings, seeing_run, tmp_path):
    done = finetune(image_settings(**changes), tmp_path / "run", NullReporter())
    losses = [line["metrics"]["loss"] for line in done.metrics() if "metrics" in line]
    assert losses[-1] < losses[0] - 0.02
    names = set(done.newest().model())
    trunk = {f"trunk.{name}" for name in seeing_run.newest().model() if not name.startswith("head.")}
    head = {"head.weight", "head.bias"}
    if changes.get("method") == "probe":
        assert names == head
    elif changes.get("method") == "lora":
        assert {name.split(".")[-1] for name in names - head} == {"a", "b"}
    else:
        assert names == trunk | head
    if not changes:
        assert done.scores["accuracy"] > 0.7


def test_the_trunk_starts_from_the_base_without_its_head_or_from_the_seed(image_settings, seeing_run, tmp_path):
    keep_base(seeing_run.newest().path / "model.safetensors", tmp_path)
    base = seeing_run.newest().model()
    started = starting_trunk(image_settings(), tmp_path).state_dict()
    assert started.keys() == {name for name in base if not name.startswith("head.")}
    assert all(torch.equal(weight, base[name]) for name, weight in started.items())
    one, two, other = (
        starting_trunk(image_settings(weights="random", seed=seed), tmp_path).state_dict() for seed in (0, 0, 1)
    )
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embedding.projection.weight"], other["embedding.projection.weight"])
    assert not torch.equal(one["embedding.projection.weight"], base["embedding.projection.weight"])


def test_the_loss_is_cross_entropy_of_the_mean_over_the_patches(image_settings, tmp_path):
    config = image_settings(method="probe", class_weights="balanced", label_smoothing=0.1, dropout=0.0)
    task, base = opened(config, tmp_path)
    model = task.model(starting_trunk(config, tmp_path))
    numbers = np.arange(12)
    losses, _ = task.gradients(model, task.batch(numbers, np.zeros(12, int)), 0)
    vectors = image_vectors(model.trunk.eval(), base.image_format, [task.images.read(numbers)]).astype(np.float64)
    logits = torch.from_numpy(vectors) @ model.head.weight.double().T + model.head.bias.double()
    labels = np.array([task.answers.labels.index(task.images[n].label) for n in numbers])
    counts = np.bincount([task.answers.labels.index(example.label) for example in task.images])
    weights = torch.from_numpy((1 / counts)[labels])
    wanted = F.cross_entropy(logits, torch.from_numpy(labels), reduction="none", label_smoothing=0.1) @ weights
    assert float(losses["image_classification"]) == pytest.approx(float((wanted / weights.sum()).detach()), abs=1e-5)


def opened(config, path):
    """The task of these settings, and its base, whose weights are kept in ``path``."""
    module = Finetuning(config, path / "run", Ranks())
    base = open_run(config.finetune.base)
    keep_base(base.newest().path / "model.safetensors", path)
    return module.task, base


def test_each_epoch_sees_an_image_in_another_view_and_a_probe_in_none(image_settings, tmp_path):
    task, _ = opened(image_settings(crop_area=0.5), tmp_path)
    numbers = np.arange(8)
    draws = [task.items(numbers, np.full(8, epoch)).draws for epoch in (0, 1, 0)]
    assert draws[0].shape == (8, COLUMNS)
    assert torch.equal(draws[0], draws[2])
    assert not (draws[0] == draws[1]).all(1).any()
    assert torch.equal(task.items(numbers[3:5], np.zeros(2, int)).draws, draws[0][3:5])
    assert 0.5 <= float(draws[0][:, Draw.AREA].min()) < 1
    assert (draws[0][:, [Draw.BRIGHTNESS, Draw.CONTRAST, Draw.SATURATION]] == 1).all()
    probe, _ = opened(image_settings(method="probe"), tmp_path)
    assert probe.items(numbers, np.zeros(8, int)).draws is None
    assert all(items.draws is None for items in task.validation_items())


def test_micro_batches_give_the_gradient_of_the_whole_batch(image_settings, tmp_path):
    found = []
    for most in (4096, 40):
        task, _ = opened(image_settings(micro_batch_tokens=most, dropout=0.0), tmp_path)
        model = task.model(starting_trunk(task.config, tmp_path))
        batch = task.batch(np.arange(12), np.zeros(12, int))
        assert len(batch) == (1 if most > 1000 else 6)
        task.gradients(model, batch, 0)
        found.append({name: weight.grad.clone() for name, weight in model.named_parameters()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-4, atol=1e-6)


def test_layer_decay_slows_the_lower_blocks_and_the_patches(image_settings, tmp_path):
    module = Finetuning(image_settings(layer_decay=0.5), tmp_path / "run", Ranks())
    (tmp_path / "run").mkdir()
    keep_base(module.weights, tmp_path / "run")
    rates = module.lr_multipliers(module.model())
    assert rates["trunk.embedding.projection.weight"] == 0.125
    assert rates["trunk.blocks.0.attention.query.weight"] == 0.25
    assert rates["trunk.blocks.1.attention.query.weight"] == 0.5
    assert "head.weight" not in rates


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_fine_tuning_that_was_cut_off_ends_as_if_undisturbed(method, image_settings, tmp_path):
    config = image_settings(method=method, dropout=0.1, epochs=4, checkpoint_every=3, log_every=2)
    one = finetune(config, tmp_path / "through", NullReporter())
    for stop in (2, 7):
        with pytest.raises(InterruptedError):
            finetune(config, tmp_path / "run", StopAt(stop))
    two = finetune(config, tmp_path / "run", NullReporter())
    for what in ("model", "optimizer"):
        a, b = (getattr(done.newest(), what)() for done in (one, two))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert one.newest().state == two.newest().state
    assert one.scores == two.scores
    for name in ("config.toml", "answers.json", "processor.json", BASE):
        assert (one.path / name).read_bytes() == (two.path / name).read_bytes()


def test_a_folder_that_has_changed_since_is_not_resumed(image_settings, tmp_path):
    files = draw_pictures(tmp_path / "files", count=4)
    config = image_settings(train=str(files), epochs=2, checkpoint_every=1)
    with pytest.raises(InterruptedError):
        finetune(config, tmp_path / "run", StopAt(1))
    shutil.copy(files / "top" / "001.png", files / "top" / "000.png")
    with pytest.raises(UserError, match="was trained on other data"):
        finetune(config, tmp_path / "run", NullReporter())


def test_the_run_needs_its_base_no_longer_and_answers_as_it_was_validated(image_classifier, pictures):
    predictor = open_predictor(image_classifier.path, CPU)
    split = pictures.split("validation")
    images = split.read(np.arange(split.count))
    answers = list(predict_images(predictor, iter(images)))
    labels = [pictures.classes[label] for label in split.labels]
    right = np.mean([answer["label"] == label for answer, label in zip(answers, labels, strict=True)])
    assert right == pytest.approx(image_classifier.scores["accuracy"])
    (alone,) = predict_images(predictor, images[3:4])
    assert alone["probabilities"] == pytest.approx(answers[3]["probabilities"], abs=1e-5)
    assert sum(alone["probabilities"].values()) == pytest.approx(1)


def test_a_run_is_merged_with_its_head_or_becomes_a_plain_one(image_settings, pictures, tmp_path):
    done = finetune(image_settings(method="lora", epochs=2), tmp_path / "run", NullReporter())
    saved = done.newest()
    merge(done, tmp_path / "whole", saved)
    images = pictures.split("validation").read(np.arange(5))
    before, after = (
        list(predict_images(open_predictor(path, CPU, "newest"), images)) for path in (done.path, tmp_path / "whole")
    )
    assert before == after
    merge(done, tmp_path / "plain", saved, trunk_only=True)
    trunk = open_run(tmp_path / "plain").load_image_model(CPU)
    tuned = open_predictor(done.path, CPU, "newest").model.trunk
    form = pictures.format
    assert (image_vectors(trunk, form, [images]) == image_vectors(tuned, form, [images])).all()
    assert checkpoint.steps(tmp_path / "plain" / "checkpoints") == [saved.step]


def test_one_class_or_an_unknown_one_is_refused(image_settings, tmp_path):
    files = draw_pictures(tmp_path / "files", count=2)
    shutil.copytree(files / "top", tmp_path / "one" / "top")
    (tmp_path / "one" / "none").mkdir()
    shutil.copytree(files, tmp_path / "more")
    (tmp_path / "more" / "top").rename(tmp_path / "more" / "right")
    with pytest.raises(UserError, match="have no classes"):
        Finetuning(image_settings(train=str(tmp_path / "one")), tmp_path / "run", Ranks())
    config = image_settings(train=str(files), validation=str(tmp_path / "more"))
    with pytest.raises(UserError, match=r'more/right/000.png: the label "right" does not occur in the training'):
        Finetuning(config, tmp_path / "run", Ranks())
    assert not (tmp_path / "run").exists()


def test_a_class_with_one_image_and_images_left_out_are_told(image_settings, tmp_path, recorder):
    files = draw_pictures(tmp_path / "files", count=3)
    for number in (1, 2):
        (files / "top" / f"{number:03d}.png").unlink()
    (files / "none" / "bad.png").write_text("no picture")
    finetune(image_settings(train=str(files), epochs=1), tmp_path / "run", recorder)
    assert "only one training image is of class top" in recorder.notes
    assert f"{files}: 1 image was left out: files/none/bad.png: not an image" in recorder.notes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "classification"}, "task classification does not fit .* which reads images: choose image_class"),
        ({"reads": "causal"}, "reads and pooling are for texts"),
        ({"judged_by": "spearman"}, "judged_by spearman is for regression"),
    ],
)
def test_settings_of_texts_are_refused(changes, said, image_settings):
    with pytest.raises(UserError, match=said):
        image_settings(**changes)


def test_a_run_on_text_does_not_classify_images(task_settings):
    with pytest.raises(UserError, match=r"task image_classification does not fit .* which reads text: choose class"):
        task_settings("classification", task="image_classification")


def test_a_head_with_a_hidden_layer_is_learned_and_not_exported(image_settings, tmp_path):
    done = finetune(image_settings(head_hidden=8, epochs=1), tmp_path / "run", NullReporter())
    assert done.newest().model()["hidden.weight"].shape == (8, 32)
    with pytest.raises(UserError, match=r"holds a head without a hidden layer \(fine-tune with --head-hidden 0\)"):
        api.load(done.path).save_pretrained(tmp_path / "out")
