from __future__ import annotations

import pytest
import torch

from lm.kernels import linear, matmul

# oneDNN computes the largest; PyTorch passes small ones to its other library.
SHAPES = [((3, 4), 5), ((2, 3, 4), 1), ((2, 160, 96), 200)]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("shape", "columns"), SHAPES)
def test_a_product_of_either_library_is_the_product(monkeypatch, shape, columns, dtype, onednn):
    monkeypatch.setattr(matmul, "has_onednn", lambda: onednn and torch.backends.mkldnn.is_available())
    a, b = torch.randn(shape, dtype=dtype), torch.randn(shape[-1], columns, dtype=dtype)
    for right in (b, b.T.contiguous().T):
        exact = a.double() @ right.double()
        torch.testing.assert_close(matmul.matmul(a, right).double(), exact, rtol=1e-4, atol=1e-4)
        total = torch.randn(*shape[:-1], columns, dtype=dtype)
        expected = exact + total.double()
        torch.testing.assert_close(matmul.matmul(a, right, addend=total).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_gradients_of_linear_are_right():
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(linear(x, weight), torch.nn.functional.linear(x, weight))
    assert torch.autograd.gradcheck(linear, (x, weight))
