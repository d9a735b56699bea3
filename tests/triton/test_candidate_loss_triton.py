"""The candidate for the cross-entropy that reads its logits once."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu.candidates import loss_triton
from lm.kernels import dispatch

DEVICE = torch.device("cpu" if dispatch.interpreted() else "cuda")


@pytest.mark.parametrize("vocabulary", [1, 2, 5, 64, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("z_loss", [0.0, 0.1])
def test_losses_and_gradients_are_those_of_float64(vocabulary, dtype, z_loss):
    wide = (3 * torch.randn(6, vocabulary + 3, dtype=torch.float64)).to(DEVICE, dtype)
    beyond, logits = wide[:, vocabulary:].clone(), wide[:, :vocabulary]
    targets, shares = torch.randint(0, vocabulary, (6,), device=DEVICE), torch.rand(6, device=DEVICE)
    exact = logits.double().requires_grad_()
    lse = exact.logsumexp(1)
    truth = lse - exact.gather(1, targets[:, None])[:, 0] + z_loss * lse**2
    (gradient,) = torch.autograd.grad((truth * shares).sum(), exact)
    losses, made, _ = loss_triton.differentiate(logits, targets, shares, 0.0, z_loss, True)
    torch.testing.assert_close(losses.double(), truth.detach(), rtol=1e-5, atol=1e-5)
    rounding = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(made.double(), gradient, rtol=rounding, atol=1e-5)
    assert torch.equal(wide[:, vocabulary:], beyond)


def test_a_target_outside_the_vocabulary_makes_the_loss_nan():
    losses, *_ = loss_triton.differentiate(
        torch.randn(2, 20, device=DEVICE),
        torch.tensor([20, 3], device=DEVICE),
        torch.ones(2, device=DEVICE),
        0,
        0,
        True,
    )
    assert losses.isnan().tolist() == [True, False]


@pytest.mark.parametrize("vocabulary", [1, 2, 3, 7, 50_304, 32_768, 65_535])
def test_three_parts_hold_a_row_and_little_more(vocabulary):
    parts = loss_triton.parts_of(vocabulary)
    assert all(part & (part - 1) == 0 for part in parts)
    assert vocabulary <= sum(parts) <= 1.25 * vocabulary + 3
