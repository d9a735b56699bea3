from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lm import kernels, masks
from lm.kernels import cross_entropy, reference

SHAPES = st.tuples(
    *(st.integers(1, 3), st.integers(1, 9), st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]), st.sampled_from([2, 4]))
)


def random_mask(kind: str, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    starts = torch.rand(rows, length) < 0.3
    if kind == "packed":
        return masks.packed(starts, torch.rand(rows) < 0.5)
    if kind == "window":
        return masks.sliding_window(*masks.packed(starts, torch.rand(rows) < 0.5), 2)
    if kind == "padding":
        return masks.padding(length, torch.randint(0, length + 1, (rows,)))
    if kind == "prefix":
        return masks.prefix(rows, length, torch.randint(0, length + 1, (rows,)))
    return masks.causal(rows, length) if kind == "causal" else masks.bidirectional(rows, length)


def random_heads(rows: int, queries: int, keys: int, heads: tuple[int, int], width: int, dtype=torch.float64):
    return [
        torch.randn(rows, length, count, width, dtype=dtype, requires_grad=True)
        for length, count in ((queries, heads[0]), (keys, heads[1]), (keys, heads[1]))
    ]


def dense_attention(q, k, v, visible):
    """Softmax attention written once more, one query at a time."""
    out = torch.zeros_like(q)
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            other = head // (q.shape[2] // k.shape[2])
            for i in range(q.shape[1]):
                seen = visible[row, i]
                if seen.any():
                    scores = k[row, seen, other] @ q[row, i, head] / q.shape[-1] ** 0.5
                    out[row, i, head] = scores.softmax(0) @ v[row, seen, other]
    return out


@given(SHAPES, st.sampled_from(["causal", "full", "packed", "window", "padding", "prefix"]), st.integers(0, 99))
def test_attention_equals_the_reference_forward_and_backward(shape, kind, seed):
    rows, length, heads, width = shape
    torch.manual_seed(seed)
    lo, hi = random_mask(kind, rows, length)
    inputs = random_heads(rows, length, length, heads, width)
    ours = kernels.attend(*inputs, kernels.plan(lo, hi, length))
    theirs, lse = reference.attention(*inputs, lo, hi)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, inputs, direction), torch.autograd.grad(theirs, inputs, direction), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(theirs, dense_attention(*inputs, masks.dense(lo, hi, length)), rtol=1e-10, atol=1e-10)
    assert lse.isneginf().any() == (lo >= hi).any()


@given(st.integers(1, 4), st.integers(0, 6), st.sampled_from([1, 3, 100]))
def test_attention_over_a_cache_equals_the_reference(queries, past, window):
    torch.manual_seed(queries)
    keys = past + queries
    lo, hi = masks.sliding_window(*masks.causal(2, queries, past=past), window, past=past)
    q, k, v = random_heads(2, queries, keys, (4, 2), 4)
    torch.testing.assert_close(
        kernels.attend(q, k, v, kernels.plan(lo, hi, keys)), reference.attention(q, k, v, lo, hi)[0]
    )


def test_softcap_and_scale_of_the_reference_act_on_the_scores():
    torch.manual_seed(0)
    q, k, v = random_heads(1, 3, 3, (1, 1), 4)
    lo, hi = masks.bidirectional(1, 3)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.7
    expected = torch.einsum("bhqk,bkhd->bqhd", (2 * torch.tanh(scores / 2)).softmax(-1), v)
    torch.testing.assert_close(reference.attention(q, k, v, lo, hi, scale=0.7, softcap=2.0)[0], expected)


def test_no_dense_mask_is_made_for_causal_or_full_batches():
    assert kernels.plan(*masks.causal(3, 7), 7) == kernels.AttentionPlan("causal")
    assert kernels.plan(*masks.bidirectional(3, 7), 7) == kernels.AttentionPlan("full")
    assert kernels.plan(*masks.causal(3, 1, past=6), 7).kind == "full"
    starts = torch.zeros(2, 7, dtype=torch.bool)
    assert kernels.plan(*masks.packed(starts, torch.tensor([False, False])), 7).kind == "causal"


def test_a_dense_mask_is_made_for_everything_else():
    starts = torch.zeros(2, 7, dtype=torch.bool)
    for lo, hi in (
        masks.packed(starts, torch.tensor([False, True])),
        masks.packed(starts.index_fill(1, torch.tensor([3]), True), torch.tensor([False, False])),
        masks.causal(2, 7, past=1),
        masks.prefix(2, 7, torch.tensor([0, 3])),
    ):
        plan = kernels.plan(lo, hi, int(hi.max()))
        assert plan.kind == "mask"
        assert plan.seeing is None
        assert torch.equal(plan.visible[:, 0], masks.dense(lo, hi, int(hi.max())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_queries_that_see_nothing_give_zeros_and_zero_gradients(dtype):
    torch.manual_seed(0)
    lo, hi = masks.padding(5, torch.tensor([0, 3]))
    hi = hi.clone()
    hi[1, 4] = 0
    q, k, v = random_heads(2, 5, 5, (2, 1), 4, dtype)
    out = kernels.attend(q, k, v, kernels.plan(lo, hi, 5))
    assert (out[0] == 0).all()
    assert (out[1, 4] == 0).all()
    assert (out[1, :4] != 0).all()
    out.square().sum().backward()
    for tensor in (q, k, v):
        assert torch.isfinite(tensor.grad).all()
        assert (tensor.grad[0] == 0).all()
    assert (q.grad[1, 4] == 0).all()
    assert (v.grad[1, :3] != 0).any()


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_packed_documents_equal_each_document_alone(lengths, both_ways):
    torch.manual_seed(sum(lengths))
    total = sum(lengths)
    starts = torch.zeros(1, total, dtype=torch.bool)
    starts[0, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    q, k, v = random_heads(1, total, total, (2, 1), 4)
    packed = kernels.attend(q, k, v, kernels.plan(*masks.packed(starts, torch.tensor([both_ways])), total))
    first = 0
    for length in lengths:
        part = slice(first, first + length)
        alone = masks.bidirectional(1, length) if both_ways else masks.causal(1, length)
        out = kernels.attend(q[:, part], k[:, part], v[:, part], kernels.plan(*alone, length))
        torch.testing.assert_close(packed[:, part], out)
        first += length


def test_causal_outputs_do_not_depend_on_the_future():
    torch.manual_seed(0)
    q, k, v = random_heads(1, 8, 8, (2, 2), 4)
    plan = kernels.plan(*masks.causal(1, 8), 8)
    before = kernels.attend(q, k, v, plan)
    with torch.no_grad():
        k[:, 5:] += 1
        v[:, 5:] -= 1
    after = kernels.attend(q, k, v, plan)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.equal(before[:, 5:], after[:, 5:])


def test_a_hybrid_batch_equals_its_causal_and_its_bidirectional_half():
    torch.manual_seed(0)
    starts = torch.rand(4, 9) < 0.2
    both_ways = torch.tensor([False, False, True, True])
    q, k, v = random_heads(4, 9, 9, (4, 2), 4)
    whole = kernels.attend(q, k, v, kernels.plan(*masks.packed(starts, both_ways), 9))
    for half in (slice(0, 2), slice(2, 4)):
        plan = kernels.plan(*masks.packed(starts[half], both_ways[half]), 9)
        torch.testing.assert_close(whole[half], kernels.attend(q[half], k[half], v[half], plan))


def head_inputs(tokens: int = 11, hidden: int = 5, vocabulary: int = 7, dtype=torch.float64, seed: int = 0):
    torch.manual_seed(seed)
    return (
        torch.randn(tokens, hidden, dtype=dtype, requires_grad=True),
        torch.randn(vocabulary, hidden, dtype=dtype, requires_grad=True),
        torch.randint(0, vocabulary, (tokens,)),
    )


@given(
    st.integers(1, 20),
    st.sampled_from([0.0, 1.5]),
    st.sampled_from([0.0, 0.1]),
    st.booleans(),
    st.floats(0, 1),
    st.integers(1, 40),
)
def test_loss_and_gradients_equal_the_reference(tokens, softcap, z_loss, weighted, ignored, chunk):
    hidden, weight, targets = head_inputs(tokens)
    targets[torch.rand(tokens) < ignored] = -100
    weights = torch.rand(tokens, dtype=torch.float64) if weighted else None
    arguments = {"loss_weights": weights, "softcap": softcap, "z_loss": z_loss}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cross_entropy, "CHUNK_LOGITS", chunk)
        ours = kernels.linear_cross_entropy(hidden, weight, targets, **arguments)
        our_gradients = torch.autograd.grad(3 * ours, (hidden, weight))
    theirs = reference.linear_cross_entropy(hidden, weight, targets, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(our_gradients, torch.autograd.grad(3 * theirs, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_plain_loss_is_torchs_cross_entropy():
    hidden, weight, targets = head_inputs()
    targets[3] = -100
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(kernels.linear_cross_entropy(hidden, weight, targets), expected)
    torch.testing.assert_close(reference.linear_cross_entropy(hidden, weight, targets), expected)


@pytest.mark.parametrize(("softcap", "z_loss"), [(0.0, 0.0), (2.0, 0.0), (0.0, 0.3), (2.0, 0.3)])
def test_gradients_pass_gradcheck(softcap, z_loss, monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 20)
    hidden, weight, targets = head_inputs()
    targets[1] = -100
    weights = torch.rand(len(targets), dtype=torch.float64)

    def loss(hidden, weight):
        return kernels.linear_cross_entropy(
            hidden, weight, targets, loss_weights=weights, softcap=softcap, z_loss=z_loss
        )

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_nothing_to_predict_costs_nothing():
    hidden, weight, targets = head_inputs()
    loss = kernels.linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_the_loss_is_the_same_where_no_gradient_is_asked_for():
    hidden, weight, targets = head_inputs()
    loss = kernels.linear_cross_entropy(hidden.detach(), weight.detach(), targets, softcap=2.0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference.linear_cross_entropy(hidden, weight, targets, softcap=2.0).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_summed_in_float32(dtype):
    hidden, weight, targets = head_inputs(dtype=dtype)
    loss = kernels.linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    exact = reference.linear_cross_entropy(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_grows_with_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 1000)
    hidden, weight, targets = head_inputs(tokens=200, hidden=4, vocabulary=100)
    with LargestTensor() as largest:
        kernels.linear_cross_entropy(hidden, weight, targets).backward()
    assert largest.elements <= 1000
    with LargestTensor() as largest:
        reference.linear_cross_entropy(hidden, weight, targets)
    assert largest.elements == 200 * 100  # the probe does see what the reference makes


def test_no_gradient_is_computed_where_none_is_asked_for(monkeypatch):
    made = []
    real = torch.zeros
    monkeypatch.setattr(cross_entropy.torch, "zeros", lambda *a, **k: made.append(a) or real(*a, **k))
    weight = torch.nn.Parameter(torch.randn(5, 3))
    with torch.no_grad():
        kernels.linear_cross_entropy(torch.randn(4, 3), weight, torch.arange(4))
    assert (5, 3) not in [tuple(a[0]) for a in made if a and len(a[0])]
