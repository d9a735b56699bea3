from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.kernels import attention, decoding_triton, dispatch, masks, reference, tile_sizes

INTERPRETED = dispatch.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EXACT = torch.float64 if INTERPRETED else torch.float32
KINDS = ("causal", "full", "packed", "window", "padding", "prefix", "blind", "anything")

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")
drawn = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)


TILINGS = [(16, 16), (32, 16), (16, 32), *([] if INTERPRETED else [None])]
each_tiling = pytest.mark.parametrize("blocks", TILINGS, indirect=True)


@pytest.fixture(autouse=True)
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Small tiles, so that short rows have empty, full and partial ones; on a GPU also the table's sizes (None)."""
    chosen = getattr(request, "param", (32, 16))
    if chosen is not None:
        monkeypatch.setattr(tile_sizes, "choose", lambda *_: tile_sizes.TileSizes(*chosen, 4, 1))
    return chosen


def intervals(kind: str, rows: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random intervals of a kind; ``keys`` beyond ``queries`` are a cache of earlier keys."""
    starts = torch.rand(rows, queries) < 0.1
    bidirectional = torch.rand(rows) < 0.5
    past = keys - queries
    if kind == "causal":
        lo, hi = masks.causal(rows, queries, past=past)
    elif kind == "packed":
        lo, hi = masks.packed(starts, bidirectional)
        lo, hi = lo + past, hi + past
    elif kind == "window":
        lo, hi = masks.sliding_window(*masks.packed(starts, bidirectional), 7)
    elif kind == "padding":
        hi = torch.randint(0, keys + 1, (rows, 1)).expand(rows, queries)
        lo = torch.zeros_like(hi)
    elif kind == "prefix":
        lo, hi = masks.prefix(rows, queries, torch.randint(0, keys + 1, (rows,)))
    elif kind == "blind":
        lo, hi = masks.packed(starts, bidirectional)
        seen = torch.rand(rows, queries) < 0.7
        lo, hi = lo * seen, hi * seen
    elif kind == "anything":
        lo, hi = torch.randint(-3, keys + 3, (2, rows, queries))
    else:
        lo, hi = torch.zeros(rows, queries), torch.full((rows, queries), keys)
    return lo.int().to(DEVICE), hi.int().to(DEVICE)


def heads(rows, queries, keys, count, shared, width, dtype=EXACT):
    return [
        torch.randn(rows, length, number, width, dtype=torch.float64).to(dtype).to(DEVICE).requires_grad_()
        for length, number in ((queries, count), (keys, shared), (keys, shared))
    ]


def compare(inputs, lo, hi, *, tolerance=1e-5, **options):
    """Output, log-sum-exp and all gradients against the reference in float64."""
    out, lse = attention(*inputs, lo, hi, **options)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, expected_lse = reference.attention(*exact, lo, hi, **options)
    direction = torch.randn_like(out)
    gradients = torch.autograd.grad(out, inputs, direction)
    expected_gradients = torch.autograd.grad(expected, exact, direction.double())
    for ours, theirs in zip((out, lse, *gradients), (expected, expected_lse, *expected_gradients), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
    return out


SHAPES = st.tuples(
    st.integers(1, 2),
    st.integers(1, 40),
    st.integers(0, 20),
    st.sampled_from([(1, 1), (2, 2), (2, 1)]),
    st.sampled_from([4, 16, 24]),
)


@each_tiling
@pytest.mark.parametrize("kind", KINDS)
@settings(drawn, max_examples=3)
@given(
    shape=SHAPES,
    softcap=st.sampled_from([0.0, 2.0]),
    scale=st.sampled_from([None, 0.4]),
    dtype=st.sampled_from([EXACT, torch.float32]),
)
def test_attention_and_its_gradients_equal_the_reference(kind, dtype, shape, softcap, scale):
    rows, queries, past, (count, shared), width = shape
    torch.manual_seed(queries)
    inputs = heads(rows, queries, queries + past, count, shared, width, dtype)
    lo, hi = intervals(kind, rows, queries, queries + past)
    compare(inputs, lo, hi, softcap=softcap, scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["causal", "packed", "blind"])
def test_low_precision_errs_at_most_twice_as_much_as_pytorch(kind, dtype):
    rows, length, width = 1, 60, 32
    lo, hi = intervals(kind, rows, length, length)
    inputs = heads(rows, length, length, 2, 2, width, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected, _ = reference.attention(*exact, lo, hi)
    direction = torch.randn_like(expected).to(dtype)
    truth = (expected, *torch.autograd.grad(expected, exact, direction.double()))
    out, _ = attention(*inputs, lo, hi)
    ours = (out, *torch.autograd.grad(out, inputs, direction))
    seeing = (lo < hi)[..., None, None]
    visible = (masks.dense(lo, hi, length) | ~seeing[..., 0])[:, None]
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in inputs), attn_mask=visible).transpose(1, 2)
    out = torch.where(seeing, out, 0)
    theirs = (out, *torch.autograd.grad(out, inputs, direction))
    for exactly, mine, pytorchs in zip(truth, ours, theirs, strict=True):
        error, allowed = (mine.double() - exactly).abs().max(), (pytorchs.double() - exactly).abs().max()
        assert error <= 2 * allowed + 1e-6


@pytest.mark.parametrize("kind", ["packed", "anything"])
@pytest.mark.parametrize("softcap", [0.0, 1.5])
@pytest.mark.skipif(not INTERPRETED, reason="float64 kernels run in the interpreter only")
def test_gradients_pass_gradcheck(kind, softcap):
    inputs = heads(1, 6, 9, 2, 1, 4, torch.float64)
    lo, hi = intervals(kind, 1, 6, 9)
    assert torch.autograd.gradcheck(
        lambda q, k, v: attention(q, k, v, lo, hi, softcap=softcap)[0], inputs, fast_mode=True
    )


def test_the_operators_pass_opcheck():
    inputs = heads(2, 5, 7, 4, 2, 16, torch.float32)
    lo, hi = intervals("packed", 2, 5, 7)
    torch.library.opcheck(torch.ops.kindling.attention.default, (*inputs, lo, hi, 0.3, 1.0))
    q, k, v = (x.detach() for x in inputs)
    out, lse = torch.ops.kindling.attention(q, k, v, lo, hi, 0.3, 1.0)
    arguments = (torch.randn_like(out), q, k, v, out, lse, lo, hi, 0.3, 1.0)
    torch.library.opcheck(torch.ops.kindling.attention_backward.default, arguments)


@each_tiling
def test_packed_documents_equal_each_document_alone():
    lengths = [5, 40, 1, 17]
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    starts[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    q, k, v = heads(1, sum(lengths), sum(lengths), 2, 1, 16, torch.float32)
    for bidirectional in (False, True):
        lo, hi = masks.packed(starts, torch.tensor([bidirectional]))
        packed, _ = attention(q, k, v, lo.to(DEVICE), hi.to(DEVICE))
        first = 0
        for length in lengths:
            part = slice(first, first + length)
            alone = masks.bidirectional(1, length) if bidirectional else masks.causal(1, length)
            out, _ = attention(q[:, part], k[:, part], v[:, part], *(x.to(DEVICE) for x in alone))
            torch.testing.assert_close(packed[:, part], out, rtol=1e-5, atol=1e-5)
            first += length


def test_a_window_wider_than_the_row_is_no_window():
    inputs = heads(2, 40, 40, 2, 2, 16, torch.float32)
    lo, hi = intervals("causal", 2, 40, 40)
    wide = masks.sliding_window(lo, hi, 40)
    assert torch.equal(attention(*inputs, lo, hi)[0], attention(*inputs, *wide)[0])


def test_grouped_heads_equal_repeated_heads():
    q, k, v = heads(2, 35, 35, 6, 2, 16, torch.float32)
    lo, hi = intervals("packed", 2, 35, 35)
    repeated = [x.repeat_interleave(3, dim=2) for x in (k, v)]
    assert torch.equal(attention(q, k, v, lo, hi)[0], attention(q, *repeated, lo, hi)[0])


def test_a_causal_prefix_does_not_see_the_future():
    q, k, v = heads(1, 48, 48, 2, 2, 16, torch.float32)
    lo, hi = intervals("causal", 1, 48, 48)
    before, _ = attention(q, k, v, lo, hi)
    with torch.no_grad():
        k[:, 30:] += 1
        v[:, 30:] -= 1
    after, _ = attention(q, k, v, lo, hi)
    assert torch.equal(before[:, :30], after[:, :30])
    assert not torch.equal(before[:, 30:], after[:, 30:])


def test_a_hybrid_batch_equals_its_two_halves_bit_for_bit():
    inputs = heads(4, 40, 40, 2, 1, 16, torch.float32)
    lo, hi = masks.packed(torch.rand(4, 40) < 0.05, torch.tensor([False, False, True, True]))
    lo, hi = lo.to(DEVICE), hi.to(DEVICE)
    direction = torch.randn_like(inputs[0])
    out, _ = attention(*inputs, lo, hi)
    gradients = torch.autograd.grad(out, inputs, direction)
    for half in (slice(0, 2), slice(2, 4)):
        part = [x[half].detach().requires_grad_() for x in inputs]
        alone, _ = attention(*part, lo[half], hi[half])
        assert torch.equal(alone, out[half])
        for a, b in zip(torch.autograd.grad(alone, part, direction[half]), gradients, strict=True):
            assert torch.equal(a, b[half])


def test_the_same_inputs_give_the_same_bits():
    inputs = heads(2, 50, 50, 4, 2, 32, torch.float32)
    lo, hi = intervals("packed", 2, 50, 50)
    direction = torch.randn_like(inputs[0])
    first, second = (torch.autograd.grad(attention(*inputs, lo, hi)[0], inputs, direction) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_all_ones_average_the_values():
    q, k, v = (torch.ones_like(x) for x in heads(1, 48, 48, 2, 2, 16, torch.float32))
    out, lse = attention(q, k, v, *intervals("causal", 1, 48, 48))
    torch.testing.assert_close(out, v)
    counts = torch.arange(1, 49, device=DEVICE).float()
    torch.testing.assert_close(lse, (4 + counts.log()).expand_as(lse))


def test_scores_of_any_size_stay_finite():
    q, k, v = heads(1, 33, 33, 1, 1, 16, torch.float32)
    lo, hi = intervals("causal", 1, 33, 33)
    out, _ = attention(q * 1e3, k * 1e3, v, lo, hi)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert all(torch.isfinite(x).all() for x in (out, *gradients))


def test_any_strides_give_the_same():
    q, k, v = heads(2, 20, 26, 4, 2, 16, torch.float32)
    lo, hi = intervals("packed", 2, 20, 26)
    straight, _ = attention(q, k, v, lo, hi)
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(straight, attention(*turned, lo, hi)[0])
    apart = [torch.stack([x.detach(), x.detach()], dim=-1)[..., 0] for x in (q, k, v)]  # last stride 2
    spread = [x[:, :1].expand(2, 20) for x in (lo[:, :1], hi[:, :1])]  # last stride 0
    assert torch.equal(attention(q, k, v, *spread)[0], attention(*apart, *spread)[0])


@pytest.mark.parametrize("empty", ["rows", "queries", "keys"])
def test_empty_inputs_give_empty_or_zero_outputs(empty):
    rows, queries, keys = (0 if name == empty else 3 for name in ("rows", "queries", "keys"))
    inputs = heads(rows, queries, keys, 2, 1, 16, torch.float32)
    lo, hi = torch.zeros(2, rows, queries, dtype=torch.int32, device=DEVICE)
    out, lse = attention(*inputs, lo, hi)
    assert (out == 0).all()
    assert lse.isneginf().all()
    assert all((x == 0).all() for x in torch.autograd.grad(out.sum(), inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_query_ranges_equal_brute_force(kind):
    from lm.kernels import attention_triton

    queries, keys, size = 45, 60, 16
    lo, hi = (bound.contiguous() for bound in intervals(kind, 3, queries, keys))
    count = -(-keys // size)
    ranges = torch.empty(3, count, 4, dtype=torch.int32, device=DEVICE)
    attention_triton.attention_query_ranges[(3 * count,)](lo, hi, ranges, queries, keys, BLOCK_N=size, TOKENS=16)
    visible = masks.dense(lo, hi, keys).cpu()
    for row in range(3):
        for block in range(count):
            seen = visible[row, :, block * size : (block + 1) * size]
            some, full = seen.any(1).nonzero()[:, 0].tolist(), seen.all(1).nonzero()[:, 0].tolist()
            first, end, full_first, full_end = ranges[row, block].tolist()
            assert list(range(first, end)) == list(range(some[0], some[-1] + 1) if some else [])
            if full == list(range(full[0], full[-1] + 1) if full else []):
                assert list(range(full_first, full_end)) == full
            else:
                assert full_first == full_end


@settings(drawn, max_examples=8)
@given(
    queries=st.integers(1, 5),
    keys=st.integers(33, 130),
    counts=st.sampled_from([(1, 1), (4, 2), (3, 1)]),
    kind=st.sampled_from(["causal", "window", "blind", "anything", "full"]),
    softcap=st.sampled_from([0.0, 2.0]),
)
def test_decoding_equals_the_reference(monkeypatch, queries, keys, counts, kind, softcap):
    monkeypatch.setattr(decoding_triton, "KEYS_PER_PART", 32)
    monkeypatch.setattr(decoding_triton, "PARTS_AT_ONCE", 4)
    torch.manual_seed(keys)
    inputs = [x.detach() for x in heads(2, queries, keys, *counts, 24)]
    assert decoding_triton.serves(*inputs[:2])
    lo, hi = intervals(kind, 2, queries, keys)
    found = attention(*inputs, lo, hi, softcap=softcap)
    expected = reference.attention(*(x.double() for x in inputs), lo, hi, softcap=softcap)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


def test_decoding_a_row_does_not_depend_on_the_batch_or_the_size_of_the_cache(monkeypatch):
    monkeypatch.setattr(decoding_triton, "KEYS_PER_PART", 32)
    q, k, v = (x.detach() for x in heads(3, 1, 150, 4, 2, 16, torch.float32))
    lo = torch.tensor([[0], [9], [20]], dtype=torch.int32, device=DEVICE)
    hi = torch.tensor([[150], [80], [101]], dtype=torch.int32, device=DEVICE)
    together, _ = attention(q, k, v, lo, hi)
    for row in range(3):
        keys = int(hi[row, 0])
        alone = attention(q[row][None], k[row, :keys][None], v[row, :keys][None], lo[row][None], hi[row][None])[0]
        assert torch.equal(together[row], alone[0])
