from __future__ import annotations

import pytest
import torch

from data_prep.errors import UserError
from lm.kernels import paths

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class OnTheGpu:
    """What ``choose`` asks of a tensor."""

    is_cuda, device = True, GPU

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    monkeypatch.delenv("KINDLING_KERNELS", raising=False)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    paths.obstacle_to_triton.cache_clear()
    yield
    paths.obstacle_to_triton.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")


def test_a_cpu_takes_pytorch_and_says_why():
    assert paths.choose(torch.zeros(1)) == "torch"
    assert paths.describe(CPU) == "kernels: PyTorch (Triton needs a CUDA GPU)"


def test_a_cuda_gpu_takes_triton_but_for_float64(hopper):
    assert paths.choose(OnTheGpu(torch.bfloat16)) == "triton"
    assert paths.choose(OnTheGpu(torch.float64)) == "torch"
    assert paths.describe(GPU) == "kernels: Triton (NVIDIA H100)"


def test_an_old_gpu_takes_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert paths.choose(OnTheGpu(torch.float16)) == "torch"
    assert "7.5, and 8.0 is the least" in paths.describe(GPU)


def test_an_amd_gpu_takes_pytorch(hopper, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert paths.choose(OnTheGpu(torch.float16)) == "torch"
    assert "AMD" in paths.describe(GPU)


def test_without_triton_pytorch_is_taken(hopper, monkeypatch):
    monkeypatch.setattr(paths.importlib.util, "find_spec", lambda name: None)
    assert paths.choose(OnTheGpu(torch.float16)) == "torch"
    assert "not installed" in paths.describe(GPU)


def test_other_devices_take_pytorch():
    assert paths.describe(torch.device("mps")) == "kernels: PyTorch (Triton does not know the device mps)"


def test_the_reference_can_be_asked_for_anywhere(monkeypatch, hopper):
    monkeypatch.setenv("KINDLING_KERNELS", "reference")
    assert paths.choose(torch.zeros(1)) == paths.choose(OnTheGpu(torch.float64)) == "reference"
    assert paths.describe(CPU) == "kernels: the plain reference (KINDLING_KERNELS asks for it)"


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("KINDLING_KERNELS", "triton")
    with pytest.raises(UserError, match="only under TRITON_INTERPRET=1"):
        paths.choose(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    paths.obstacle_to_triton.cache_clear()
    assert paths.choose(torch.zeros(1)) == "triton"


def test_an_unknown_path_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("KINDLING_KERNELS", "tritton")
    with pytest.raises(UserError, match='KINDLING_KERNELS is "tritton": set it to auto, triton or reference'):
        paths.choose(torch.zeros(1))
