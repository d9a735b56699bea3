from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lm.kernels import dispatch, rms_norm


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 7), (1, 1)])
def test_it_is_the_formula_and_its_gradient_is_right(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape[-1], dtype=torch.float64, requires_grad=True)
    expected = x / (x.square().mean(-1, keepdim=True) + 0.1).sqrt() * weight
    torch.testing.assert_close(rms_norm(x, weight, 0.1), expected)
    assert torch.autograd.gradcheck(lambda *inputs: rms_norm(*inputs, 0.1), (x, weight))


def test_in_float32_it_is_nearly_as_close_to_float64_as_pytorchs_own():
    torch.manual_seed(0)
    x, weight, direction = torch.randn(64, 300) * 30 + 5, torch.randn(300), torch.randn(64, 300)

    def results(f, dtype):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (x, weight)]
        out = f(*inputs)
        return out, *torch.autograd.grad(out, inputs, direction.to(dtype))

    def plain(x, weight):
        return F.rms_norm(x, weight.shape, weight, 1e-6)

    exact = results(plain, torch.float64)
    ours, theirs = results(lambda *inputs: rms_norm(*inputs, 1e-6), torch.float32), results(plain, torch.float32)
    for a, b, c in zip(ours, theirs, exact, strict=True):
        assert (a - c).abs().max() <= 3 * (b - c).abs().max()


def test_a_row_of_zeros_has_a_finite_gradient():
    x = torch.zeros(2, 8, requires_grad=True)
    rms_norm(x, torch.ones(8), 1e-6).sum().backward()
    assert x.grad.isfinite().all()


def test_16_bit_inputs_and_the_reference_use_pytorchs_own(monkeypatch):
    weight = torch.rand(8)
    x = torch.randn(2, 8)
    assert rms_norm(x.bfloat16(), weight, 1e-6).dtype == torch.bfloat16
    monkeypatch.setenv(dispatch.SETTING, "reference")
    assert torch.equal(rms_norm(x, weight, 1e-6), F.rms_norm(x, (8,), weight, 1e-6))
