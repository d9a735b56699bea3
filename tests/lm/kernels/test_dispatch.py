from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from data_prep.errors import UserError
from lm.kernels import dispatch

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


class OnGpu:
    """The part of a tensor that ``choose`` needs."""

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


def test_a_cpu_uses_pytorch_and_gives_the_reason():
    assert dispatch.choose(torch.zeros(1)) == "torch"
    assert dispatch.describe(CPU) == "kernels: PyTorch (Triton needs a CUDA GPU)"


def test_a_cuda_gpu_uses_triton_except_for_float64(hopper):
    assert dispatch.choose(OnGpu(torch.bfloat16)) == "triton"
    assert dispatch.choose(OnGpu(torch.float64)) == "torch"
    assert dispatch.describe(GPU) == "kernels: Triton (NVIDIA H100)"


@pytest.mark.parametrize(
    ("limit", "able", "expected"),
    [
        (None, True, True), ("ALL", True, True), ("AVX512_CORE_BF16", True, True), ("avx512_core_amx", True, True),
        ("AVX10_1_512", True, True), (None, False, False), ("AVX2", True, False), ("AVX512_CORE_VNNI", True, False),
    ],
)  # fmt: skip
def test_bfloat16_needs_a_cpu_with_instructions_for_it_that_onednn_may_use(monkeypatch, limit, able, expected):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: able)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    if limit:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert dispatch.multiplies_bfloat16.__wrapped__() is expected


@pytest.mark.parametrize("able", [True, False])
def test_autocast_uses_the_functions_for_cpus_where_bfloat16_is_fast(monkeypatch, able):
    monkeypatch.setattr(dispatch, "multiplies_bfloat16", lambda: able)
    x = torch.zeros(1)
    assert dispatch.eager_on_cpu(x)
    assert dispatch.product_dtype(x) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert dispatch.eager_on_cpu(x) is able
        assert dispatch.product_dtype(x) == torch.bfloat16


def test_an_old_gpu_uses_pytorch(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert dispatch.choose(OnGpu(torch.float16)) == "torch"
    assert "7.5; at least 8.0 is required" in dispatch.describe(GPU)


def test_an_amd_gpu_uses_pytorch(hopper, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert dispatch.choose(OnGpu(torch.float16)) == "torch"
    assert "AMD" in dispatch.describe(GPU)


def test_without_triton_pytorch_is_used(hopper, monkeypatch):
    nothing = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: None))
    monkeypatch.setattr(dispatch, "importlib", nothing)
    assert dispatch.choose(OnGpu(torch.float16)) == "torch"
    assert "not installed" in dispatch.describe(GPU)


def test_other_devices_use_pytorch():
    assert dispatch.describe(torch.device("mps")) == "kernels: PyTorch (Triton does not support mps devices)"


def test_the_reference_can_be_requested_anywhere(monkeypatch, hopper):
    monkeypatch.setenv("KINDLING_KERNELS", "reference")
    assert dispatch.choose(torch.zeros(1)) == dispatch.choose(OnGpu(torch.float64)) == "reference"
    assert dispatch.describe(CPU) == "kernels: the plain reference (requested by KINDLING_KERNELS)"


def test_triton_on_a_cpu_needs_the_interpreter(monkeypatch):
    monkeypatch.setenv("KINDLING_KERNELS", "triton")
    with pytest.raises(UserError, match="only with TRITON_INTERPRET=1"):
        dispatch.choose(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    dispatch.obstacle_to_triton.cache_clear()
    assert dispatch.choose(torch.zeros(1)) == "triton"


def test_an_unknown_backend_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setenv("KINDLING_KERNELS", "tritton")
    with pytest.raises(UserError, match='KINDLING_KERNELS is "tritton": set it to auto, triton or reference'):
        dispatch.choose(torch.zeros(1))
