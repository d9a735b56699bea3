"""The machine: the rate of its matrix products, beside which a step's rate is told, and how it keeps memory."""

from __future__ import annotations

import ctypes
import sys
import time

import torch
from torch import Tensor

from lm.kernels.products import times

# Square products of these sizes: caches favour the small ones on a CPU, and a GPU needs large ones to be full.
SIZES = {"cpu": (256, 512, 1024), "gpu": (4096, 8192)}
# Of malloc.h; glibc takes no larger threshold for blocks of their own than 32 MiB.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_INT, LARGEST_MMAP_THRESHOLD = 2**31 - 1, 1 << 25


def machine_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Floating-point operations per second of the fastest matrix product on ``device``, with the threads set now.

    In float32 on a CPU, in bfloat16 on a GPU; a multiplication and an addition are two operations. About ``seconds``
    are spent, shared out over a few sizes, and the best of all runs counts, so that other programs disturb little.
    """
    on_cpu = device.type == "cpu"
    sizes = SIZES["cpu" if on_cpu else "gpu"]
    best = 0.0
    for size in sizes:
        a, b = torch.randn(2, size, size, device=device, dtype=torch.float32 if on_cpu else torch.bfloat16)
        _seconds_of(a, b)  # the first product of a size also sets up the library
        end = time.perf_counter() + seconds / len(sizes)
        while True:
            best = max(best, 2 * size**3 / _seconds_of(a, b))
            if time.perf_counter() >= end:
                break
    return best


def _seconds_of(a: Tensor, b: Tensor) -> float:
    _finish(a.device)
    began = time.perf_counter()
    times(a, b)
    _finish(a.device)
    return time.perf_counter() - began


def _finish(device: torch.device) -> None:
    """Wait for what was only queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def keep_freed_memory() -> bool:
    """Let the process keep the memory that a step frees for the next one; whether that could be arranged.

    glibc gives large blocks back to the system, which hands them out again a page at a time, each filled with zeros
    first: several percent of a training step on a CPU. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    settings = ((M_TRIM_THRESHOLD, LARGEST_INT), (M_TOP_PAD, 1 << 26), (M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)
