"""Choose the backend of the kernels, and describe the choice in one line.

CUDA devices use the Triton kernels; all others use PyTorch's operations, on the visible pieces of the mask. The
environment variable ``KINDLING_KERNELS`` overrides this: ``reference`` uses the formulas of ``lm.kernels.reference``,
``triton`` raises an error where Triton cannot run (on a CPU it needs ``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor

from data_prep.errors import UserError

Backend = Literal["triton", "torch", "reference"]
SETTING = "KINDLING_KERNELS"
OLDEST_CAPABILITY = (8, 0)
_simulated_gpu = ContextVar("simulated_gpu", default=False)


def reference_requested() -> bool:
    """Whether ``KINDLING_KERNELS=reference`` replaces every kernel, in compiled models too."""
    return os.environ.get(SETTING) == "reference"


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether ``tensor`` uses the autograd functions written for CPUs: float32 or float64 on a CPU, without autocast
    (or with it, where ``multiplies_bfloat16``), outside ``torch.compile`` (the compiler fuses the formulas itself), and
    without a request for the reference."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and (not torch.is_autocast_enabled("cpu") or multiplies_bfloat16())
        and not _simulated_gpu.get()
        and not reference_requested()
        and not interpreted()
    )


@contextmanager
def simulated_gpu() -> Iterator[None]:
    """While entered, tensors on a CPU stand for those of a GPU: no ``eager_on_cpu``."""
    token = _simulated_gpu.set(True)
    try:
        yield
    finally:
        _simulated_gpu.reset(token)


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, and oneDNN may use them."""
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "ALL").upper()
    allowed = limit in ("ALL", "DEFAULT") or any(name in limit for name in ("BF16", "FP16", "AMX", "AVX10"))
    return allowed and torch.cpu._is_avx512_bf16_supported()


def product_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype of the factors of products with ``tensor``: autocast's where it is on, else its own."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def factors(*tensors: Tensor) -> list[Tensor]:
    """Tensors of one dtype, as the factors of products: in ``product_dtype``."""
    dtype = product_dtype(tensors[0])
    return [tensor.to(dtype) for tensor in tensors]


def has_data(tensor: Tensor) -> bool:
    """Whether ``tensor`` holds numbers; in a simulated step (``memory_estimate``) it has a shape only."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def choose(tensor: Tensor) -> Backend:
    """The backend for tensors of this device and dtype. Called inside the operators, which are never traced."""
    backend, _ = decision(tensor.device)
    float64_on_gpu = tensor.is_cuda and tensor.dtype == torch.float64
    return "torch" if backend == "triton" and float64_on_gpu else backend


def describe(device: torch.device) -> str:
    """One line for the user: which kernels run on ``device``, and why. Raises as ``decision`` does."""
    backend, reason = decision(device)
    names = {"triton": "Triton", "torch": "PyTorch", "reference": "the plain reference"}
    return f"kernels: {names[backend]} ({reason})"


def decision(device: torch.device) -> tuple[Backend, str]:
    """The backend for ``device``, and the reason.

    Raises:
        UserError: ``KINDLING_KERNELS`` has an unknown value, or requests Triton where it cannot run.
    """
    if reference_requested():
        return "reference", f"requested by {SETTING}"
    setting = os.environ.get(SETTING, "auto")
    if setting not in ("auto", "triton"):
        raise UserError(f'{SETTING} is "{setting}": set it to auto, triton or reference')
    obstacle = obstacle_to_triton(device)
    if setting == "triton":
        if obstacle:
            raise UserError(f"{SETTING} requests Triton, but {obstacle}")
        return "triton", f"requested by {SETTING}"
    if device.type == "cpu":
        return "torch", "Triton needs a CUDA GPU"
    return ("torch", obstacle) if obstacle else ("triton", torch.cuda.get_device_name(device))


@functools.cache
def obstacle_to_triton(device: torch.device) -> str:
    """Why Triton cannot run on ``device``; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return "" if interpreted() else "on a CPU it runs only with TRITON_INTERPRET=1, for tests"
    if device.type != "cuda":
        return f"Triton does not support {device.type} devices"
    if torch.version.hip:
        return "the kernels have not been tested on AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}; at least 8.0 is required"
    return ""


def interpreted() -> bool:
    """Whether Triton interprets its kernels in Python on the CPU (fixed when Triton is first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
