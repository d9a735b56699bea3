from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lm.kernels import cross_entropy, cross_entropy_triton, dispatch, linear_cross_entropy, reference

INTERPRETED = dispatch.interpreted()
DEVICE = torch.device("cpu" if INTERPRETED else "cuda")
EXACT = torch.float64 if INTERPRETED else torch.float32

pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) encountered:RuntimeWarning")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Rows of several blocks, batches of several chunks."""
    monkeypatch.setattr(cross_entropy_triton, "BLOCK", 16)
    monkeypatch.setitem(cross_entropy.CHUNK_LOGITS, "cpu", 100)
    monkeypatch.setitem(cross_entropy.CHUNK_LOGITS, "gpu", 100)


def head(tokens=7, hidden=6, vocabulary=37, dtype=EXACT):
    return (
        torch.randn(tokens, hidden, dtype=torch.float64).to(DEVICE, dtype).requires_grad_(),
        torch.randn(vocabulary, hidden, dtype=torch.float64).to(DEVICE, dtype).requires_grad_(),
        torch.randint(0, vocabulary, (tokens,), device=DEVICE),
    )


def differentiate(logits, targets, needs_grad):
    shares = torch.ones(len(targets), device=DEVICE)
    return cross_entropy_triton.differentiate(logits, targets, shares, 0.0, 0.0, needs_grad)[0]


@settings(max_examples=30, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.integers(1, 9),
    vocabulary=st.sampled_from([1, 5, 16, 17, 70]),
    softcap=st.sampled_from([0.0, 1.5]),
    z_loss=st.sampled_from([0.0, 0.1]),
    weighted=st.booleans(),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    dtype=st.sampled_from([EXACT, torch.float32]),
)
def test_loss_and_gradients_equal_the_reference(tokens, vocabulary, softcap, z_loss, weighted, ignored, dtype):
    torch.manual_seed(tokens + vocabulary)
    hidden, weight, targets = head(tokens, 6, vocabulary, dtype)
    targets[torch.rand(tokens, device=DEVICE) < ignored] = -100
    weights = torch.rand(tokens, device=DEVICE) if weighted else None
    loss = linear_cross_entropy(hidden, weight, targets, loss_weights=weights, softcap=softcap, z_loss=z_loss)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = reference.linear_cross_entropy(
        *exact, targets, loss_weights=None if weights is None else weights.double(), softcap=softcap, z_loss=z_loss
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-5)
    gradients = torch.autograd.grad(loss, (hidden, weight))
    for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_low_precision_errs_at_most_twice_as_much_as_pytorch(dtype, softcap):
    hidden, weight, targets = head(40, 16, 60, dtype)
    weights = torch.rand(40, device=DEVICE)
    exact = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = reference.linear_cross_entropy(*exact, targets, loss_weights=weights.double(), softcap=softcap)
    truth = (expected, *torch.autograd.grad(expected, exact))
    loss = linear_cross_entropy(hidden, weight, targets, loss_weights=weights, softcap=softcap)
    ours = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    logits = F.linear(hidden, weight).float()
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    loss = (F.cross_entropy(logits, targets, reduction="none") * weights).sum()
    theirs = (loss, *torch.autograd.grad(loss, (hidden, weight)))
    for exactly, mine, pytorchs in zip(truth, ours, theirs, strict=True):
        error, allowed = (mine.double() - exactly).abs().max(), (pytorchs.double() - exactly).abs().max()
        assert error <= 2 * allowed + 1e-6


@pytest.mark.skipif(not INTERPRETED, reason="float64 kernels run in the interpreter only")
@pytest.mark.parametrize(("softcap", "z_loss"), [(0.0, 0.0), (2.0, 0.3)])
def test_gradients_pass_gradcheck(softcap, z_loss):
    hidden, weight, targets = head(4, 3, 19, torch.float64)
    targets[1] = -100
    weights = torch.rand(4, dtype=torch.float64)

    def loss(hidden, weight):
        return linear_cross_entropy(hidden, weight, targets, loss_weights=weights, softcap=softcap, z_loss=z_loss)

    assert torch.autograd.gradcheck(loss, (hidden, weight), fast_mode=True)


def test_the_operator_passes_opcheck():
    hidden, weight, targets = head(dtype=torch.float32)
    operator = torch.ops.kindling.linear_cross_entropy.default
    torch.library.opcheck(operator, (hidden, weight, targets, None, 0.0, 0.1, True, True))


def test_evaluation_does_not_change_the_logits():
    logits = torch.randn(3, 40, device=DEVICE)
    before, targets = logits.clone(), torch.tensor([0, 39, 16], device=DEVICE)
    losses = differentiate(logits, targets, False)
    assert torch.equal(logits, before)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"))


def test_rows_may_be_strided_and_nothing_between_them_is_written():
    wide = torch.randn(4, 50, device=DEVICE)
    before, targets = wide.clone(), torch.tensor([1, 2, 3, 4], device=DEVICE)
    differentiate(wide[:, :37], targets, True)
    assert torch.equal(wide[:, 37:], before[:, 37:])
    expected = before[:, :37].softmax(-1) - F.one_hot(targets, 37)
    torch.testing.assert_close(wide[:, :37], expected)


def test_huge_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [3e4, 3e4, -3e4]], device=DEVICE)
    losses = differentiate(logits, torch.tensor([1, 0], device=DEVICE), True)
    torch.testing.assert_close(losses, torch.tensor([2e4, 0.6931472], device=DEVICE))
    torch.testing.assert_close(logits, torch.tensor([[1.0, -1, 0], [-0.5, 0.5, 0]], device=DEVICE))


def test_a_target_outside_the_vocabulary_makes_the_loss_nan():
    logits = torch.randn(2, 20, device=DEVICE)
    losses = differentiate(logits, torch.tensor([20, 3], device=DEVICE), True)
    assert losses.isnan().tolist() == [True, False]
