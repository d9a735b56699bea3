from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lm.kernels import attention_torch, masks, reference

KINDS = ["causal", "full", "packed", "window", "prefix", "padding", "blind", "wild"]
HEADS = st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)])
LENGTHS = st.integers(1, 70)
SEEDS = st.integers(0, 10**6)


@contextmanager
def costs(*, cut_often: bool) -> Iterator[None]:
    """With ``cut_often`` calls cost next to nothing, so that even small inputs are cut in many pieces."""
    with pytest.MonkeyPatch.context() as patch:
        if cut_often:
            for name, value in (("CALL_COST", 1e-3), ("BLOCK_COST", 0.0), ("TOKEN_COST_PER_WIDTH", 1e-6)):
                patch.setattr(attention_torch, name, value)
            patch.setattr(attention_torch, "LEAST_SAVING", 0.0)
            patch.setattr(attention_torch, "FINEST_GRAIN", 4)
            patch.setattr(attention_torch, "LARGEST_RESULT", 500)
        attention_torch.make_plan.cache_clear()
        yield
    attention_torch.make_plan.cache_clear()


def intervals(kind: str, rows: int, queries: int, keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random intervals; those made by ``masks`` are clamped or moved where queries and keys differ."""
    starts, bidirectional = torch.rand(rows, queries) < 0.1, torch.rand(rows) < 0.5
    if kind == "wild":
        lo, hi = torch.randint(-5, keys + 5, (2, rows, queries), dtype=torch.int32)
        return lo, hi
    if kind == "causal":
        return masks.causal(rows, queries, past=max(0, keys - queries))
    if kind == "full":
        return masks.bidirectional(rows, queries)
    if kind == "prefix":
        return masks.prefix(rows, queries, torch.randint(0, queries + 1, (rows,)))
    if kind == "padding":
        hi = torch.randint(0, queries + 1, (rows, 1), dtype=torch.int32).expand(rows, queries)
        return torch.zeros_like(hi), hi
    lo, hi = masks.packed(starts, bidirectional)
    if kind == "window":
        return masks.sliding_window(lo, hi, int(torch.randint(1, 20, ())))
    if kind == "blind":
        hidden = torch.rand(rows, queries) < 0.2
        hidden[:, queries // 3 : queries // 2] = True
        return lo.masked_fill(hidden, 0), hi.masked_fill(hidden, 0)
    return lo, hi


def tensors(rows, queries, keys, heads, width, dtype=torch.float64, strided=False):
    """q, k, v and the output's gradient; ``strided``: views of one tensor, as from a fused projection."""
    count, other = heads
    if not strided:
        shapes = [(queries, count), (keys, other), (keys, other), (queries, count)]
        return [torch.randn(rows, length, number, width, dtype=dtype) for length, number in shapes]
    fused = torch.randn(rows, max(queries, keys) + 3, count + 2 * other, width + 5, dtype=dtype)[..., 2 : width + 2]
    q, k, v = fused.split([count, other, other], dim=2)
    grad_out = torch.randn(rows, count, queries, width, dtype=dtype).transpose(1, 2)
    return q[:, 1 : queries + 1], k[:, :keys], v[:, 2 : keys + 2], grad_out


def ours(q, k, v, grad_out, lo, hi, scale=0.3, softcap=0.0):
    out, lse = attention_torch.forward(q, k, v, lo, hi, scale, softcap)
    return out, lse, *attention_torch.backward(grad_out, q, k, v, out, lse, lo, hi, scale, softcap)


def expected(q, k, v, grad_out, lo, hi, scale=0.3, softcap=0.0):
    q, k, v = (x.detach().double().requires_grad_() for x in (q, k, v))
    out, lse = reference.attention(q, k, v, lo, hi, scale=scale, softcap=softcap)
    return out.detach(), lse, *torch.autograd.grad(out, (q, k, v), grad_out.double())


@given(
    st.sampled_from(KINDS), st.integers(1, 4), LENGTHS, LENGTHS, HEADS, st.sampled_from([0.0, 2.0]),
    st.booleans(), st.booleans(), SEEDS,
)  # fmt: skip
def test_results_and_gradients_equal_the_reference(kind, rows, queries, keys, heads, softcap, cut_often, strided, seed):
    torch.manual_seed(seed)
    inputs = tensors(rows, queries, keys, heads, 4, strided=strided)
    lo, hi = intervals(kind, rows, queries, keys)
    with costs(cut_often=cut_often):
        results = ours(*inputs, lo, hi, softcap=softcap)
    for result, exact in zip(results, expected(*inputs, lo, hi, softcap=softcap), strict=True):
        torch.testing.assert_close(result, exact, rtol=1e-9, atol=1e-9)
        assert result.is_contiguous()


@given(st.sampled_from(KINDS), LENGTHS, st.booleans(), st.sampled_from([0.0, 2.0]), SEEDS)
def test_float32_is_as_close_to_float64_as_its_precision_allows(kind, length, cut_often, softcap, seed):
    torch.manual_seed(seed)
    inputs = tensors(2, length, length, (4, 2), 8, torch.float32)
    lo, hi = intervals(kind, 2, length, length)
    with costs(cut_often=cut_often):
        results = ours(*inputs, lo, hi, softcap=softcap)
    for result, exact in zip(results, expected(*inputs, lo, hi, softcap=softcap), strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), exact.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("kind", ["causal", "packed", "window"])
def test_half_precision_errs_at_most_twice_as_much_as_pytorch(kind, softcap, dtype):
    torch.manual_seed(0)
    inputs = tensors(3, 90, 90, (4, 2), 16, dtype)
    lo, hi = intervals(kind, 3, 90, 90)
    with costs(cut_often=True):
        out, _, *gradients = ours(*inputs, lo, hi, softcap=softcap)
    exact_out, _, *exact_gradients = expected(*inputs, lo, hi, softcap=softcap)
    # PyTorch has no softcap: without it, the same sizes and the same rounding.
    plain_out, _, *plain_gradients = expected(*inputs, lo, hi)
    q, k, v = (x.detach().requires_grad_() for x in inputs[:3])
    theirs = F.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), masks.dense(lo, hi, 90)[:, None], scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    their_gradients = torch.autograd.grad(theirs, (q, k, v), inputs[3])
    for result, exact, their, plain in zip(
        (out, *gradients), (exact_out, *exact_gradients), (theirs, *their_gradients), (plain_out, *plain_gradients),
        strict=True,
    ):  # fmt: skip
        assert result.dtype == dtype
        assert (result.double() - exact).norm() <= 2 * (their.double() - plain).norm()


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.booleans(), st.booleans())
def test_packed_documents_equal_each_document_alone(lengths, bidirectional, cut_often):
    total = sum(lengths)
    torch.manual_seed(total)
    starts = torch.zeros(1, total, dtype=torch.bool)
    starts[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    inputs = tensors(1, total, total, (2, 1), 4)
    with costs(cut_often=cut_often):
        packed = ours(*inputs, *masks.packed(starts, torch.tensor([bidirectional])))
        first = 0
        for length in lengths:
            part = slice(first, first + length)
            alone = masks.bidirectional(1, length) if bidirectional else masks.causal(1, length)
            results = ours(*(x[:, part] for x in inputs), *alone)
            for whole, single in zip((packed[0], *packed[2:]), (results[0], *results[2:]), strict=True):
                torch.testing.assert_close(whole[:, part], single)
            torch.testing.assert_close(packed[1][..., part], results[1])
            first += length


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_queries_that_see_nothing_give_zeros_and_no_gradient_even_for_huge_numbers(softcap):
    torch.manual_seed(0)
    inputs = tensors(2, 40, 40, (2, 1), 4, torch.float32)
    lo, hi = masks.causal(2, 40)
    hi = hi.clone()
    hi[0], hi[1, 7:19], hi[1, 30] = 0, 0, -3
    inputs[0][0], inputs[3][0] = 1e20, 1e20
    blind = hi <= 0
    for cut_often in (False, True):
        with costs(cut_often=cut_often):
            out, lse, *gradients = ours(*inputs, lo, hi, softcap=softcap)
        assert (out[blind] == 0).all()
        assert torch.equal(lse.isneginf(), blind[:, None].expand_as(lse))
        assert (gradients[0][blind] == 0).all()
        for gradient in gradients:
            assert (gradient[0] == 0).all()
            assert gradient.isfinite().all()


def test_no_queries_or_no_keys_give_zeros():
    for queries, keys in ((0, 3), (3, 0)):
        q, k, v, grad_out = tensors(2, queries, keys, (2, 1), 4)
        some = torch.zeros(2, queries, dtype=torch.int32)
        out, _, *gradients = ours(q, k, v, grad_out, some, some + 5)
        assert out.shape == q.shape
        for result in (out, *gradients):
            assert (result == 0).all()


def test_an_expanded_gradient_is_accepted():
    torch.manual_seed(0)
    q, k, v, grad_out = tensors(2, 33, 33, (2, 2), 4)
    lo, hi = masks.causal(2, 33)
    grad_out = torch.ones((), dtype=torch.float64).expand_as(grad_out)
    for result, exact in zip(ours(q, k, v, grad_out, lo, hi), expected(q, k, v, grad_out, lo, hi), strict=True):
        torch.testing.assert_close(result, exact)


def test_the_same_inputs_give_the_same_bits():
    torch.manual_seed(0)
    inputs = tensors(4, 512, 512, (4, 2), 16, torch.float32)
    lo, hi = masks.packed(torch.rand(4, 512) < 1 / 100, torch.tensor([True, False, False, True]))
    once = ours(*inputs, lo, hi)
    attention_torch.make_plan.cache_clear()
    for first, second in zip(once, ours(*inputs, lo, hi), strict=True):
        assert torch.equal(first, second)


def plan(lo: torch.Tensor, hi: torch.Tensor, keys: int, heads: tuple[int, int] = (8, 8), width: int = 32):
    rows, queries = lo.shape
    q, k = torch.empty(rows, queries, heads[0], width), torch.empty(rows, keys, heads[1], width)
    return attention_torch.plan_for(q, k, lo, hi)


def visible(piece: attention_torch.Piece) -> torch.Tensor:
    """What the queries of a piece see according to it, bool (rows, queries, keys)."""
    queries, keys = piece.queries[1] - piece.queries[0], piece.keys[1] - piece.keys[0]
    seen = torch.ones(len(piece.rows), queries, keys, dtype=torch.bool)
    if piece.bias is not None:
        assert set(piece.bias.unique().tolist()) <= {0.0, -math.inf}
        assert piece.bias.shape == (piece.bias.shape[0], 1, queries, keys)
        assert piece.bias.shape[0] in (1, len(piece.rows))
        seen &= piece.bias[:, 0] == 0
    return seen.tril() if piece.causal_flag else seen


@given(st.sampled_from(KINDS), st.integers(1, 5), LENGTHS, LENGTHS, st.booleans(), SEEDS)
def test_pieces_cover_every_visible_pair_once_and_no_other(kind, rows, queries, keys, cut_often, seed):
    torch.manual_seed(seed)
    lo, hi = intervals(kind, rows, queries, keys)
    with costs(cut_often=cut_often):
        made = plan(lo, hi, keys)
    times = torch.zeros(rows, queries, keys, dtype=torch.int32)
    written = torch.zeros(rows, keys, dtype=torch.bool)
    for piece in made.pieces:
        assert 0 <= piece.queries[0] < piece.queries[1] <= queries
        assert 0 <= piece.keys[0] < piece.keys[1] <= keys
        row = torch.tensor(list(piece.rows))
        times[row[:, None, None], torch.arange(*piece.queries)[:, None], torch.arange(*piece.keys)] += visible(piece)
        cells = row[:, None], torch.arange(*piece.keys)
        if piece.first_on_keys:
            assert not written[cells].any()
            written[cells] = True
    assert torch.equal(times, masks.dense(lo, hi, keys).int())
    blind = (lo.clamp(min=0) >= hi.clamp(max=keys))[:, None]
    assert torch.equal(blind, made.blind) if made.blind is not None else not blind.any()
    # Later pieces add to the first's result; if any key is not written first, everything starts from zero.
    assert made.all_keys == bool(written.all())


def test_a_long_causal_batch_is_cut_into_blocks_with_the_keys_up_to_them():
    made = plan(*masks.causal(8, 512), 512)
    assert len({piece.queries for piece in made.pieces}) > 2
    assert {piece.kind for piece in made.pieces} == {"causal"}
    assert all(piece.keys == (0, piece.queries[1]) for piece in made.pieces)
    assert max(len(piece.rows) for piece in made.pieces) > 1
    # The block with all keys comes first and writes their gradients; the others add to it.
    assert [piece.first_on_keys for piece in made.pieces] == [piece.keys == (0, 512) for piece in made.pieces]
    strips = {piece.bias.untyped_storage().data_ptr() for piece in made.pieces if piece.bias is not None}
    assert len(strips) < sum(piece.bias is not None for piece in made.pieces)


def test_short_or_full_batches_are_one_call():
    for rows, length, causal in ((32, 128, True), (8, 64, True), (8, 512, False), (1, 1, True)):
        made = plan(*(masks.causal if causal else masks.bidirectional)(rows, length), length)
        assert made.is_one_call
        assert made.pieces[0].bias is None
    starts = torch.arange(128) == torch.arange(10, 106, 3)[:, None]
    assert plan(*masks.packed(starts, torch.arange(32) < 16), 128).is_one_call


def test_long_documents_are_separated_at_their_boundaries():
    starts = torch.zeros(1, 1000, dtype=torch.bool).index_fill(1, torch.tensor([391, 700]), True)
    made = plan(*masks.packed(starts, torch.tensor([True])), 1000)
    assert [piece.queries for piece in made.pieces] == [(700, 1000), (391, 700), (0, 391)]
    assert [piece.keys for piece in made.pieces] == [piece.queries for piece in made.pieces]
    assert {piece.kind for piece in made.pieces} == {"full"}


def test_tiny_documents_share_a_masked_piece():
    starts = torch.arange(512)[None] % 8 == 0
    made = plan(*masks.packed(starts, torch.tensor([False])), 512)
    assert all(piece.queries[1] - piece.queries[0] >= 32 for piece in made.pieces)
    assert {piece.kind for piece in made.pieces} == {"masked"}


@pytest.mark.parametrize("bidirectional", [[1, 1, 1, 1, 0, 0, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0]])
def test_rows_with_equal_masks_share_calls_wherever_they_are(bidirectional):
    both = torch.tensor(bidirectional, dtype=torch.bool)
    made = plan(*masks.packed(torch.zeros(8, 512, dtype=torch.bool), both), 512)
    full = [list(piece.rows) for piece in made.pieces if piece.kind == "full" and piece.queries == (0, 512)]
    assert full == [both.nonzero()[:, 0].tolist()]
    assert all(not both[list(piece.rows)].any() for piece in made.pieces if piece.kind == "causal")


def test_a_plan_is_shared_by_all_equal_intervals_and_by_no_others():
    attention_torch.make_plan.cache_clear()
    lo, hi = masks.causal(2, 40)
    made = plan(lo, hi, 40)
    assert plan(lo.clone(), hi.clone(), 40) is made
    assert plan(lo.long(), hi.long(), 40) is made
    other = hi.clone()
    other[1, 3] -= 1
    assert plan(lo, other, 40) is not made
    assert plan(lo, hi, 41) is not made
    assert plan(lo, hi, 40, heads=(8, 4)) is not made


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple) else (results,):
            if isinstance(result, torch.Tensor):
                self.elements = max(self.elements, result.numel())
        return results


def test_packed_rows_never_make_a_mask_of_the_whole():
    torch.manual_seed(0)
    starts = torch.arange(2048).expand(2, 2048) % 100 == 0
    lo, hi = masks.packed(starts, torch.tensor([False, True]))
    inputs = tensors(2, 2048, 2048, (2, 2), 8, torch.float32)
    attention_torch.make_plan.cache_clear()
    attention_torch._strip.cache_clear()
    with LargestTensor() as largest:
        ours(*inputs, lo, hi)
    assert largest.elements < 2048 * 2048 // 8


def test_a_generated_token_is_one_call_over_what_it_sees(monkeypatch):
    monkeypatch.setattr(attention_torch, "_cut", None)  # it must not be called, since nothing can be cut
    q, k = torch.zeros(3, 1, 2, 4), torch.zeros(3, 40, 2, 4)
    plan = attention_torch.plan_for(q, k, *masks.causal(3, 1, past=39))
    assert plan.is_one_call
    windowed = attention_torch.plan_for(q, k, *masks.sliding_window(*masks.causal(3, 1, past=39), 8, past=39))
    assert [(piece.keys, piece.kind) for piece in windowed.pieces] == [((32, 40), "full")]
    assert not windowed.is_one_call
