from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data_prep.settings import control_groups
from lm.model import device
from lm.model.device import available_memory, is_out_of_memory, machine_rate, peak_memory, resident_memory

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[3]


def test_the_rate_is_that_of_the_fastest_products_and_is_measured_once(monkeypatch):
    clock, products = [1.0], []

    def product(matrix: torch.Tensor, _: torch.Tensor) -> None:
        products.append(len(matrix))
        clock[0] += 2 * len(matrix) ** 3 / (5e10 if len(matrix) == 768 and len(products) > 10 else 4e10)

    device._measured_rate.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(device, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
        patch.setattr(device, "matmul", product)
        assert machine_rate(CPU) == pytest.approx(5e10)
        measured = len(products)
        assert machine_rate(CPU) == pytest.approx(5e10)
        assert len(products) == measured
    device._measured_rate.cache_clear()
    assert 1e8 < machine_rate(CPU) < 1e14


def test_peak_memory_includes_freed_memory_and_resident_memory_does_not():
    code = """
import torch
from lm.model.device import peak_memory, resident_memory
before = peak_memory(torch.device("cpu"))
assert abs(before - resident_memory()) < 60e6, (before, resident_memory())
big = torch.ones(100_000_000)
assert resident_memory() - before > 350e6
del big
assert resident_memory() - before < 50e6
assert 350e6 < peak_memory(torch.device("cpu")) - before < 450e6
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_available_memory_is_less_than_the_machine_has():
    total = int(next(line for line in Path("/proc/meminfo").read_text().splitlines() if "MemTotal" in line).split()[1])
    assert 0 < available_memory(CPU) < total * 1024
    assert 0 < resident_memory() <= peak_memory(CPU)


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)


def test_the_limits_of_all_control_groups_above_count(tmp_path):
    (tmp_path / "membership").write_text("0::/outer/inner\n")
    group(tmp_path / "outer", memory__max="1000\n", memory__current="700\n", memory__stat="inactive_file 100\n")
    group(tmp_path / "outer" / "inner", memory__max="max\n", memory__current="650\n")
    assert device._group_headrooms(control_groups("memory", tmp_path / "membership", tmp_path)) == [400]


def test_the_first_version_of_control_groups_is_read_too(tmp_path):
    (tmp_path / "membership").write_text("9:name=systemd:/\n4:cpu,memory:/job\n0::/\n")
    group(
        tmp_path / "memory" / "job",
        memory__limit_in_bytes="500\n",
        memory__usage_in_bytes="450\n",
        memory__stat="inactive_file 1\ntotal_inactive_file 30\n",
    )
    assert device._group_headrooms(control_groups("memory", tmp_path / "membership", tmp_path)) == [80]
    assert device._group_headrooms(control_groups("memory", tmp_path / "none", tmp_path)) == []


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] can't allocate memory"), True),
        (RuntimeError("The size of tensor a (2) must match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_a_failed_allocation_is_distinguished_from_other_errors(error, is_memory):
    assert is_out_of_memory(error) == is_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be configured")
def test_freed_memory_is_not_requested_again():
    code = (
        "import resource, torch; from lm.model.device import keep_freed_memory; assert keep_freed_memory()\n"
        "def work(): [torch.ones(1 << 22) for _ in range(8)]\n"
        "work(); before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): work()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    faults = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert int(faults) < 8 * (1 << 24) / 4096  # as many as one of the five rounds would cause


def test_without_proc_the_memory_is_what_psutil_reports(monkeypatch):
    class Process:
        def memory_info(self):
            return SimpleNamespace(rss=3000, **more)

    more: dict[str, int] = {}
    monkeypatch.setattr(device, "_numbers", lambda path: {})
    monkeypatch.setattr(device, "_group_headrooms", lambda *paths: [])
    monkeypatch.setattr(device.psutil, "Process", Process)
    monkeypatch.setattr(device.psutil, "virtual_memory", lambda: SimpleNamespace(available=5000))
    assert (available_memory(CPU), resident_memory(), peak_memory(CPU)) == (5000, 3000, 3000)
    more["peak_wset"] = 4000  # on Windows
    assert (resident_memory(), peak_memory(CPU)) == (3000, 4000)
