from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lm.kernels import qkv_projection, reference


def inputs(heads, key_heads, width=6, dtype=torch.float64):
    x = torch.randn(2, 5, 8, dtype=dtype, requires_grad=True)
    weights = [torch.randn(n * width, 8, dtype=dtype, requires_grad=True) for n in (heads, key_heads, key_heads)]
    angles = torch.randn(2, 5, 1, width // 2, dtype=dtype)
    return [x, *weights], angles.cos(), angles.sin()


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2), (3, 1)])
def test_the_heads_are_those_of_the_formulas_with_interleaved_dimensions(heads, key_heads):
    arguments, cos, sin = inputs(heads, key_heads)
    x, *weights = arguments
    plain = [F.linear(x, weight).unflatten(-1, (-1, 6)) for weight in weights]
    plain[:2] = (reference.rotary(part, cos, sin)[..., [0, 3, 1, 4, 2, 5]] for part in plain[:2])
    ours = qkv_projection(*arguments, cos, sin)
    directions = [torch.randn_like(part) for part in plain]
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)
    gradients = (torch.autograd.grad(outputs, arguments, directions) for outputs in (ours, plain))
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_passes_gradcheck():
    arguments, cos, sin = inputs(2, 1, width=4)
    assert torch.autograd.gradcheck(lambda *parts: qkv_projection(*parts, cos, sin), arguments)
