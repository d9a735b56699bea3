"""Time calls on the GPU in turn, and describe the device and the software."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.testing

Calls = Mapping[str, Callable[[], object]]


def environment(device: torch.device) -> dict[str, Any]:
    """The device and the versions, to record with the numbers."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }


def milliseconds(calls: Calls, *, rounds: int = 3, repeat_ms: int = 40) -> dict[str, float | None]:
    """The median time of each call over ``rounds`` rounds A B A B …; None if it does not run here."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            try:
                times[name].append(triton.testing.do_bench(call, warmup=10, rep=repeat_ms, return_mode="median"))
            except (RuntimeError, ValueError, TypeError) as error:  # no such kernel for this shape, or out of memory
                print(f"    {name}: {str(error).splitlines()[0][:100]}", flush=True)
    return {name: statistics.median(found) if found else None for name, found in times.items()}


def peak_bytes(call: Callable[[], object]) -> int:
    """The peak device memory of one call, beyond what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
