from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lm.config.model_settings import ModelConfig
from lm.kernels import attention, dispatch, masks, reference
from lm.model.transformer import Transformer


def heads(rows: int, queries: int, keys: int, counts: tuple[int, int], width: int, dtype=torch.float64):
    return [
        torch.randn(rows, length, count, width, dtype=dtype, requires_grad=True)
        for length, count in ((queries, counts[0]), (keys, counts[1]), (keys, counts[1]))
    ]


def one_query_at_a_time(q, k, v, visible):
    """Softmax attention by its definition, and its log-sum-exp."""
    out = torch.zeros_like(q)
    lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=q.dtype)
    for row in range(q.shape[0]):
        for head in range(q.shape[2]):
            other = head // (q.shape[2] // k.shape[2])
            for i in range(q.shape[1]):
                seen = visible[row, i]
                if seen.any():
                    scores = k[row, seen, other] @ q[row, i, head] / q.shape[-1] ** 0.5
                    out[row, i, head] = scores.softmax(0) @ v[row, seen, other]
                    lse[row, head, i] = scores.logsumexp(0)
    return out, lse


@given(
    rows=st.integers(1, 3),
    queries=st.integers(1, 8),
    past=st.integers(0, 4),
    counts=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("path", ["auto", "reference"])
def test_attention_equals_a_loop_over_queries(path, rows, queries, past, counts, seed):
    torch.manual_seed(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KINDLING_KERNELS", path)
        inputs = heads(rows, queries, queries + past, counts, 4)
        lo, hi = torch.randint(0, queries + past + 1, (2, rows, queries), dtype=torch.int32)
        out, lse = attention(*inputs, lo, hi)
    expected, expected_lse = one_query_at_a_time(*inputs, masks.dense(lo, hi, queries + past))
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-10)


def test_softcap_and_scale_act_on_the_scores():
    q, k, v = heads(1, 3, 3, (1, 1), 4)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.7
    expected = torch.einsum("bhqk,bkhd->bqhd", (2 * torch.tanh(scores / 2)).softmax(-1), v)
    intervals = masks.bidirectional(1, 3)
    for compute in (attention, reference.attention):
        torch.testing.assert_close(compute(q, k, v, *intervals, scale=0.7, softcap=2.0)[0], expected)


def test_queries_that_see_nothing_give_zeros_and_zero_gradients():
    hi = torch.tensor([[0, 0, 0, 0, 0], [3, 3, 3, 3, 0]], dtype=torch.int32)
    lo = torch.zeros_like(hi)
    q, k, v = heads(2, 5, 5, (2, 1), 4, torch.float32)
    out, lse = attention(q, k, v, lo, hi)
    assert (out[0] == 0).all()
    assert (out[1, 4] == 0).all()
    assert (out[1, :4] != 0).all()
    assert lse[0].isneginf().all()
    out.square().sum().backward()
    for tensor in (q, k, v):
        assert torch.isfinite(tensor.grad).all()
        assert (tensor.grad[0] == 0).all()
    assert (q.grad[1, 4] == 0).all()
    assert (v.grad[1, :3] != 0).any()


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_gradients_pass_gradcheck(softcap):
    inputs = heads(2, 4, 6, (2, 1), 4)
    lo, hi = torch.randint(0, 7, (2, 2, 4), dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda q, k, v: attention(q, k, v, lo, hi, softcap=softcap)[0], inputs)


def test_the_operators_pass_opcheck():
    inputs = heads(2, 5, 7, (4, 2), 16, torch.float32)
    lo, hi = torch.randint(0, 8, (2, 2, 5), dtype=torch.int32)
    torch.library.opcheck(torch.ops.kindling.attention.default, (*inputs, lo, hi, 0.3, 1.0))
    q, k, v = (x.detach() for x in inputs)
    out, lse = torch.ops.kindling.attention(q, k, v, lo, hi, 0.3, 1.0)
    arguments = (torch.randn_like(out), q, k, v, out, lse, lo, hi, 0.3, 1.0)
    torch.library.opcheck(torch.ops.kindling.attention_backward.default, arguments)


def test_the_log_sum_exp_carries_no_gradient():
    lo, hi = masks.causal(1, 3)
    _, lse = attention(*heads(1, 3, 3, (1, 1), 4), lo, hi)
    assert not lse.requires_grad


@pytest.mark.parametrize("able", [True, False])
def test_autocast_casts_all_three_to_its_dtype_except_where_a_cpu_multiplies_it(monkeypatch, able):
    monkeypatch.setattr(dispatch, "multiplies_bfloat16", lambda: able)
    q, k, v = heads(1, 3, 3, (1, 1), 4, torch.float32)
    lo, hi = masks.causal(1, 3)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = attention(q, k.bfloat16(), v, lo, hi)
    assert (out.dtype, lse.dtype) == (torch.float32 if able else torch.bfloat16, torch.float32)
    out.sum().backward()
    assert q.grad.dtype == torch.float32


def test_autocast_does_not_affect_the_sums_inside():
    q, k, v = (x.detach().bfloat16() for x in heads(1, 9, 9, (2, 1), 8, torch.float32))
    lo, hi = masks.causal(1, 9)
    plain = attention(q, k, v, lo, hi, softcap=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        cast = attention(q, k, v, lo, hi, softcap=2.0)
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_whole_model_and_its_loss_compile_without_a_graph_break(activation, qk_norm):
    config = ModelConfig(2, 32, 4, 2, activation=activation, qk_norm=qk_norm, vocab_size=23)
    model = Transformer(config).initialize(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # so that every part has an effect
    inputs = torch.randint(0, 23, (3, 20))
    lo, hi = masks.packed(torch.rand(3, 20) < 0.2, torch.tensor([False, True, True]))
    positions, targets = torch.arange(20) - lo, inputs.roll(-1, 1)

    def loss(inputs, positions, lo, hi):
        return model.loss(model(inputs, positions, lo, hi), targets, torch.ones(3, 20))

    results = []
    for call in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        value = call(inputs, positions, lo, hi)
        results.append([value, *torch.autograd.grad(value, list(model.parameters()))])
    for plain, compiled in zip(*results, strict=True):
        torch.testing.assert_close(plain, compiled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"q": (1, 3, 3, 16)}, "3 query heads are not a multiple of 2"),
        ({"q": (1, 3, 2, 8)}, r"must be \(B, Tq"),
        ({"v": (1, 4, 2, 16)}, r"must be \(B, Tq"),
        ({"lo": (1, 4)}, r"must be \(1, 3\)"),
        (dict.fromkeys("qkv", (1, 3, 2, 512)), "the head dimension is 512"),
        ({"scale": -1.0}, "must be above 0"),
        ({"softcap": -1.0}, "at least 0"),
        ({"hi": torch.zeros(1, 3)}, "must be int32"),
        ({"k": torch.zeros(1, 3, 2, 16, dtype=torch.float64)}, "the same floating-point dtype"),
        ({"lo": torch.zeros(1, 3, dtype=torch.int32, device="meta")}, "one device"),
    ],
)
def test_arguments_that_do_not_match_are_refused_in_a_sentence(change, sentence):
    arguments = {"q": (1, 3, 2, 16), "k": (1, 3, 2, 16), "v": (1, 3, 2, 16), "lo": (1, 3), "hi": (1, 3)} | change
    made = {
        name: torch.zeros(shape, dtype=torch.int32 if name in ("lo", "hi") else torch.float32)
        if isinstance(shape, tuple)
        else shape
        for name, shape in arguments.items()
    }
    with pytest.raises(ValueError, match=sentence):
        attention(**made)
