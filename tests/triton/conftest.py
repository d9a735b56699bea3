"""Tests of the Triton kernels themselves: on a GPU, or in Triton's interpreter with TRITON_INTERPRET=1.

The interpreter is chosen when Triton is first imported, so these tests run in a separate pytest process (see
``make test``); without a GPU or the interpreter none is collected.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")

if not INTERPRETED and DEVICE.type == "cpu":
    collect_ignore_glob = ["*"]
elif INTERPRETED:
    os.environ["KINDLING_KERNELS"] = "triton"


def widened(bits: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The numbers that bfloat16 bit patterns represent."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(numbers: NDArray[np.floating]) -> NDArray[np.uint16]:
    """The nearest bfloat16 of each number, ties to even, as bit patterns."""
    bits = torch.from_numpy(np.ascontiguousarray(numbers, dtype=np.float32)).bfloat16().view(torch.int16)
    return bits.numpy().view(np.uint16)


def fix_bfloat16() -> None:
    """Make the interpreter compute with bfloat16 numbers, whose bit patterns it treats as integers."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def is_bfloat16(value: object) -> bool:
        return getattr(value, "dtype", None) is not None and value.dtype.scalar == tl.bfloat16

    def in_float32(value: TensorHandle) -> TensorHandle:
        return TensorHandle(widened(value.data), tl.float32) if is_bfloat16(value) else value

    def back(values: NDArray) -> TensorHandle:
        truth = values.dtype == np.bool_
        return TensorHandle(values, tl.int1) if truth else TensorHandle(rounded(values), tl.bfloat16)

    def casting(original: Callable) -> Callable:
        def cast(self, value, to, *rest):
            scalar = to.scalar
            if value.dtype.scalar == scalar or tl.bfloat16 not in (value.dtype.scalar, scalar):
                return original(self, value, to, *rest)
            value = in_float32(value)
            if scalar == tl.bfloat16:
                return TensorHandle(rounded(value.data), tl.bfloat16)
            return value if scalar == tl.float32 else original(self, value, to, *rest)

        return cast

    def product(original: Callable) -> Callable:
        return lambda self, a, b, *rest: original(self, in_float32(a), in_float32(b), *rest)

    def binary(original: Callable) -> Callable:
        def compute(self, left, right, operation):
            if not is_bfloat16(left):
                return original(self, left, right, operation)
            return back(operation(in_float32(left).data, in_float32(right).data))

        return compute

    def unary(original: Callable) -> Callable:
        def compute(self, value, operation):
            return back(operation(in_float32(value).data)) if is_bfloat16(value) else original(self, value, operation)

        return compute

    for name, change in {
        "cast_impl": casting,
        "create_fp_to_fp": casting,
        "create_dot": product,
        "binary_op": binary,
        "unary_op": unary,
    }.items():
        setattr(InterpreterBuilder, name, change(getattr(InterpreterBuilder, name)))


if INTERPRETED:
    fix_bfloat16()


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill new tensors with NaN (or a large number), so that elements that no kernel writes are noticed."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def made(*arguments, **options):
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else 77)

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
