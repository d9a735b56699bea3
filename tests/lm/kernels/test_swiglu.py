from __future__ import annotations

import sys

import torch

from lm.kernels import reference, swiglu


def inputs(tokens, dtype=torch.float64):
    shapes = ((2, tokens, 4), (6, 4), (6, 4), (4, 6))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def test_it_is_the_formula_and_its_gradient_is_right():
    arguments = inputs(3)
    torch.testing.assert_close(swiglu(*arguments), reference.swiglu(*arguments))
    assert torch.autograd.gradcheck(swiglu, arguments)


def test_the_same_inputs_give_the_same_bits():
    arguments = inputs(2000, torch.float32)
    first, again = (torch.autograd.grad(swiglu(*arguments).sum(), arguments) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_computing_results_again_gives_the_bits_of_keeping_them(monkeypatch):
    arguments = inputs(200, torch.float32)

    def results():
        out = swiglu(*arguments)
        return [out, *torch.autograd.grad(out.sum(), arguments)]

    kept = results()
    monkeypatch.setattr(sys.modules["lm.kernels.swiglu"], "KEPT", 0)
    assert all(map(torch.equal, kept, results()))
