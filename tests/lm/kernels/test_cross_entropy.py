from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo  # before a test changes functions of torch, which it keeps a list of
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lm.kernels import cross_entropy, linear_cross_entropy, reference


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
    st.integers(1, 40),
)
def test_loss_and_gradients_equal_the_reference(tokens, softcap, z_loss, weighted, ignored, chunk, block):
    hidden, weight, targets = head_inputs(tokens)
    targets[torch.rand(tokens) < ignored] = -100
    weights = torch.rand(tokens, dtype=torch.float64) if weighted else None
    arguments = {"loss_weights": weights, "softcap": softcap, "z_loss": z_loss}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(cross_entropy.CHUNK_LOGITS, "cpu", chunk)
        patch.setitem(cross_entropy.BLOCK_LOGITS, "cpu", block)
        ours = linear_cross_entropy(hidden, weight, targets, **arguments)
        our_gradients = torch.autograd.grad(3 * ours, (hidden, weight))
    theirs = reference.linear_cross_entropy(hidden, weight, targets, **arguments)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    for a, b in zip(our_gradients, torch.autograd.grad(3 * theirs, (hidden, weight)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_the_plain_loss_is_torchs_cross_entropy():
    hidden, weight, targets = head_inputs()
    targets[3] = -100
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), expected)
    torch.testing.assert_close(reference.linear_cross_entropy(hidden, weight, targets), expected)


@pytest.mark.parametrize(("softcap", "z_loss"), [(0.0, 0.0), (2.0, 0.0), (0.0, 0.3), (2.0, 0.3)])
def test_gradients_pass_gradcheck(softcap, z_loss, monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_LOGITS, "cpu", 20)
    hidden, weight, targets = head_inputs()
    targets[1] = -100
    weights = torch.rand(len(targets), dtype=torch.float64)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, loss_weights=weights, softcap=softcap, z_loss=z_loss)

    assert torch.autograd.gradcheck(loss, (hidden, weight))


def test_nothing_to_predict_costs_nothing():
    hidden, weight, targets = head_inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss == 0
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()


def test_the_loss_is_the_same_where_no_gradient_is_needed():
    hidden, weight, targets = head_inputs()
    loss = linear_cross_entropy(hidden.detach(), weight.detach(), targets, softcap=2.0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, reference.linear_cross_entropy(hidden, weight, targets, softcap=2.0).detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_summed_in_float32(dtype):
    hidden, weight, targets = head_inputs(dtype=dtype)
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.dtype == torch.float32
    loss.backward()
    assert hidden.grad.dtype == weight.grad.dtype == dtype
    exact = reference.linear_cross_entropy(hidden.double(), weight.double(), targets)
    torch.testing.assert_close(loss.double(), exact, rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0)


class LargestTensor(TorchDispatchMode):
    """Record the number of elements of the largest tensor that any operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_grows_with_tokens_times_vocabulary(monkeypatch):
    monkeypatch.setitem(cross_entropy.CHUNK_LOGITS, "cpu", 1000)
    hidden, weight, targets = head_inputs(tokens=200, hidden=4, vocabulary=100)
    with LargestTensor() as largest, torch.no_grad():
        cross_entropy.compute(hidden, weight, targets, None, 2.0, 0.1, True, True)
    assert largest.elements == 1000  # the probe sees the chunks
    monkeypatch.setitem(cross_entropy.CHUNK_TOKENS, "cpu", 5)
    with LargestTensor() as largest, torch.no_grad():
        cross_entropy.compute(hidden, weight, targets, None, 2.0, 0.1, True, True)
    assert largest.elements == 800  # the gradient of hidden: chunks of 5 tokens are smaller
    with LargestTensor() as largest:
        reference.linear_cross_entropy(hidden, weight, targets)
    assert largest.elements == 200 * 100  # the probe does see what the reference makes


@pytest.mark.parametrize(
    ("gigabytes", "vocabulary", "tokens"),
    [
        (8, 50_304, 2**27 // 50_304),
        (24, 50_304, 2**27 // 50_304),
        (80, 50_304, 80 * 10**9 // 256 // 50_304),
        (150, 50_304, 2**29 // 50_304),
        (150, 8192, 16_384),
        (8, 10**9, 1),
    ],
)
def test_a_gpu_with_more_memory_takes_more_tokens_at_a_time(monkeypatch, gigabytes, vocabulary, tokens):
    gpu = torch.device("cuda", 0)
    assert cross_entropy.tokens_at_once(gpu, vocabulary) == min(max(1, 2**27 // vocabulary), 16_384)  # no card is known
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    card = SimpleNamespace(total_memory=gigabytes * 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert cross_entropy.tokens_at_once(gpu, vocabulary) == tokens
    assert cross_entropy.tokens_at_once(torch.device("cpu"), vocabulary) == min(max(1, 8_000_000 // vocabulary), 1024)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_gradient_that_is_not_needed_is_not_made(frozen):
    hidden, weight, targets = head_inputs(tokens=50, hidden=4, vocabulary=30)
    (hidden if frozen == "hidden" else weight).requires_grad_(False)
    loss = linear_cross_entropy(hidden, weight, targets)
    loss.backward()
    assert (hidden.grad is None) == (frozen == "hidden")
    assert (weight.grad is None) == (frozen == "weight")


class Products(TorchDispatchMode):
    """Count matrix products."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        return function(*args, **(kwargs or {}))


def test_evaluation_makes_no_gradients():
    hidden, weight, targets = head_inputs()
    sizes = {}
    for needs in (False, True):
        # A dispatch mode does not see inside the operator, so call its function.
        with Products() as products, torch.no_grad():
            made = cross_entropy.compute(hidden, weight, targets, None, 0.0, 0.0, needs, needs)
        sizes[products.count] = [x.numel() for x in made]
    assert sizes == {1: [1, 0, 0, 1], 3: [1, hidden.numel(), weight.numel(), 1]}


def test_the_gradient_can_be_taken_twice():
    hidden, weight, targets = head_inputs()
    loss = linear_cross_entropy(hidden, weight, targets)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    second = torch.autograd.grad(2 * loss, (hidden, weight))
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_a_gradient_of_the_gradient_is_refused():
    hidden, weight, targets = head_inputs()
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), hidden, create_graph=True)


@pytest.mark.parametrize("compiled", [False, True])
def test_under_autocast_the_products_are_in_its_dtype_and_the_gradients_float32(monkeypatch, compiled):
    monkeypatch.setitem(cross_entropy.CHUNK_TOKENS, "cpu", 20)
    hidden, weight, targets = head_inputs(tokens=40, hidden=16, vocabulary=60, dtype=torch.float32)
    head = (
        torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager") if compiled else linear_cross_entropy
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = head(hidden, weight, targets)
    ours = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    rounded = hidden.detach().bfloat16().float().requires_grad_()
    exact = reference.linear_cross_entropy(rounded, weight, targets)
    for mine, theirs in zip(ours, (exact, *torch.autograd.grad(exact, (rounded, weight))), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)
    # The sum of the chunks reaches the weight without a bfloat16 tensor.
    assert not torch.equal(ours[2], ours[2].bfloat16().float())


def test_sixteen_bit_logits_keep_their_dtype_and_their_loss(monkeypatch):
    monkeypatch.setitem(cross_entropy.BLOCK_LOGITS, "cpu", 100)
    torch.manual_seed(0)
    logits, targets, shares = torch.randn(7, 40).half(), torch.randint(0, 40, (7,)), torch.rand(7)
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    (gradient,) = torch.autograd.grad(expected, exact, shares.double())
    losses, grad, row_factors = cross_entropy._differentiate_by_torch(logits, targets, shares, 0.0, 0.0, True)
    assert row_factors is None
    assert grad.dtype == torch.float16
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(grad.double(), gradient, rtol=1e-3, atol=1e-6)


def test_improbable_targets_keep_their_loss_and_gradient():
    hidden = torch.tensor([[200.0], [-300.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    targets = torch.tensor([1, 0])
    loss = linear_cross_entropy(hidden, weight, targets)
    assert loss.item() == pytest.approx(1000.0)
    loss.backward()
    assert torch.isfinite(weight.grad).all()
    torch.testing.assert_close(hidden.grad, torch.tensor([[2.0], [-2.0]]))


def test_small_weights_do_not_vanish_in_float16():
    torch.manual_seed(0)
    hidden, weight = torch.randn(6, 8), torch.randn(10, 8)
    targets, weights = torch.randint(0, 10, (6,)), torch.full((6,), 1e-9)
    halves = [x.half().requires_grad_() for x in (hidden, weight)]
    # The incoming gradient brings the result back into float16's range, as a loss scale does.
    (1e9 * linear_cross_entropy(*halves, targets, loss_weights=weights)).backward()
    exact = [x.detach().double().requires_grad_() for x in halves]
    reference.linear_cross_entropy(*exact, targets).backward()
    for half, double in zip(halves, exact, strict=True):
        torch.testing.assert_close(half.grad.double(), double.grad, rtol=1e-2, atol=5e-3)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_operator_passes_opcheck(softcap):
    hidden, weight, targets = head_inputs(dtype=torch.float32)
    targets[2] = -100
    operator = torch.ops.kindling.linear_cross_entropy.default
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(operator, (hidden, weight, targets, None, softcap, 0.1, *needs))


@pytest.mark.parametrize("hidden_part", [0.0, 0.4, 1.0])
def test_a_known_number_of_targets_changes_no_bit_and_asks_the_device_for_nothing(hidden_part, monkeypatch):
    hidden, weight, targets = head_inputs(tokens=40, dtype=torch.float32)
    targets[torch.rand(40) < hidden_part] = -100
    predicted = int((targets >= 0).sum())
    results = []
    for number in (None, predicted):
        loss = linear_cross_entropy(hidden, weight, targets, predicted=number)
        results.append((loss, *torch.autograd.grad(loss, (hidden, weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # it does not know the meta device
    with torch.no_grad():
        inputs = [x.to("meta") for x in (hidden, weight, targets)]
        cross_entropy.compute(*inputs, None, 2.0, 0.1, True, True, predicted)
        with pytest.raises(NotImplementedError, match="nonzero"):
            cross_entropy.compute(*inputs, None, 2.0, 0.1, True, True)


def test_a_compiled_loss_has_no_graph_break_and_the_same_gradients():
    hidden, weight, targets = head_inputs(dtype=torch.float32)
    targets[2] = -100
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(hidden, weight, targets), (hidden, weight))
    expected = torch.autograd.grad(linear_cross_entropy(hidden, weight, targets), (hidden, weight))
    for a, b in zip(ours, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"weight": torch.zeros(7, 4)}, "must be"),
        ({"weight": torch.zeros(7, 5, dtype=torch.float64)}, "the same floating-point dtype"),
        ({"targets": torch.zeros(10, dtype=torch.int64)}, r"targets \(10,\) must be \(11,\)"),
        ({"targets": torch.zeros(11, dtype=torch.int32)}, "they must be int64"),
        ({"loss_weights": torch.zeros(3)}, "loss_weights"),
        ({"targets": torch.full((11,), 7)}, "target 7 is not in the vocabulary of 7"),
    ],
)
def test_arguments_that_do_not_match_are_refused_in_a_sentence(change, sentence):
    hidden, weight, targets = head_inputs(dtype=torch.float32)
    arguments = {"hidden": hidden, "weight": weight, "targets": targets} | change
    with pytest.raises(ValueError, match=sentence):
        linear_cross_entropy(**arguments)


def test_the_reference_can_be_requested(monkeypatch):
    monkeypatch.setenv("KINDLING_KERNELS", "reference")
    hidden, weight, targets = head_inputs()
    with LargestTensor() as largest:
        loss = linear_cross_entropy(hidden, weight, targets)
    assert torch.equal(loss, reference.linear_cross_entropy(hidden, weight, targets))
    assert largest.elements == 11 * 7
