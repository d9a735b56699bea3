from __future__ import annotations

import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lm import machine

ROOT = Path(__file__).parents[2]


def test_the_rate_is_that_of_the_fastest_product(monkeypatch):
    taken = iter([9.0, 2.0, 0.5, 1.0] + [9.0, 3.0] * 10)
    monkeypatch.setattr(machine, "SIZES", {"cpu": (8, 16)})
    monkeypatch.setattr(machine, "_seconds_of", lambda a, b: next(taken))
    monkeypatch.setattr(time, "perf_counter", iter(range(100)).__next__)
    # Size 8: 2, 0.5 and 1 second after a first one that does not count; size 16: 3 seconds.
    assert machine.machine_rate(torch.device("cpu"), seconds=5) == max(2 * 8**3 / 0.5, 2 * 16**3 / 3.0)


def test_a_measured_rate_is_plausible():
    assert 1e8 < machine.machine_rate(torch.device("cpu"), seconds=0.05) < 1e15


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_gpu_is_measured_too():
    assert machine.machine_rate(torch.device("cuda")) > 1e12


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
def test_memory_that_was_freed_is_not_asked_for_again():
    code = (
        "import resource, torch; from lm.machine import keep_freed_memory; assert keep_freed_memory()\n"
        "def work(): [torch.ones(1 << 22) for _ in range(8)]\n"
        "work(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): work()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(faults) < 8 * (1 << 24) / 4096  # as many as one of the five rounds would cause
