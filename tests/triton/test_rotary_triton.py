from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.kernels import dispatch, reference, rotary, rotary_triton

INTERPRETED = dispatch.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EXACT = torch.float64 if INTERPRETED else torch.float32


@pytest.fixture(autouse=True)
def several_programs(monkeypatch):
    monkeypatch.setattr(rotary_triton, "HEADS_AT_ONCE", 16)


def inputs(rows=2, tokens=7, heads=3, width=16, dtype=EXACT):
    angles = torch.randn(rows, tokens, 1, width // 2, device=DEVICE)
    x = torch.randn(rows, tokens, heads, width, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
    weight = torch.rand(width, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()
    return x, angles.cos(), angles.sin(), weight


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 2),
    tokens=st.integers(1, 9),
    heads=st.integers(1, 3),
    width=st.sampled_from([2, 16, 24]),
    normed=st.booleans(),
    dtype=st.sampled_from([EXACT, torch.float32]),
)
def test_output_and_gradients_equal_the_reference(rows, tokens, heads, width, normed, dtype):
    torch.manual_seed(tokens)
    x, cos, sin, weight = inputs(rows, tokens, heads, width, dtype)
    given_weight = weight if normed else None
    out = rotary(x, cos, sin, given_weight, 1e-3)
    assert out.dtype == dtype
    exact, exact_weight = (tensor.detach().double().requires_grad_() for tensor in (x, weight))
    expected = reference.rotary(exact, cos, sin, exact_weight if normed else None, 1e-3)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    direction = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (x, weight) if normed else (x,), direction)
    wanted = torch.autograd.grad(expected, (exact, exact_weight) if normed else (exact,), direction.double())
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_errs_at_most_twice_as_much_as_pytorch(dtype):
    x, cos, sin, weight = inputs(2, 20, 4, 32, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = reference.rotary(exact[0], cos, sin, exact[1], 1e-6)
    direction = torch.randn_like(expected).to(dtype)
    truth = (expected, *torch.autograd.grad(expected, exact, direction.double()))
    results = []
    for compute in (rotary, reference.rotary):
        out = compute(x, cos, sin, weight, 1e-6)
        results.append((out, *torch.autograd.grad(out, (x, weight), direction)))
    for exactly, mine, pytorchs in zip(truth, *results, strict=True):
        error, allowed = (mine.double() - exactly).abs().max(), (pytorchs.double() - exactly).abs().max()
        assert error <= 2 * allowed + 1e-6


@pytest.mark.skipif(not INTERPRETED, reason="float64 kernels run in the interpreter only")
@pytest.mark.parametrize("normed", [False, True])
def test_gradients_pass_gradcheck(normed):
    x, cos, sin, weight = inputs(1, 3, 2, 4)
    if normed:
        assert torch.autograd.gradcheck(lambda x, w: rotary(x, cos, sin, w, 1e-2), (x, weight), fast_mode=True)
    else:
        assert torch.autograd.gradcheck(lambda x: rotary(x, cos, sin), (x,), fast_mode=True)


@pytest.mark.parametrize("normed", [False, True])
def test_the_operators_pass_opcheck(normed):
    x, cos, sin, weight = inputs(dtype=torch.float32)
    if not normed:
        weight = None
    torch.library.opcheck(torch.ops.kindling.rotary.default, (x, cos, sin, weight, 1e-6))


def test_any_strides_give_the_same():
    x, cos, sin, weight = inputs(dtype=torch.float32)
    turned = x.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(rotary(x, cos, sin, weight, 1e-6), rotary(turned, cos, sin, weight, 1e-6))
