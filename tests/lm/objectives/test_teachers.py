"""Objectives with a teacher: losses against their formulas in float64, and what they remember from step to step."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import pytest
import torch

from lm.config.settings import Config
from lm.data.image_corpora import ImageCorpora, with_images
from lm.data.patch_rows import layout_of
from lm.data.views import Draw
from lm.objectives.batches import TrainingBatches
from lm.objectives.dino import sinkhorn
from lm.objectives.dinov2 import DINOv2, koleo
from lm.objectives.objective import restore
from lm.objectives.teacher import Teacher, cosine
from lm.training.gradients import step_gradients
from lm.training.optimizer import Optimizer

METHODS = ("moco", "byol", "dino", "dinov2")


@pytest.fixture(scope="module")
def opened(pictures, seeing):
    """The batches of an objective by name, with changes of settings."""
    corpora = ImageCorpora([pictures])

    def open_batches(name: str, **changes):
        return TrainingBatches(corpora, with_images(seeing.replace(objective=name, **changes), corpora))

    return open_batches


def begun(batches):
    """A model whose weights have moved away from its teacher's."""
    objective = batches.objective
    model = objective.new_model().initialize(0, identity=False).train()
    objective.begin(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return objective, model


def trained(batches, objective, model, steps: int) -> None:
    optimizer = Optimizer(model, batches.objective.config.optimizer)
    for step in range(steps):
        step_gradients(objective, model, batches.batch(step), objective.config, step)
        optimizer.clip()
        optimizer.step(1.0)
        objective.after_step(model, step)


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def softmax(scores: np.ndarray) -> np.ndarray:
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return shares / shares.sum(-1, keepdims=True)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def both(vectors: np.ndarray, targets: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(vectors, requires_grad=True), torch.tensor(targets)


def slope_of(loss, vectors: np.ndarray, targets: np.ndarray, place: tuple[int, ...]) -> float:
    moved = vectors.copy()
    moved[place] += 1e-6
    return (loss(moved, targets) - loss(vectors, targets)) / 1e-6


def byol_by_hand(vectors: np.ndarray, targets: np.ndarray) -> float:
    """Grill et al. 2020, equation 2, symmetric."""
    costs = [
        np.square(unit(vectors[n, view]) - unit(targets[n, 1 - view])).sum()
        for n in range(len(vectors))
        for view in (0, 1)
    ]
    return float(np.mean(costs))


def moco_by_hand(vectors: np.ndarray, targets: np.ndarray, queue: np.ndarray, temperature: float) -> float:
    """Chen, Xie and He 2021, equation 1, with the queue's vectors as further negatives."""
    costs = []
    for view in (0, 1):
        keys = np.concatenate([unit(targets[:, 1 - view]), unit(queue)])
        for n in range(len(vectors)):
            exponentials = np.exp(keys @ unit(vectors[n, view]) / temperature)
            costs.append(-math.log(exponentials[n] / exponentials.sum()))
    return float(np.mean(costs))


def dino_by_hand(vectors: np.ndarray, targets: np.ndarray, center: np.ndarray, hot: float, cold: float) -> float:
    """Caron et al. 2021, equation 3 and algorithm 1."""
    costs = [
        -(softmax((targets[n, t] - center) / cold) * np.log(softmax(vectors[n, v] / hot))).sum()
        for n in range(len(vectors))
        for t in range(2)
        for v in range(vectors.shape[1])
        if v != t
    ]
    return float(np.mean(costs))


def test_byol_is_the_formula_and_so_is_its_gradient(opened):
    objective, _ = begun(opened("byol"))
    vectors, targets = drawn(5, 2, 7), drawn(5, 2, 7, seed=1)
    inputs, fixed = both(vectors, targets)
    loss = objective.compare(inputs, fixed)["byol"]
    assert loss.item() == pytest.approx(byol_by_hand(vectors, targets), rel=1e-12)
    loss.backward()
    for place in ((0, 0, 0), (4, 1, 6)):
        assert inputs.grad[place] == pytest.approx(slope_of(byol_by_hand, vectors, targets, place), abs=1e-6)


@pytest.mark.parametrize(("steps", "filled"), [(0, 0), (1, 24), (2, 30)])
def test_moco_is_the_formula_with_and_without_a_queue(opened, steps, filled):
    objective, _ = begun(opened("moco", infonce_temperature=0.3, projection_size=7))
    memory = objective.memory.double()
    memory.keys.copy_(torch.tensor(unit(drawn(30, 7, seed=2))))
    memory.steps = steps
    vectors, targets = drawn(5, 2, 7), unit(drawn(5, 2, 7, seed=1))

    def by_hand(vectors, targets):
        return moco_by_hand(vectors, targets, drawn(30, 7, seed=2)[:filled], 0.3)

    inputs, fixed = both(vectors, targets)
    loss = objective.compare(inputs, fixed)["moco"]
    assert loss.item() == pytest.approx(by_hand(vectors, targets), rel=1e-12)
    loss.backward()
    assert inputs.grad[3, 1, 2] == pytest.approx(slope_of(by_hand, vectors, targets, (3, 1, 2)), abs=1e-6)


def test_dino_is_the_formula_with_small_views_and_a_center(opened):
    objective, _ = begun(opened("dino", prototypes=9, student_temperature=0.2, teacher_temperature=0.07))
    memory = objective.memory.double()
    memory.center.copy_(torch.tensor(drawn(9, seed=2)))
    memory.steps = 6  # after the warm-up
    vectors, targets = drawn(5, 4, 9), drawn(5, 2, 9, seed=1)

    def by_hand(vectors, targets):
        return dino_by_hand(vectors, targets, drawn(9, seed=2), 0.2, 0.07)

    inputs, fixed = both(vectors, targets)
    loss = objective.compare(inputs, fixed)["dino"]
    assert loss.item() == pytest.approx(by_hand(vectors, targets), rel=1e-12)
    loss.backward()
    for place in ((0, 0, 0), (4, 3, 6)):
        assert inputs.grad[place] == pytest.approx(slope_of(by_hand, vectors, targets, place), abs=1e-6)
    shares = softmax((targets - drawn(9, seed=2)) / 0.07)
    entropy = -(shares * np.log(shares)).sum(-1).mean()
    assert objective.method.measured(fixed)["teacher_entropy"] == pytest.approx(entropy, rel=1e-9)


def test_the_teacher_is_the_exponential_mean_of_the_student(opened):
    """After 100 steps, against a mean in float64; the momentum rises from 0.9 to 1 along a cosine."""
    batches = opened("byol", steps=100, teacher_momentum=0.9)
    objective, model = begun(batches)
    names = [name for name, _ in objective.memory.model.named_parameters()]
    assert {name for name, _ in model.named_parameters()} - set(names) == {
        f"head.prediction.{name}.weight" for name in ("norm", "first", "second")
    }
    expected = {name: objective.memory.model.get_parameter(name).double().clone() for name in names}
    optimizer = Optimizer(model, batches.objective.config.optimizer)
    for step in range(100):
        step_gradients(objective, model, batches.batch(step % 4), objective.config, step)
        optimizer.step(1.0)
        objective.after_step(model, step)
        momentum = 1 - 0.1 * (math.cos(math.pi * step / 100) + 1) / 2
        for name in names:
            expected[name] = momentum * expected[name] + (1 - momentum) * model.get_parameter(name).detach().double()
    for name in names:
        teacher, student = objective.memory.model.get_parameter(name), model.get_parameter(name)
        torch.testing.assert_close(teacher.double(), expected[name], rtol=1e-4, atol=1e-6)
        assert not torch.equal(teacher, student)
    assert objective.memory.steps == int(objective.memory.count) == 100


def test_schedules_are_functions_of_the_step():
    assert [cosine(0.9, 1.0, step, 4) for step in (0, 2, 4)] == pytest.approx([0.9, 0.95, 1.0], abs=1e-12)
    assert cosine(0.9, 1.0, 9, 4) == 1.0


@pytest.mark.parametrize("name", METHODS)
def test_the_student_learns_from_the_teacher_but_the_teacher_has_no_gradient(opened, name):
    batches = opened(name, prototypes_frozen=0.0)
    objective, model = begun(batches)
    step_gradients(objective, model, batches.batch(0), objective.config, 0)
    assert all(float(parameter.grad.abs().max()) > 0 for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in objective.memory.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_give_the_gradient_of_the_whole_batch(opened, name):
    batches = opened(name)
    objective, model = begun(batches)
    trained(batches, objective, model, 2)
    found = []
    for rows in (0, 4, 1):
        config = objective.config.replace(micro_batch_rows=rows)
        losses, _ = step_gradients(objective, model, batches.batch(2), config, 2)
        found.append((float(sum(losses.values())), [parameter.grad.clone() for parameter in model.parameters()]))
    for loss, gradients in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-5)
        for a, b in zip(gradients, found[0][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_queue_holds_the_latest_keys_and_forgets_the_oldest(opened):
    """12 images in two views fill 24 places a step, of 30."""
    batches = opened("moco")
    objective, model = begun(batches)
    seen = []
    for step in range(2):
        batch = batches.batch(step)
        seen.append(objective.targets(model, batch))
        step_gradients(objective, model, batch, objective.config, step)
        objective.after_step(model, step)
    keys = objective.memory.keys
    torch.testing.assert_close(keys[:12], seen[1][:, 0])
    torch.testing.assert_close(keys[12:24], seen[1][:, 1])
    torch.testing.assert_close(keys[24:], seen[0][:6, 0])
    torch.testing.assert_close(keys.norm(dim=1), torch.ones(30))


def test_the_center_is_the_moving_average_of_the_teachers_scores(opened):
    batches = opened("dino", center_momentum=0.75)
    objective, model = begun(batches)
    expected = torch.zeros(24)
    for step in range(3):
        batch = batches.batch(step)
        expected = 0.75 * expected + 0.25 * objective.targets(model, batch).flatten(0, 1).mean(0)
        step_gradients(objective, model, batch, objective.config.replace(micro_batch_rows=4), step)
        objective.after_step(model, step)
    torch.testing.assert_close(objective.memory.center, expected, rtol=1e-5, atol=1e-7)
    assert float(expected.abs().max()) > 0.01


def test_prototypes_are_frozen_at_first_and_the_temperature_rises(opened):
    batches = opened(
        "dino", steps=100, prototypes_frozen=0.02, teacher_warmup=0.1, first_teacher_temperature=0.02,
        teacher_temperature=0.04,
    )  # fmt: skip
    objective, model = begun(batches)
    frozen, temperatures = [], []
    for step in range(12):
        step_gradients(objective, model, batches.batch(0), objective.config, step)
        frozen.append(float(model.head.prototypes.grad.abs().max()) == 0)
        temperatures.append(objective.method.temperature)
        objective.after_step(model, step)
    assert frozen == [True, True] + [False] * 10
    assert temperatures == pytest.approx([0.02 + 0.002 * min(step, 10) for step in range(12)])


def test_small_views_are_small_parts_that_only_the_student_sees(opened):
    batches = opened("dino", crop_area=0.4, local_area=0.1, local_size=8)
    objective, model = begun(batches)
    batch = batches.batch(0)
    areas = batch.draws[..., Draw.AREA]
    assert areas.shape == (12, 4)
    assert areas[:, :2].min() >= 0.4
    assert areas[:, :2].max() <= 1.0
    assert areas[:, 2:].min() >= 0.1
    assert areas[:, 2:].max() <= 0.4
    assert objective.local_views_of(batch).shape == (24, 3, 8, 8)
    assert objective.vectors(model, batch).shape == (12, 4, 24)
    assert objective.targets(model, batch).shape == (12, 2, 24)


def test_a_view_gives_the_same_vector_in_one_pass_of_two_sizes_as_alone(opened):
    """The small views share rows with others."""
    objective, model = begun(opened("dino"))
    batch = opened("dino").batch(0)
    with torch.no_grad():
        together = objective.vectors(model, batch)
        images = objective.local_views_of(batch)[12:13]
        alone = model.head(model([images], layout_of([images], 4)).mean(1))
    torch.testing.assert_close(together[0, 3], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_memory_comes_back_from_its_tensors(opened, name):
    batches = opened(name)
    objective, model = begun(batches)
    trained(batches, objective, model, 3)
    saved = {key: tensor.clone() for key, tensor in objective.memory.state_dict().items()}
    other = opened(name).objective
    restore(other, model, saved)
    assert other.memory.state_dict().keys() == saved.keys()
    assert other.memory.steps == 3
    assert all(torch.equal(tensor, saved[key]) for key, tensor in other.memory.state_dict().items())
    restore(other, model, {})
    assert other.memory.steps == 0
    assert isinstance(other.memory, Teacher)


def test_sinkhorn_uses_all_prototypes_alike():
    scores = drawn(40, 8)
    shares = sinkhorn(torch.tensor(scores / 0.5), 50).numpy()
    assert shares.sum(1) == pytest.approx(np.ones(40), rel=1e-9)
    assert shares.sum(0) == pytest.approx(np.full(8, 5.0), rel=1e-3)

    expected = np.exp((scores / 0.05).T)  # Caron et al. 2020, SwAV, listing 1
    expected /= expected.sum()
    for _ in range(3):
        expected /= 8 * expected.sum(1, keepdims=True)
        expected /= 40 * expected.sum(0, keepdims=True)
    assert sinkhorn(torch.tensor(scores / 0.05)).numpy() == pytest.approx((expected * 40).T, rel=1e-9, abs=1e-30)


def test_a_queue_larger_than_a_tenth_of_the_data_is_warned_of(opened):
    assert opened("moco", queue_size=5).objective.warnings(50) == []
    (warning,) = opened("moco", queue_size=5).objective.warnings(40)
    assert warning.startswith("queue_size 5 is more than a tenth of the 40 images")


HEALTHY = {"spread": 0.5, "effective_rank": 20.0, "teacher_entropy": 2.0}


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "byol",
            {"spread": 0.02},
            "nearly the same features .spread 0.020.; start again with a third of learning_rate",
        ),
        ("moco", {"effective_rank": 1.2}, "differ in one direction only .effective rank 1.20."),
        ("dino", {"teacher_entropy": math.log(24)}, "finds all prototypes alike .its entropy is 3.178 of 3.178."),
        ("dino", {"teacher_entropy": 0.001}, "the same prototype for everything"),
    ],
)
def test_a_collapse_is_told_but_not_at_the_start(opened, name, change, says):
    objective = opened(name, steps=1000).objective
    found = {name: HEALTHY | change}
    assert objective.collapse({name: HEALTHY}, 900) == ""
    assert objective.collapse(found, 99) == ""
    assert (objective.collapse(found, 150) == "") == (name == "dino")
    told = objective.collapse(found, 200)
    assert told.startswith("the model has collapsed at step 200: ")
    assert re.search(says, told)


def koleo_by_hand(features: np.ndarray) -> float:
    """Oquab et al. 2023, section 4."""
    found = unit(features)
    distances = np.linalg.norm(found[:, None] - found[None], axis=2) + np.diag(np.full(len(found), np.inf))
    return float(-np.log(distances.min(1)).mean())


def test_koleo_is_the_formula_finite_for_equal_images_and_off_for_few():
    features = drawn(9, 5)
    assert koleo(torch.tensor(features)).item() == pytest.approx(koleo_by_hand(features), rel=1e-6)
    assert torch.isfinite(koleo(torch.ones(6, 5)))
    assert koleo(torch.tensor(drawn(3, 5))).item() == 0


@pytest.mark.parametrize("centering", ["mean", "sinkhorn"])
def test_dinov2_adds_hidden_patches_and_koleo_to_dino(opened, centering):
    objective, _ = begun(
        opened("dinov2", prototypes=9, centering=centering, ibot_weight=0.7, koleo_weight=0.3, patch_mask_rate=0.2)
    )
    method, memory = objective.method, objective.memory.double()
    memory.center.copy_(torch.tensor(drawn(9, seed=2)))
    memory.patch_center.copy_(torch.tensor(drawn(9, seed=3)))
    assert method.hidden == 3
    vectors, targets = drawn(5, 4 * 9 + 3 * 9 + 2 * 32), drawn(5, 2 * 9 + 3 * 9, seed=1)
    losses = objective.compare(torch.tensor(vectors), torch.tensor(targets))
    views, patches = vectors[:, :36].reshape(5, 4, 9), vectors[:, 36:63].reshape(5, 3, 9)
    features = vectors[:, 63:].reshape(5, 2, 32)
    of_views, of_patches = targets[:, :18].reshape(5, 2, 9), targets[:, 18:].reshape(5, 3, 9)

    assert losses["koleo"].item() == pytest.approx(
        0.3 * (koleo_by_hand(features[:, 0]) + koleo_by_hand(features[:, 1])), rel=1e-6
    )
    if centering == "mean":
        shares = softmax((of_patches - drawn(9, seed=3)) / 0.04)
        expected = dino_by_hand(views, of_views, drawn(9, seed=2), 0.1, 0.04)
        assert losses["dino"].item() == pytest.approx(expected, rel=1e-9)
    else:
        shares = sinkhorn(torch.tensor(of_patches.reshape(15, 9) / 0.04)).numpy().reshape(5, 3, 9)
    expected = -(shares * np.log(softmax(patches / 0.1))).sum(-1).mean()
    assert losses["ibot"].item() == pytest.approx(0.7 * expected, rel=1e-9)
    off = opened("dinov2", prototypes=9, ibot_weight=0.0, koleo_weight=0.0, patch_mask_rate=0.2).objective
    assert off.method.settings.ibot_weight == 0
    off.method.memory = memory
    assert set(off.compare(torch.tensor(vectors), torch.tensor(targets))) == {"dino"}


def test_patches_are_hidden_from_the_student_in_one_of_two_views(opened):
    """And only from the student: a hidden patch does not change its vectors, and changes the teacher's."""
    batches = opened("dinov2", local_views=0, flip=0.0, crop_area=1.0, color_jitter=0.0, grayscale=0.0)
    objective, model = begun(batches)
    batch = batches.batch(0)
    hidden = objective._hidden(batch).unflatten(1, (2, 16))
    assert hidden.sum((1, 2)).tolist() == [objective.method.hidden] * 12
    assert (hidden.sum(2) == 0).sum(1).tolist() == [1] * 12
    assert 0 < int(hidden[:, 1].any(1).sum()) < 12

    image = next(n for n in range(12) if hidden[n, 0, 0])  # its first patch is hidden in the first view
    changed = batch.images.clone()
    changed[image, :4, :4] = 255 - changed[image, :4, :4]
    other = dataclasses.replace(batch, images=changed)
    with torch.no_grad():
        (one, two), (of_one, of_two) = (
            [objective.method.unpacked(each(model, some)) for some in (batch, other)]
            for each in (objective.vectors, objective.targets)
        )
    torch.testing.assert_close(one.views[image, 0], two.views[image, 0])
    assert not torch.allclose(one.views[image, 1], two.views[image, 1])
    assert not torch.allclose(of_one.views[image, 0], of_two.views[image, 0])
    torch.testing.assert_close(of_one.patches[image - 1], of_two.patches[image - 1])
    assert not torch.allclose(of_one.patches[image], of_two.patches[image])


def test_a_small_batch_is_warned_of():
    config = Config().replace(objective="dinov2", batch_images=64)
    (warning,) = DINOv2(config).warnings(10_000)
    assert warning.startswith("dinov2 with 64 images a step: users of it report")
    assert DINOv2(config.replace(batch_images=128)).warnings(10_000) == []
