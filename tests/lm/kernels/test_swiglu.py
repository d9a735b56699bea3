from __future__ import annotations

from importlib import import_module

import pytest
import torch

from lm.kernels import reference, swiglu

module = import_module("lm.kernels.swiglu")  # its function has the same name


def inputs(tokens, dtype=torch.float64):
    shapes = ((2, tokens, 4), (6, 4), (6, 4), (4, 6))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("rows", [2, 3, 100])
def test_the_rows_may_be_taken_a_few_at_a_time(monkeypatch, rows):
    monkeypatch.setattr(module, "ROWS", rows)
    arguments = inputs(4)
    expected = reference.swiglu(*arguments)
    out = swiglu(*arguments)
    torch.testing.assert_close(out, expected)
    direction = torch.randn_like(out)
    gradients = (torch.autograd.grad(result, arguments, direction) for result in (out, expected))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_its_gradient_passes_gradcheck(monkeypatch):
    monkeypatch.setattr(module, "ROWS", 3)
    assert torch.autograd.gradcheck(swiglu, inputs(2))


def test_the_same_inputs_give_the_same_bits():
    arguments = inputs(2000, torch.float32)
    first, again = (torch.autograd.grad(swiglu(*arguments).sum(), arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
