from __future__ import annotations

import time

import pytest
import torch

from lm import machine


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
