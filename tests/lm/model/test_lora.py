from __future__ import annotations

import pytest
import torch

from lm.config.finetune_settings import LORA_MATRICES
from lm.model.lora import add_lora, merge_lora
from lm.model.transformer import Transformer
from lm.runs.checkpoint_writer import load_trained, trained_tensors


@pytest.fixture
def trunk(small) -> Transformer:
    return Transformer(small.replace(vocab_size=60).model).initialize(3)


def say(trunk: Transformer) -> torch.Tensor:
    inputs = torch.arange(8)[None]
    positions = torch.arange(8, dtype=torch.int32)[None]
    return trunk(inputs, positions, torch.zeros_like(positions), positions + 1)


def shaken(trunk: Transformer) -> Transformer:
    """Give the LoRA matrices random values, as after training."""
    generator = torch.Generator().manual_seed(0)
    for tensor in trained_tensors(trunk).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.1)
    return trunk


def test_it_initially_changes_nothing_and_only_its_matrices_are_trained(trunk):
    before = say(trunk)
    add_lora(trunk, 4, 16.0, LORA_MATRICES, 0)
    assert torch.equal(say(trunk), before)
    names = trained_tensors(trunk).keys()
    assert len(names) == 2 * len(LORA_MATRICES) * 2
    say(trunk).sum().backward()
    assert all(p.grad is None for p in trunk.parameters() if not p.requires_grad)


def test_a_matrix_is_w_plus_alpha_over_rank_b_a(trunk):
    linear = trunk.blocks[1].feed_forward.down
    plain = linear.weight.detach().clone()
    add_lora(trunk, 4, 6.0, ("down",), 0)
    shaken(trunk)
    added = linear.parametrizations.weight[0]
    torch.testing.assert_close(linear.weight, plain + 1.5 * added.b @ added.a)
    assert len(trained_tensors(trunk)) == 4


def test_merging_changes_no_bit_and_leaves_plain_matrices(trunk):
    names = trunk.state_dict().keys()
    add_lora(trunk, 3, 16.0, LORA_MATRICES, 1)
    before = say(shaken(trunk))
    merge_lora(trunk)
    assert torch.equal(say(trunk), before)
    assert trunk.state_dict().keys() == names


def test_its_matrices_are_drawn_from_the_seed_and_can_be_loaded_elsewhere(small, trunk):
    other = Transformer(small.replace(vocab_size=60).model).initialize(3)
    for model in (trunk, other):
        add_lora(model, 4, 16.0, ("query", "value"), 7)
    assert all(torch.equal(a, trained_tensors(other)[n]) for n, a in trained_tensors(trunk).items())
    shaken(trunk)
    load_trained(other, trained_tensors(trunk))
    assert torch.equal(say(other), say(trunk))
    with pytest.raises(RuntimeError, match="is only in one of them"):
        load_trained(other, {"blocks.0.attention.query.weight": torch.zeros(1)})


def test_a_block_without_a_gate_has_one_matrix_fewer(small):
    trunk = Transformer(small.replace(vocab_size=60, activation="relu2").model).initialize(0)
    add_lora(trunk, 2, 2.0, LORA_MATRICES, 0)
    assert len(trained_tensors(trunk)) == 2 * (len(LORA_MATRICES) - 1) * 2
