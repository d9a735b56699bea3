from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from lm.config.model_settings import ModelConfig
from lm.config.optimizer_settings import OptimizerConfig
from lm.model.transformer import Transformer
from lm.training import optimizer
from lm.training.optimizer import (
    LOWEST,
    Muon,
    Optimizer,
    halley,
    inverse,
    learning_rate_factor,
    momentum_at,
    orthogonalize,
)


def test_the_schedule_rises_stays_and_falls():
    config = OptimizerConfig(warmup_fraction=0.1, decay_fraction=0.5, final_learning_rate_fraction=0.0)
    factors = [learning_rate_factor(step, 20, config) for step in range(20)]
    assert factors == pytest.approx([0.5, *[1.0] * 10, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_the_schedule_falls_to_its_floor():
    config = OptimizerConfig(warmup_fraction=0.0, decay_fraction=1.0, final_learning_rate_fraction=0.2)
    assert learning_rate_factor(0, 10, config) == 1.0
    assert learning_rate_factor(5, 10, config) == pytest.approx(0.6)
    assert learning_rate_factor(10, 10, config) == pytest.approx(0.2)


def test_without_warmup_and_decay_the_learning_rate_is_constant():
    config = OptimizerConfig(warmup_fraction=0.0, decay_fraction=0.0)
    assert {learning_rate_factor(step, 7, config) for step in range(7)} == {1.0}


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_the_schedule_is_never_above_its_peak_nor_at_zero(steps, warmup, decay, floor):
    config = OptimizerConfig(
        warmup_fraction=warmup, decay_fraction=min(decay, 1 - warmup), final_learning_rate_fraction=floor
    )
    factors = [learning_rate_factor(step, steps, config) for step in range(steps)]
    assert all(0 < factor <= 1 for factor in factors)
    peak = factors.index(max(factors))
    assert factors[:peak] == sorted(factors[:peak])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)


@given(st.floats(1e-4, 0.5))
def test_the_halley_step_is_the_best_of_its_kind(lowest):
    """By Chebyshev's theorem on rational functions: three free numbers, and the error is largest at four places."""
    a, b, c = halley(lowest)
    x = np.geomspace(lowest, 1, 20_001)
    error = x * (a + b * x**2) / (1 + c * x**2) - 1
    turns = np.flatnonzero(np.diff(np.sign(np.diff(error)))) + 1
    places = [0, *turns.tolist(), len(x) - 1]
    assert len(places) == 4
    assert error[places] == pytest.approx(error[-1] * np.array([-1, 1, -1, 1]), rel=1e-3)


@given(st.integers(1, 150), st.floats(1e-3, 1.0))
def test_the_inverse_by_blocks_is_the_inverse(size, shift):
    draws = torch.randn(2, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    matrices = draws @ draws.mT / size + shift * torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(matrices @ inverse(matrices), torch.eye(size, dtype=torch.float64).expand(2, -1, -1))


def test_orthogonalize_gives_the_same_bits_for_every_number_of_threads():
    torch.manual_seed(0)
    stack = torch.randn(3, 160, 200)
    alone = orthogonalize(stack)
    try:
        torch.set_num_threads(2)
        assert torch.equal(orthogonalize(stack), alone)
    finally:
        torch.set_num_threads(1)


SHAPES = [(32, 32), (64, 16), (16, 64), (5, 96), (1, 8)]


def drawn(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, *shape, dtype=dtype) * torch.tensor([1e-3, 1.0, 1e4], dtype=dtype)[:, None, None]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_orthogonalize_takes_each_singular_value_through_the_halley_step(shape, dtype, tolerance):
    matrices = drawn(shape, dtype)
    left, values, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    values = values / (values**4).sum(1, keepdim=True) ** 0.25  # the fourth root of the norm of the squared gram matrix
    a, b, c = halley(LOWEST)
    expected = left @ torch.diag_embed(values * (a + b * values**2) / (1 + c * values**2)) @ right
    torch.testing.assert_close(orthogonalize(matrices).double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("by", ["_by_inverse", "_by_products"])
@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_brings_singular_values_near_one_and_keeps_singular_vectors(shape, by, monkeypatch):
    monkeypatch.setattr(optimizer, "_by_inverse", getattr(optimizer, by))
    matrices = drawn(shape, torch.float32)
    for matrix, made in zip(matrices, orthogonalize(matrices), strict=True):
        values = torch.linalg.svdvals(made)
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.nn.functional.cosine_similarity(made.flatten(), (left @ right).flatten(), dim=0) > 0.95
        if shape[0] != shape[1]:  # a square matrix may have values too small to be lifted
            assert values.min() > 0.58
        assert values.max() < 1.42


def test_orthogonalize_lifts_small_values_into_the_band_and_smaller_ones_as_far_as_it_can():
    values = torch.tensor([1.0, 0.5, 0.1, 0.02, 0.0055, 1e-4, 0.0])
    rotations = [torch.linalg.qr(torch.randn(7, 7, generator=torch.Generator().manual_seed(i)))[0] for i in (0, 1)]
    made = torch.linalg.svdvals(orthogonalize((rotations[0] * values @ rotations[1])[None]))[0]
    assert ((made[:5] > 0.58) & (made[:5] < 1.42)).all()
    assert 0.01 < made[5] < 0.02
    assert made[6] < 1e-3


def test_orthogonalize_treats_each_matrix_of_a_stack_by_itself():
    torch.manual_seed(0)
    stack = torch.randn(4, 6, 9)
    torch.testing.assert_close(orthogonalize(stack), torch.cat([orthogonalize(one[None]) for one in stack]))


def test_orthogonalize_of_zero_is_zero():
    assert (orthogonalize(torch.zeros(2, 4, 4)) == 0).all()


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
def test_muon_moves_like_torchs_own_if_it_orthogonalizes_by_products(shape, monkeypatch):
    """That one computes in bfloat16, so its updates are a little off."""
    monkeypatch.setattr(optimizer, "_by_inverse", optimizer._by_products)
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone())
    muon = Muon({"w": ours}, momentum=0.9, weight_decay=0.1)
    peer = torch.optim.Muon([theirs], lr=0.05, momentum=0.9, weight_decay=0.1, nesterov=True)
    for _ in range(6):
        gradient = torch.randn(shape)
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        muon.step(0.05)
        peer.step()
        moved, expected = (ours - start).flatten(), (theirs - start).flatten()
        assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.999
        assert float((moved - expected).detach().norm() / expected.detach().norm()) < 0.02


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_normuon_divides_each_row_by_the_root_of_its_moment_and_keeps_the_norm(shape):
    """Against float64, one row after another; the first gradients are zero, those of one row always."""
    torch.manual_seed(0)
    start, other = torch.randn(shape), torch.nn.Parameter(torch.randn(shape))
    ours = torch.nn.Parameter(start.clone())
    muon = Muon({"other": other, "w": ours}, momentum=0.9, weight_decay=0.2, beta2=0.7)
    expected, mean, moments = start.double(), torch.zeros(shape).double(), [0.0] * shape[0]
    for step in range(5):
        gradient = torch.randn(shape) * (step > 0)
        gradient[2] = 0
        ours.grad, other.grad = gradient.clone(), torch.randn(shape)
        muon.step(0.05)
        mean = 0.9 * mean + 0.1 * gradient.double()
        update = orthogonalize((0.1 * gradient.double() + 0.9 * mean)[None])[0]
        made = torch.zeros_like(update)
        for row in range(shape[0]):
            moments[row] = 0.7 * moments[row] + 0.3 * float((update[row] ** 2).mean())
            if moments[row]:
                made[row] = update[row] / moments[row] ** 0.5
        if step:
            made *= update.norm() / made.norm()
        expected = expected * (1 - 0.05 * 0.2) - 0.05 * max(1.0, shape[0] / shape[1]) ** 0.5 * made
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-5)
    assert muon.state()["w.row_moment"].flatten().tolist() == pytest.approx(moments, rel=1e-4)


@pytest.mark.parametrize("beta2", [0.0, 0.9])
def test_cautious_decay_is_of_the_weights_that_muons_update_brings_closer_to_zero(beta2):
    torch.manual_seed(0)
    start, gradient = torch.randn(6, 9), torch.randn(6, 9)
    moved = {}
    for decay in (0.0, 0.5):
        weight = torch.nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        Muon({"w": weight}, 0.9, decay, beta2=beta2, cautious=True).step(0.1, 0.8)
        moved[decay] = weight.detach()
    closer = (start - moved[0.0]) * start > 0
    assert 0 < int(closer.sum()) < closer.numel()
    torch.testing.assert_close(moved[0.0] - moved[0.5], 0.1 * 0.8 * 0.5 * start * closer)


def test_cautious_adamw_and_the_decay_of_the_embedding_are_those_of_a_loop_over_the_formula():
    """Chen et al. 2025, algorithm 1, with Adam's update, in float64."""
    model = tiny_model()
    decays = dict.fromkeys(("embedding.weight", "head.weight"), 0.4)
    decays |= {n: 0.3 for n, p in model.named_parameters() if n.startswith("blocks.") and p.ndim == 2}
    config = OptimizerConfig(
        optimizer="adamw",
        learning_rate=0.01,
        weight_decay=0.3,
        embedding_weight_decay=0.4,
        cautious_weight_decay=True,
        beta1=0.8,
        beta2=0.9,
    )
    found = Optimizer(model, config)
    expected = {n: p.detach().double() for n, p in model.named_parameters()}
    first = {n: torch.zeros_like(p) for n, p in expected.items()}
    second = {n: torch.zeros_like(p) for n, p in expected.items()}
    for step in range(4):
        give_gradients(model, step)
        for name, parameter in model.named_parameters():
            gradient, x = parameter.grad.double(), expected[name]
            first[name] = 0.8 * first[name] + 0.2 * gradient
            second[name] = 0.9 * second[name] + 0.1 * gradient**2
            mean, square = first[name] / (1 - 0.8 ** (step + 1)), second[name] / (1 - 0.9 ** (step + 1))
            update = mean / (square.sqrt() + 1e-8)
            expected[name] = x - 0.01 * (update + decays.get(name, 0.0) * 0.5 * x * (update * x > 0))
        found.step(1.0, 0.5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_embedding_decays_without_caution_as_torchs_adamw_does():
    ours, theirs = tiny_model(), tiny_model()
    optimizer = Optimizer(ours, OptimizerConfig(learning_rate=0.01, embedding_weight_decay=0.4, muon_learning_rate=0))
    peer = torch.optim.AdamW([theirs.embedding.weight], lr=0.01, betas=(0.9, 0.95), weight_decay=0.4)
    for step in range(3):
        for model in (ours, theirs):
            give_gradients(model, step)
        optimizer.step(1.0)
        peer.step()
    torch.testing.assert_close(ours.embedding.weight, theirs.embedding.weight, rtol=1e-5, atol=1e-7)


def test_momentum_rises_linearly_and_then_stays():
    config = OptimizerConfig(first_momentum=0.8, momentum=0.9, momentum_warmup=0.5)
    expected = [0.8, 0.82, 0.84, 0.86, 0.88, *[0.9] * 5]
    assert [momentum_at(step, 10, config) for step in range(10)] == pytest.approx(expected)
    assert {momentum_at(step, 10, OptimizerConfig(first_momentum=0.1)) for step in range(10)} == {0.95}


def test_a_step_uses_the_momentum_that_it_is_given():
    moved = []
    for of_settings, of_step in ((0.8, None), (0.95, 0.8)):
        model = tiny_model()
        optimizer = Optimizer(model, OptimizerConfig(momentum=of_settings))
        for step in range(2):
            give_gradients(model, step)
            optimizer.step(1.0, 1.0, of_step)
        moved.append(model)
    for a, b in zip(*(model.parameters() for model in moved), strict=True):
        assert torch.equal(a, b)


def test_muon_takes_matrices_of_different_shapes_each_by_its_own_gradient():
    torch.manual_seed(0)
    parameters = {
        name: torch.nn.Parameter(torch.randn(shape)) for name, shape in (("a", (4, 6)), ("b", (6, 4)), ("c", (4, 6)))
    }
    alone = {name: torch.nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
    for name in parameters:
        parameters[name].grad = torch.randn_like(parameters[name])
        alone[name].grad = parameters[name].grad.clone()
        Muon({name: alone[name]}, 0.9, 0.1).step(0.1)
    Muon(parameters, 0.9, 0.1).step(0.1)
    for name in parameters:
        torch.testing.assert_close(parameters[name], alone[name])


def tiny_model(seed: int = 0) -> Transformer:
    config = ModelConfig(num_layers=2, hidden_size=16, num_heads=2, vocab_size=11, tie_embeddings=False)
    model = Transformer(config).initialize(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.1)
    return model


def give_gradients(model: Transformer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_the_adamw_path_is_torchs_adamw_with_decay_on_the_blocks_matrices_only():
    ours, theirs = tiny_model(), tiny_model()
    config = OptimizerConfig(optimizer="adamw", learning_rate=0.01, weight_decay=0.3, beta1=0.8, beta2=0.9)
    optimizer = Optimizer(ours, config)
    named = dict(theirs.named_parameters())
    decayed = [p for n, p in named.items() if n.startswith("blocks.") and p.ndim == 2]
    others = [p for n, p in named.items() if not (n.startswith("blocks.") and p.ndim == 2)]
    peer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.3}, {"params": others, "weight_decay": 0.0}], lr=0.01, betas=(0.8, 0.9)
    )
    for step, factor in enumerate((0.5, 1.0, 0.25)):
        for model in (ours, theirs):
            give_gradients(model, step)
        for group in peer.param_groups:
            group["lr"] = 0.01 * factor
        optimizer.step(factor)
        peer.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_with_muon_the_blocks_matrices_are_muons_and_the_rest_adamws():
    model = tiny_model()
    optimizer = Optimizer(model, OptimizerConfig(muon_learning_rate=0.0, learning_rate=0.01))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give_gradients(model, 0)
    optimizer.step(1.0)
    for name, parameter in model.named_parameters():
        of_muon = name.startswith("blocks.") and parameter.ndim == 2
        assert torch.equal(parameter, before[name]) == of_muon
    optimizer = Optimizer(model, OptimizerConfig(muon_learning_rate=0.1, learning_rate=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step(1.0)
    for name, parameter in model.named_parameters():
        of_muon = name.startswith("blocks.") and parameter.ndim == 2
        assert torch.equal(parameter, before[name]) != of_muon


@pytest.mark.parametrize("changes", [{}, {"muon_beta2": 0.95, "cautious_weight_decay": True}, {"optimizer": "adamw"}])
def test_an_optimizer_restored_from_its_state_makes_the_same_next_steps(changes):
    config = OptimizerConfig(**changes)
    model, restored = tiny_model(), tiny_model()
    optimizer = Optimizer(model, config)
    for step in range(3):
        give_gradients(model, step)
        optimizer.step(1.0)
    state = {name: tensor.clone() for name, tensor in optimizer.state().items()}
    restored.load_state_dict(model.state_dict())
    again = Optimizer(restored, config)
    again.load_state(state)
    for step in range(3, 6):
        for each in (model, restored):
            give_gradients(each, step)
        optimizer.step(0.7)
        again.step(0.7)
    for a, b in zip(model.parameters(), restored.parameters(), strict=True):
        assert torch.equal(a, b)
    assert optimizer.state().keys() == again.state().keys()
    assert all(torch.equal(optimizer.state()[name], again.state()[name]) for name in state)


@pytest.mark.parametrize("changes", [{}, {"muon_beta2": 0.95, "cautious_weight_decay": True}, {"optimizer": "adamw"}])
def test_a_skip_on_the_device_leaves_every_bit_and_its_absence_changes_none(changes):
    models = tiny_model(), tiny_model()
    usual, deciding = (Optimizer(model, OptimizerConfig(**changes)) for model in models)

    def everything():
        found = [
            dict(model.named_parameters()) | each.state() for model, each in zip(models, (usual, deciding), strict=True)
        ]
        return [{name: tensor.clone() for name, tensor in each.items()} for each in found]

    for step in range(4):
        for model in models:
            give_gradients(model, step)
        usual.step(0.7, 1.0, 0.9)
        deciding.step(0.7, 1.0, 0.9, torch.tensor(False))
        ours, theirs = everything()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours | theirs)
        for number in (1.0, math.nan, math.inf):
            give_gradients(models[1], 10 + step)
            for parameter in models[1].parameters():
                parameter.grad.mul_(number)
            deciding.step(0.7, 1.0, 0.9, torch.tensor(True))
        after = everything()[1]
        assert all(torch.equal(theirs[name], after[name]) for name in theirs | after)


@given(st.floats(0.01, 100))
def test_clipping_brings_the_whole_gradient_down_to_its_limit_and_no_further(limit):
    model = tiny_model()
    give_gradients(model, 0)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    norm = Optimizer(model, OptimizerConfig(gradient_clip=limit)).clip()
    after = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert float(norm) == pytest.approx(float(before.norm()), rel=1e-5)
    torch.testing.assert_close(after, before * min(1.0, limit / float(before.norm())), rtol=1e-4, atol=1e-6)


def test_a_clip_of_zero_leaves_the_gradient_as_it_is():
    model = tiny_model()
    give_gradients(model, 0)
    before = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert float(Optimizer(model, OptimizerConfig(gradient_clip=0.0)).clip()) == pytest.approx(float(before.norm()))
    assert torch.equal(torch.cat([p.grad.flatten() for p in model.parameters()]), before)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_frozen_weights_stay_and_others_have_their_share_of_the_learning_rate(optimizer):
    config = OptimizerConfig(optimizer=optimizer, learning_rate=0.1, muon_learning_rate=0.1, weight_decay=0.5)
    names = ("frozen", "slow", "quick")
    model = nn.ModuleDict({"blocks": nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in names})})
    frozen = model["blocks"]["frozen"].requires_grad_(False).weight
    before = frozen.clone()
    found = Optimizer(model, config, lr_multipliers={"blocks.slow.weight": 0.25})
    for parameter in found.parameters.values():
        parameter.grad = torch.eye(3)
        parameter.data.zero_()
    found.step(1.0)
    assert torch.equal(frozen, before)
    assert not any("frozen" in name for name in found.state())
    slow, quick = (model["blocks"][name].weight for name in names[1:])
    torch.testing.assert_close(slow, quick / 4)
    assert float(quick.detach().abs().sum()) > 0.1
