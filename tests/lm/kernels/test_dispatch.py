from __future__ import annotations

import pytest
import torch

from data_prep.errors import UserError
from lm.kernels import dispatch

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
    dispatch.obstacle_to_triton.cache_clear()
    yield
    dispatch.obstacle_to_triton.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H100")


def test_a_cpu_takes_pytorch_and_says_why():
    assert dispatch.choose(torch.zeros(1)) == "torch"
    assert dispatch.describe(CPU) == "kernels: PyTorch (Triton needs a CUDA GPU)"


def test_a_cuda_gpu_takes_triton_but_for_float64(hopper):
    assert dispatch.choose(OnTheGpu(torch.bfloat16)) == "triton"
    assert dispatch.choose(OnTheGpu(torch.float64)) == "torch"
    assert dispatch.describe(GPU) == "kernels: Triton (NVIDIA H100)"


def test_an_old_gpu_takes_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert dispatch.choose(OnTheGpu(torch.float16)) == "torch"
    assert "7.5, and 8.0 is the least" in dispatch.describe(GPU)


def test_an_amd_gpu_takes_pytorch(hopper, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert dispatch.choose(OnTheGpu(torch.float16)) == "torch"
    assert "AMD" in dispatch.describe(GPU)


def test_without_triton_pytorch_is_taken(hopper, monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch.choose(OnTheGpu(torch.float16)) == "torch"
    assert "not installed" in dispatch.describe(GPU)


def test_other_devices_take_pytorch():
    assert dispatch.describe(torch.device("mps")) == "kernels: PyTorch (Triton does not know the device mps)"


def test_the_reference_can_be_asked_for_anywhere(monkeypatch, hopper):
    monkeypatch.setenv("KINDLING_KERNELS", "reference")
    assert dispatch.choose(torch.zeros(1)) == dispatch.choose(OnTheGpu(torch.float64)) == "reference"
    assert dispatch.describe(CPU) == "kernels: the plain reference (KINDLING_KERNELS asks for it)"


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("KINDLING_KERNELS", "triton")
    with pytest.raises(UserError, match="only under TRITON_INTERPRET=1"):
        dispatch.choose(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.obstacle_to_triton.cache_clear()
    assert dispatch.choose(torch.zeros(1)) == "triton"


def test_an_unknown_path_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("KINDLING_KERNELS", "tritton")
    with pytest.raises(UserError, match='KINDLING_KERNELS is "tritton": set it to auto, triton or reference'):
        dispatch.choose(torch.zeros(1))
