"""The candidate attention kernels of ``benchmarks.gpu``, over drawn intervals. V5 runs on a Hopper GPU only."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.gpu.candidates import backward_triton, forward_triton
from benchmarks.gpu.candidates.plan import Plan, make_plan
from lm.kernels import dispatch, masks, reference
from lm.kernels.tile_sizes import TileSizes

DEVICE = torch.device("cpu" if dispatch.interpreted() else "cuda")
KINDS = ("causal", "packed", "window", "blind")
# Largest error of float32 and float16; those of float16 are roundings of the probabilities and the output.
TOLERANCES = {torch.float32: 1e-5, torch.float16: 1e-2}
SMALL = TileSizes(32, 16, 4, 1)  # so that short rows have empty, full and partial tiles

on_tma = pytest.mark.skipif(
    DEVICE.type == "cuda" and torch.cuda.get_device_capability()[0] < 9, reason="this GPU has no TMA"
)
pytestmark = [on_tma, pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")]
drawn = settings(
    max_examples=2, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
shapes = given(
    length=st.integers(33, 101),
    heads=st.sampled_from([(1, 1), (2, 1)]),
    width=st.sampled_from([16, 32]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)


def intervals(kind: str, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal and a bidirectional row; "blind": with padding, and queries between others that see nothing."""
    starts, bidirectional = torch.rand(2, length) < 0.05, torch.tensor([False, True])
    if kind == "causal":
        return masks.causal(2, length)
    if kind == "window":
        return masks.sliding_window(*masks.packed(starts, bidirectional), 21)
    if kind == "blind":
        lo, hi = masks.packed(starts, bidirectional, torch.tensor([length, length // 2]))
        seeing = torch.rand(2, length) < 0.8
        return lo * seeing, hi * seeing
    return masks.packed(starts, bidirectional)


def case(kind: str, length: int, heads: tuple[int, int], width: int, dtype: torch.dtype):
    """Inputs, their plan, the direction of the gradients, and the results of the reference in float64."""
    torch.manual_seed(length)
    lo, hi = (x.to(DEVICE) for x in intervals(kind, length))
    inputs = [torch.randn(2, length, count, width, device=DEVICE).to(dtype) for count in (heads[0], heads[1], heads[1])]
    exact = [x.double().requires_grad_() for x in inputs]
    out, lse = reference.attention(*exact, lo, hi, scale=0.3)
    direction = torch.randn_like(inputs[0])
    gradients = torch.autograd.grad(out, exact, direction.double())
    return inputs, make_plan(lo, hi, length), direction, out.detach(), lse, gradients


def check(found, expected, dtype: torch.dtype) -> None:
    for ours, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), exact.double(), rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", [*forward_triton.FORMS, "specialized"])
@drawn
@shapes
def test_each_forward_pass_equals_the_reference(form, kind, length, heads, width, dtype):
    inputs, plan, _, out, lse, _ = case(kind, length, heads, width, dtype)
    check(forward_triton.forward(*inputs, plan, 0.3, form, SMALL), (out, lse), dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", backward_triton.FORMS)
@drawn
@shapes
def test_each_backward_pass_equals_the_reference(form, kind, length, heads, width, dtype):
    inputs, plan, direction, out, lse, gradients = case(kind, length, heads, width, dtype)
    # A strip of 48 keys: several programs add up one gradient of the queries.
    found = backward_triton.backward(
        direction, *inputs, out.to(dtype), lse.float(), plan, 0.3, form, SMALL, TileSizes(16, 16, 4, 1), strip=48
    )
    check(found, gradients, dtype)


def test_the_single_pass_gives_the_same_bits_twice():
    inputs, plan, direction, out, lse, _ = case("packed", 90, (2, 1), 16, torch.float32)
    first, second = (
        backward_triton.backward(direction, *inputs, out.float(), lse.float(), plan, 0.3, "one_pass", SMALL, SMALL)
        for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("form", ["split", "specialized"])
def test_inputs_may_be_slices_of_one_tensor(form):
    (q, k, v), plan, _, out, lse, _ = case("packed", 50, (2, 2), 16, torch.float32)
    together = torch.cat((q, k, v), dim=2)
    check(forward_triton.forward(*together.chunk(3, dim=2), plan, 0.3, form, SMALL), (out, lse), torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_plan_equals_brute_force(kind):
    length, block_m, block_n = 75, 16, 8
    lo, hi = intervals(kind, length)
    plan = make_plan(lo, hi, length)
    visible = masks.dense(lo, hi, length)
    for row in range(2):
        for block, (first, count, left, right) in enumerate(plan.tiles(block_m, block_n)[row].tolist()):
            seen = visible[row, block * block_m : (block + 1) * block_m]
            assert not seen[:, :first].any()
            assert not seen[:, first + count * block_n :].any()
            assert seen[:, first + left * block_n : first + right * block_n].all()
            after = seen[:, first + left * block_n : first + count * block_n]
            assert (after[:, 1:] <= after[:, :-1]).all()  # only the upper bound matters
        seeing = visible[row].any(1)
        queries = torch.arange(length)
        for key in range(length):
            inside = (queries >= plan.query_lo[row, key]) & (queries < plan.query_hi[row, key])
            assert torch.equal(inside & seeing, visible[row, :, key])


def test_a_plan_refuses_bounds_that_decrease():
    lo, hi = torch.tensor([[0, 3, 1]], dtype=torch.int32), torch.tensor([[2, 4, 4]], dtype=torch.int32)
    with pytest.raises(ValueError, match="decreases along a row"):
        make_plan(lo, hi, 4)


@pytest.mark.skipif(
    DEVICE.type == "cpu" or torch.cuda.get_device_capability()[0] != 9, reason="Gluon's kernel runs on Hopper only"
)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [64, 128])
def test_gluons_forward_pass_equals_the_reference(kind, width):
    from benchmarks.gpu.candidates import forward_gluon

    inputs, plan, _, out, lse, _ = case(kind, 301, (4, 2), width, torch.float16)
    for ping_pong in (False, True):
        found = forward_gluon.forward(*inputs, plan, 0.3, 128, 2, ping_pong=ping_pong)
        check(found, (out, lse), torch.float16)


def test_a_plan_is_padded_so_that_no_load_needs_a_mask():
    plan = make_plan(*masks.causal(1, 5), 5)
    assert isinstance(plan, Plan)
    assert plan.lo.shape == plan.query_hi.shape == (1, 128)
    assert plan.hi[0].tolist() == [1, 2, 3, 4, 5, *[0] * 123]
    assert plan.query_lo[0, 5:].tolist() == plan.query_hi[0, 5:].tolist() == [5] * 123
