"""The device: which one to use, its matrix-product rate, and its memory."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path

import psutil
import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.settings import control_groups
from lm.kernels import dispatch
from lm.kernels.matmul import matmul
from lm.model.threads import settle_threads


def machine_rate(device: torch.device, precision: str = "float32") -> float:
    """Floating-point operations per second of matrix products: the best of several sizes and runs.

    In bfloat16 if ``uses_bfloat16``, else in float32; on a CPU with PyTorch's current number of threads. Measured once
    per process, device, dtype and number of threads, which takes about 0.3 s.
    """
    dtype = torch.bfloat16 if uses_bfloat16(device, precision) else torch.float32
    return _measured_rate(device, dtype, torch.get_num_threads())


@lru_cache
def _measured_rate(device: torch.device, dtype: torch.dtype, threads: int) -> float:
    # CPUs are fastest within their caches, GPUs with large matrices.
    edges = (384, 768, 1024) if device.type == "cpu" else (2048, 4096, 8192)
    factors = [torch.ones(edge, edge, dtype=dtype, device=device) * 0.1 for edge in edges]
    best, until = 0.0, 0.0
    while not until or time.perf_counter() < until:
        for matrix in factors:
            began = time.perf_counter()
            matmul(matrix, matrix)
            synchronize(device)
            if until:
                best = max(best, 2 * len(matrix) ** 3 / (time.perf_counter() - began))
        until = until or time.perf_counter() + 0.3  # the first round, which includes initialization, does not count
    return best


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has finished all submitted work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still allocate on ``device``.

    On a CPU the memory that the system reports as available, or what the limit of a control group leaves, whichever is
    less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return min([psutil.virtual_memory().available, *_group_headrooms(control_groups("memory"))])


def total_memory(device: torch.device) -> int:
    """Bytes of memory that ``device``, a CUDA GPU or the CPU, has; on a CPU not more than a control group allows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return min([psutil.virtual_memory().total, *(most for most, _ in _group_limits(control_groups("memory")))])


def _group_headrooms(groups: Iterable[tuple[Path, int]]) -> list[int]:
    """The bytes that each memory limit of these control groups leaves."""
    return [max(0, most - used) for most, used in _group_limits(groups)]


def _group_limits(groups: Iterable[tuple[Path, int]]) -> list[tuple[int, int]]:
    """Each memory limit of these control groups (Linux, with their versions, 1 or 2), and the bytes used of it.

    Cached files can be dropped, so the inactive part of the cache does not count as used.
    """
    limits = []
    for group, version in groups:
        if version == 2:
            limit, usage, cache = "memory.max", "memory.current", "inactive_file"
        else:
            limit, usage, cache = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        try:
            most = (group / limit).read_text().strip()
            used = int((group / usage).read_text()) - _numbers(group / "memory.stat").get(cache, 0)
        except (OSError, ValueError):
            continue  # the root has no limit, and a container may hide the groups above its own
        if most != "max":
            limits.append((int(most), used))
    return limits


def resident_memory() -> int:
    """Bytes of main memory that this process holds now."""
    return int(psutil.Process().memory_info().rss)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held on ``device`` so far: resident memory on a CPU, tensors on a GPU.

    What it holds now where the system does not report the most: on macOS, and on Apple GPUs.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if peak := _numbers(Path("/proc/self/status")).get("VmHWM"):
        return peak * 1024
    held = psutil.Process().memory_info()
    return int(getattr(held, "peak_wset", held.rss))  # peak_wset: Windows


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is a failed allocation, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ("allocate" in str(error) or "out of memory" in str(error))


def _numbers(path: Path) -> dict[str, int]:
    """The lines ``name: number …`` or ``name number`` of a system file; empty if it does not exist."""
    if not path.is_file():
        return {}
    words = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def keep_freed_memory() -> bool:
    """Let the process keep the memory that a step frees for the next one. Return whether that was possible.

    glibc returns large blocks to the system, which hands them out again page by page, each filled with zeros first:
    several percent of a training step on a CPU. Other C libraries are not changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    # From malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, and M_MMAP_THRESHOLD, which is at most 32 MiB.
    settings = ((-1, 2**31 - 1), (-2, 1 << 26), (-3, 1 << 25))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)


def choose_device(name: str) -> torch.device:
    """The device of a setting; "auto" is a GPU if there is one. Settles the threads of the CPU too.

    Raises:
        UserError: the device is not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, present in available.items() if present)
    if not available[name]:
        raise UserError(f"the device {name} was requested, but PyTorch {torch.__version__} finds none")
    settle_threads()
    return torch.device(name)


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """Whether products are in bfloat16, by the setting ``precision``."""
    if precision in ("float32", "bfloat16"):
        return precision == "bfloat16"
    if device.type == "cpu":
        return precision == "native" and dispatch.multiplies_bfloat16()
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def autocast(device: torch.device, precision: str, *, training: bool) -> AbstractContextManager[object]:
    """A context in which products are in bfloat16 if ``uses_bfloat16``.

    ``training``: whether a step is computed. With "native", validations and predictions on a CPU are in float32, so
    that they do not depend on the CPU.
    """
    precise = device.type == "cpu" and precision == "native" and not training
    rounded = not precise and uses_bfloat16(device, precision)
    return torch.autocast(device.type, torch.bfloat16) if rounded else nullcontext()


def staged(x: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU, to copy to ``device`` with ``non_blocking=True`` while a GPU there is still working."""
    return x.pin_memory() if device.type == "cuda" else x
