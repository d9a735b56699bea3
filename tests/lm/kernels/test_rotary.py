from __future__ import annotations

import numpy as np
import pytest
import torch

from lm.kernels import dispatch, rotary


def inputs(dtype=torch.float64):
    angles = torch.randn(2, 5, 1, 3, dtype=dtype)
    return torch.randn(2, 5, 4, 6, dtype=dtype, requires_grad=True), angles, torch.rand(6, dtype=dtype)


@pytest.mark.parametrize("normed", [False, True])
def test_it_is_multiplication_by_a_unit_complex_number(normed):
    x, angles, weight = inputs()
    heads = x.detach().numpy()
    if normed:
        heads = heads / np.sqrt((heads**2).mean(-1, keepdims=True) + 0.1) * weight.numpy()
    turned = (heads[..., :3] + 1j * heads[..., 3:]) * np.exp(1j * angles.numpy())
    out = rotary(x, angles.cos(), angles.sin(), weight if normed else None, 0.1)
    np.testing.assert_allclose(out.detach().numpy(), np.concatenate([turned.real, turned.imag], -1), rtol=1e-10)


@pytest.mark.parametrize("normed", [False, True])
def test_the_operator_without_triton_is_the_same(monkeypatch, normed):
    """The case of a GPU that is too old for the kernels, tested on a CPU."""
    x, angles, weight = inputs()
    weight.requires_grad_(normed)
    arguments = (x, angles.cos(), angles.sin(), weight if normed else None, 1e-6)
    wanted = (x, weight) if normed else (x,)
    plain = rotary(*arguments)
    direction = torch.randn_like(plain)
    expected = torch.autograd.grad(plain, wanted, direction)
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    operator = rotary(*arguments)
    assert "kindling" in operator.grad_fn.name().lower()
    assert torch.equal(operator, plain)
    for a, b in zip(torch.autograd.grad(operator, wanted, direction), expected, strict=True):
        torch.testing.assert_close(a, b)
    torch.library.opcheck(torch.ops.kindling.rotary.default, arguments)
