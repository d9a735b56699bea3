"""What the machine has: its matrix-product rate, and memory: how much is free, was held, and is kept."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
import time
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from pathlib import Path

import torch

from data_prep.errors import UserError
from lm.kernels.matmul import matmul

# Edges of the square matrices that are multiplied: small machines are at their best in caches, GPUs with large ones.
EDGES = {"cpu": (384, 768, 1024), "gpu": (2048, 4096, 8192)}
SECONDS = 0.3
# Of malloc.h; glibc takes no larger threshold for blocks of their own than 32 MiB.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
LARGEST_INT, LARGEST_MMAP_THRESHOLD = 2**31 - 1, 1 << 25


def machine_rate(device: torch.device) -> float:
    """Floating-point operations a second that matrix products reach: the best of several sizes and runs.

    In float32 on a CPU, with the threads that PyTorch has now; in bfloat16 on a GPU that has it. Measured once a
    process for a device and a number of threads, which takes about 0.3 s.
    """
    return _measured_rate(device, torch.get_num_threads())


@lru_cache
def _measured_rate(device: torch.device, threads: int) -> float:
    low = device.type == "cuda" and torch.cuda.is_bf16_supported()
    edges = EDGES["cpu" if device.type == "cpu" else "gpu"]
    factors = [
        torch.ones(edge, edge, dtype=torch.bfloat16 if low else torch.float32, device=device) * 0.1 for edge in edges
    ]
    best, until = 0.0, 0.0
    while not until or time.perf_counter() < until:
        for matrix in factors:
            began = time.perf_counter()
            matmul(matrix, matrix)
            synchronize(device)
            if until:
                best = max(best, 2 * len(matrix) ** 3 / (time.perf_counter() - began))
        until = until or time.perf_counter() + SECONDS  # the first round, which loads what it needs, does not count
    return best


def synchronize(device: torch.device) -> None:
    """Wait until ``device`` has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def available_memory(device: torch.device) -> int:
    """Bytes that this process can still take on ``device``.

    On a CPU what the system calls available, or what the limit of the control group leaves, whichever is less; where
    the system does not say (macOS), all of its memory.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    told = _numbers(Path("/proc/meminfo")).get("MemAvailable")
    system = told * 1024 if told else os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min([system, *_group_headrooms(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def _group_headrooms(membership: Path, mount: Path) -> list[int]:
    """What each memory limit above this process leaves, of either version of Linux's control groups.

    A file that is only cached can be dropped, so the inactive part of the cache does not count as used.
    """
    headrooms = []
    lines = membership.read_text().splitlines() if membership.is_file() else []
    for hierarchy, controllers, path in (line.split(":", 2) for line in lines):
        if hierarchy == "0":
            root, limit, usage, cache = mount, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit, usage, cache = (
                *(mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
            )
        else:
            continue
        inside = root / path.strip("/")
        for group in (inside, *inside.parents):
            if not group.is_relative_to(root):
                break
            try:
                most = (group / limit).read_text().strip()
                used = int((group / usage).read_text()) - _numbers(group / "memory.stat").get(cache, 0)
            except (OSError, ValueError):
                continue  # the root has no limit, and a container may not show the groups above its own
            if most != "max":
                headrooms.append(max(0, int(most) - used))
    return headrooms


def resident_memory() -> int:
    """Bytes of main memory that this process holds now; the most it has held where the system does not say."""
    return _numbers(Path("/proc/self/status")).get("VmRSS", 0) * 1024 or peak_memory(torch.device("cpu"))


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held on ``device`` so far: resident memory on a CPU, tensors on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    # Linux's ru_maxrss begins at what the parent process had; this does not.
    told = _numbers(Path("/proc/self/status")).get("VmHWM")
    if told:
        return told * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` is an allocation that failed, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and ("allocate" in str(error) or "out of memory" in str(error))


def _numbers(path: Path) -> dict[str, int]:
    """The lines ``name: number …`` or ``name number`` of one of the system's files; none if it is not there."""
    if not path.is_file():
        return {}
    words = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {word[0]: int(word[1]) for word in words if len(word) > 1 and word[1].isdigit()}


def keep_freed_memory() -> bool:
    """Let the process keep the memory that a step frees for the next one; whether that could be arranged.

    glibc gives large blocks back to the system, which hands them out again a page at a time, each filled with zeros
    first: several percent of a training step on a CPU. Other C libraries are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    settings = ((M_TRIM_THRESHOLD, LARGEST_INT), (M_TOP_PAD, 1 << 26), (M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD))
    return mallopt is not None and all(mallopt(name, value) for name, value in settings)


def choose_device(name: str) -> torch.device:
    """The device that a setting asks for; "auto" is a GPU if there is one. UserError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"device {name} was asked for, but PyTorch {torch.__version__} sees none here")
    return torch.device(name)


def autocast(device: torch.device, precision: str) -> AbstractContextManager[object]:
    """Products in bfloat16 where that was asked for, or is fast ("auto" on a GPU); float32 otherwise."""
    if precision == "bfloat16" or (precision == "auto" and device.type == "cuda" and torch.cuda.is_bf16_supported()):
        return torch.autocast(device.type, torch.bfloat16)
    return nullcontext()
