from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from lm import kernels
from lm.kernels import masks, reference

EPSILON = 1e-5


def attention_inputs(heads, key_heads, dtype=torch.float64, width=6, hidden=8, tokens=5):
    x = torch.randn(2, tokens, hidden, dtype=dtype, requires_grad=True)
    norm = torch.randn(hidden, dtype=dtype, requires_grad=True)
    shapes = [(n * width, hidden) for n in (heads, key_heads, key_heads)] + [(hidden, heads * width)]
    weights = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]
    angles = torch.randn(2, tokens, 1, width // 2, dtype=dtype)
    starts = torch.tensor([[True] + [False] * (tokens - 1), [True, False, True] + [False] * (tokens - 3)])
    return [x, norm, *weights], (angles.cos(), angles.sin()), masks.packed(starts, torch.tensor([False, True]))


def feed_forward_inputs(dtype=torch.float64, hidden=4, inner=6, tokens=3):
    shapes = ((2, tokens, hidden), (hidden,), (inner, hidden), (inner, hidden), (hidden, inner))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def attention(rotary, intervals):
    return lambda x, norm, *weights: kernels.attention_sublayer(x, norm, EPSILON, weights, rotary, intervals)


def separate_attention(rotary, intervals):
    def function(x, norm, query, key, value, output):
        heads = kernels.qkv_projection(kernels.rms_norm(x, norm, EPSILON), query, key, value, *rotary)
        return x + kernels.linear(kernels.attention(*heads, *intervals)[0].flatten(2), output)

    return function


def feed_forward(x, norm, *weights):
    return kernels.feed_forward_sublayer(x, norm, EPSILON, *weights)


def separate_feed_forward(x, norm, *weights):
    return x + kernels.swiglu(kernels.rms_norm(x, norm, EPSILON), *weights)


def results(function, arguments):
    """The output, and the gradients in some direction."""
    out = function(*arguments)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(0), dtype=out.dtype)
    return [out, *torch.autograd.grad(out, arguments, direction)]


def attention_formula(rotary, intervals):
    def formula(x, norm, query, key, value, output):
        normed, width = F.rms_norm(x, norm.shape, norm, EPSILON), 2 * rotary[0].shape[-1]
        q, k, v = (F.linear(normed, weight).unflatten(-1, (-1, width)) for weight in (query, key, value))
        q, k = (reference.rotary(part, *rotary) for part in (q, k))
        return x + F.linear(reference.attention(q, k, v, *intervals)[0].flatten(2), output)

    return formula


def feed_forward_formula(x, norm, *weights):
    return x + reference.swiglu(F.rms_norm(x, norm.shape, norm, EPSILON), *weights)


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (4, 2)])
def test_attention_is_the_formula(heads, key_heads):
    arguments, *where = attention_inputs(heads, key_heads)
    ours, expected = (results(function(*where), arguments) for function in (attention, attention_formula))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_of_attention_passes_gradcheck():
    arguments, rotary, intervals = attention_inputs(2, 1, width=4, hidden=3)
    assert torch.autograd.gradcheck(attention(rotary, intervals), arguments)


def test_the_feed_forward_is_the_formula_and_its_gradient_is_right():
    arguments = feed_forward_inputs()
    for a, b in zip(results(feed_forward, arguments), results(feed_forward_formula, arguments), strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradcheck(feed_forward, arguments)


def test_both_have_the_bits_of_the_separate_kernels():
    arguments, *where = attention_inputs(4, 2, torch.float32, width=32, hidden=64, tokens=40)
    cases = [(attention(*where), separate_attention(*where), arguments)]
    cases += [(feed_forward, separate_feed_forward, feed_forward_inputs(torch.float32, 64, 176, 40))]
    for together, separate, inputs in cases:
        assert all(map(torch.equal, results(together, inputs), results(separate, inputs)))


@pytest.mark.parametrize("half", ["attention", "feed-forward"])
def test_under_autocast_only_the_factors_of_products_are_rounded(bfloat16_products, half):
    """The errors are those of the formula in bfloat16, or smaller, since attention and sums stay in float32."""
    if half == "attention":
        arguments, *where = attention_inputs(4, 2, torch.float32, width=32, hidden=64, tokens=40)
        ours, formula = attention(*where), attention_formula(*where)
    else:
        arguments = feed_forward_inputs(torch.float32, 64, 176, 40)
        ours, formula = feed_forward, feed_forward_formula
    arguments[2:] = [(weight.detach() / weight.shape[1] ** 0.5).requires_grad_() for weight in arguments[2:]]
    exact = results(formula, arguments)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = [results(function, arguments) for function in (ours, formula)]
    for x, mine, theirs in zip(exact, *rounded, strict=True):
        assert mine.dtype == torch.float32
        assert 0 < (mine - x).norm() < 1.2 * (theirs - x).norm() < 0.02 * x.norm()
