"""Which way the kernels are computed: chosen in this one place, and told in one sentence.

A CUDA device takes the Triton kernels; everything else takes PyTorch's operations, on the pieces of the mask that have
something to see. ``KINDLING_KERNELS`` overrules: ``reference`` takes the formulas as they stand in
``lm.kernels.reference``, ``triton`` refuses to run without Triton (on a CPU it needs ``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

import functools
import importlib.util
import os
from typing import Literal

import torch
from torch import Tensor

from data_prep.errors import UserError

Path = Literal["triton", "torch", "reference"]
SETTING = "KINDLING_KERNELS"
OLDEST_CAPABILITY = (8, 0)


def reference_is_asked_for() -> bool:
    """Whether the reference stands in for everything: all that the public functions need to know, compiled or not."""
    return os.environ.get(SETTING) == "reference"


def eager_on_cpu(tensor: Tensor) -> bool:
    """Whether ``tensor`` takes the autograd functions that are written for a CPU: there, in full precision, and
    neither compiled (the compiler fuses the formulas) nor told to take the reference."""
    return (
        tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.float64)
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not reference_is_asked_for()
        and not interpreted()
    )


def has_memory(tensor: Tensor) -> bool:
    """Whether there are numbers behind ``tensor``; a simulated step (``memory_estimate``) has shapes only."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def choose(tensor: Tensor) -> Path:
    """The path for tensors of this one's device and dtype; asked inside the operators, which nobody traces."""
    path, _ = decision(tensor.device)
    in_float64_on_a_gpu = tensor.is_cuda and tensor.dtype == torch.float64
    return "torch" if path == "triton" and in_float64_on_a_gpu else path


def describe(device: torch.device) -> str:
    """One line for a person: which kernels run on ``device``, and why."""
    path, why = decision(device)
    names = {"triton": "Triton", "torch": "PyTorch", "reference": "the plain reference"}
    return f"kernels: {names[path]} ({why})"


def decision(device: torch.device) -> tuple[Path, str]:
    """The path for ``device``, and the reason.

    Raises:
        UserError: ``KINDLING_KERNELS`` has an unknown value, or asks for Triton where it cannot run.
    """
    if reference_is_asked_for():
        return "reference", f"{SETTING} asks for it"
    setting = os.environ.get(SETTING, "auto")
    if setting not in ("auto", "triton"):
        raise UserError(f'{SETTING} is "{setting}": set it to auto, triton or reference')
    obstacle = obstacle_to_triton(device)
    if setting == "triton":
        if obstacle:
            raise UserError(f"{SETTING} asks for Triton, but {obstacle}")
        return "triton", f"{SETTING} asks for it"
    if device.type == "cpu":
        return "torch", "Triton needs a CUDA GPU"
    return ("torch", obstacle) if obstacle else ("triton", torch.cuda.get_device_name(device))


@functools.cache
def obstacle_to_triton(device: torch.device) -> str:
    """Why Triton cannot run on ``device``; empty if it can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if device.type == "cpu":
        return "" if interpreted() else "a CPU runs it only under TRITON_INTERPRET=1, for tests"
    if device.type != "cuda":
        return f"Triton does not know the device {device.type}"
    if torch.version.hip:
        return "the kernels have not been tried on AMD GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        return f"this GPU has compute capability {capability[0]}.{capability[1]}, and 8.0 is the least"
    return ""


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on the CPU (decided when Triton is first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "y", "yes")
