"""The formulas of a decoding step without Triton; tests/triton compares the kernels with them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lm.kernels import few_rows_product, rotary, rotate_and_store


@pytest.mark.parametrize("activation", ["", "relu2", "swiglu"])
@pytest.mark.parametrize("normed", [False, True])
def test_a_product_is_that_of_pytorchs_operations(activation, normed):
    x, norm, weight, residual = (
        torch.randn(shape, dtype=torch.float64) for shape in ((3, 10), (10,), (12, 10), (3, 12))
    )
    read = F.rms_norm(x, (10,), norm, 1e-3) if normed else x
    expected = F.linear(read, weight)
    if activation == "swiglu":
        expected, residual = F.silu(expected[:, :6]) * expected[:, 6:], residual[:, :6].contiguous()
    elif activation == "relu2":
        expected = F.relu(expected).square()
    settings = {"norm": norm if normed else None, "epsilon": 1e-3, "activation": activation}
    torch.testing.assert_close(few_rows_product(x, weight, **settings), expected)
    before = residual.clone()
    assert few_rows_product(x, weight, residual=residual, **settings) is residual
    torch.testing.assert_close(residual, before + expected)


def test_a_product_of_bfloat16_is_summed_in_float32():
    """So that logits are not rounded: the same scores would otherwise be frequent."""
    x, weight = torch.randn(2, 64), torch.randn(5, 64).bfloat16()
    scores = few_rows_product(x, weight, dtype=torch.float32)
    torch.testing.assert_close(scores.double(), x.bfloat16().double() @ weight.double().T, rtol=1e-5, atol=1e-5)
    assert not torch.equal(scores, scores.bfloat16().float())
    assert few_rows_product(x, weight).dtype == torch.bfloat16


@pytest.mark.parametrize("qk_norm", [False, True])
def test_keys_and_values_go_to_the_slot_of_their_position_and_unused_rows_store_nothing(qk_norm):
    qkv, cache = torch.randn(3, 4 + 2 * 2, 6), torch.randn(2, 4, 2, 5, 6)
    norms = (torch.rand(6), torch.rand(6)) if qk_norm else None
    angles, before = torch.randn(3, 1, 3), cache.clone()
    turn = angles.cos()[:, None], angles.sin()[:, None]
    positions, hi = torch.tensor([[2, 9, 13], [3, 0, 5]], dtype=torch.int32)
    q = rotate_and_store(qkv, angles.cos(), angles.sin(), positions, hi, cache, norms, 1e-3)
    of_q, of_k = norms or (None, None)
    torch.testing.assert_close(q[:, None], rotary(qkv[:, None, :4], *turn, of_q, 1e-3))
    keys = rotary(qkv[:, None, 4:6], *turn, of_k, 1e-3)[:, 0]
    for row, slot in ((0, 2), (2, 3)):
        torch.testing.assert_close(cache[0, row, :, slot], keys[row])
        assert torch.equal(cache[1, row, :, slot], qkv[row, 6:])
    changed = (cache != before).any(0).any(1).any(-1)  # (rows, capacity)
    assert changed.nonzero().tolist() == [[0, 2], [2, 3]]
