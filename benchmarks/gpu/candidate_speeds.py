"""The candidate attention kernels on a GPU: are they right, and how fast are they next to the library's and PyTorch's.

python -m benchmarks.gpu --only candidate_errors|candidate_forward|candidate_backward [--candidate V1 …]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import attention as library
from benchmarks.gpu.candidates import variants
from benchmarks.gpu.candidates.plan import make_plan
from benchmarks.gpu.timing import milliseconds
from lm.kernels import reference

# (mask, length) of the workloads: long rows and packed ones.
WORKLOADS = (("causal", 1024), ("causal", 4096), ("full", 4096), ("packed", 4096))
WIDTHS = (64, 128)
MOST_ERROR = 2.0  # times that of the library's kernel
Lines = Iterator[dict[str, Any]]
Call = Callable[[], tuple[Tensor, ...]]


def architecture() -> int:
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def chosen_forwards(width: int, names: tuple[str, ...]) -> list[variants.Forward]:
    """The forward passes for this width whose name begins with one of ``names``; all if there are none."""
    return [f for f in variants.forwards(architecture()) if f.width == width and f.name.startswith(names or ("",))]


def chosen_backwards(width: int, names: tuple[str, ...]) -> list[variants.Backward]:
    return [b for b in variants.backwards() if b.width == width and b.name.startswith(names or ("",))]


def errors(found: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> list[float]:
    """The largest absolute error of each; infinite if one is not finite where it should be."""
    differences = [(a.double() - b).abs().nan_to_num(nan=float("inf")) for a, b in zip(found, exact, strict=True)]
    return [float(difference.max()) for difference in differences]


def verdict(call: Call, exact: tuple[Tensor, ...], of_library: list[float]) -> dict[str, Any]:
    """Errors of a candidate against float64, and whether it is right: no error is more than twice the library's, and a
    second call gives the same bits."""
    try:
        first, second = call(), call()
    except RuntimeError as error:  # it cannot be launched here
        return {"right": False, "failed": str(error).splitlines()[0]}
    found = errors(first, exact)
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    small = all(a <= MOST_ERROR * b + 1e-6 for a, b in zip(found, of_library, strict=True))
    return {"right": same and small, "same_bits": same, "errors": found, "library": of_library}


def verdicts(device: torch.device, names: tuple[str, ...] = ()) -> Lines:
    """The ``verdict`` on each candidate for several masks and inputs."""
    for width in WIDTHS:
        scale = width**-0.5
        for kind, fill in (("causal", "random"), ("packed", "random"), ("hybrid", "random"), ("hybrid", "ones")):
            case = {"width": width, "mask": kind, "inputs": fill}
            q, k, v = library.inputs(2, 509, 4, width, torch.bfloat16, device)
            if fill == "ones":
                q, k, v = (torch.ones_like(x).requires_grad_() for x in (q, k, v))
            lo, hi, _ = library.intervals(kind, 2, 509, device)
            direction = torch.randn_like(q)
            exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
            truth, _ = reference.attention(exact[0], exact[1], exact[2], lo, hi)
            truths = torch.autograd.grad(truth, exact, direction.double())
            out, lse = library.attention(q, k, v, lo, hi)
            of_out = errors((out,), (truth,))
            of_gradients = errors(torch.autograd.grad(out, (q, k, v), direction), truths)
            plan = make_plan(lo, hi, 509)
            inputs = (q.detach(), k.detach(), v.detach())
            for f in chosen_forwards(width, names):
                call = partial(first_only, partial(f.run, *inputs, plan, scale))
                yield {"candidate": f.name, **case, **verdict(call, (truth.detach(),), of_out)}
            for b in chosen_backwards(width, names):
                run = partial(b.run, direction, *inputs, out.detach(), lse, plan, scale)
                yield {"candidate": b.name, **case, **verdict(run, truths, of_gradients)}


def first_only(call: Call) -> tuple[Tensor, ...]:
    return call()[:1]


def forward_speeds(device: torch.device, names: tuple[str, ...] = ()) -> Lines:
    """TFLOP/s of each forward pass, in turn with the library's and PyTorch's. A batch's tiles are made beforehand."""
    for width in WIDTHS:
        for kind, length in WORKLOADS:
            _, q, k, v, lo, hi, documents = library.setting(width, length, kind, torch.bfloat16, device)
            flops = 4 * float((hi - lo).sum()) * q.shape[2] * width
            ways: dict[str, Callable[[], object]] = dict(library.candidates(kind, q, k, v, lo, hi, documents))
            plan = make_plan(lo, hi, length)
            for f in chosen_forwards(width, names):
                tiles = plan.tiles(*f.blocks)
                ways[f.name] = partial(f.run, q.detach(), k.detach(), v.detach(), plan, width**-0.5, tiles=tiles)
            with torch.no_grad():
                times = milliseconds(ways)
                making = milliseconds({"plan": partial(make_plan, lo, hi, length)})
            speeds = {name: t and round(flops / t / 1e9, 1) for name, t in times.items()}
            yield {"width": width, "length": length, "mask": kind, "forward_tflops": speeds, "plan_ms": making["plan"]}


def backward_speeds(device: torch.device, names: tuple[str, ...] = ()) -> Lines:
    """TFLOP/s of each backward pass, as ``forward_speeds``."""
    for width in WIDTHS:
        for kind, length in WORKLOADS:
            _, q, k, v, lo, hi, documents = library.setting(width, length, kind, torch.bfloat16, device)
            flops = 10 * float((hi - lo).sum()) * q.shape[2] * width
            direction = torch.randn_like(q)
            out, lse = (x.detach() for x in library.attention(q, k, v, lo, hi))
            ways: dict[str, Callable[[], object]] = {}
            for name, way in library.candidates(kind, q, k, v, lo, hi, documents).items():
                try:
                    ways[name] = partial(torch.autograd.grad, way(), (q, k, v), direction, retain_graph=True)
                except RuntimeError as error:  # PyTorch has no such kernel for this shape
                    print(f"    {name}: {str(error).splitlines()[0][:100]}", flush=True)
            plan = make_plan(lo, hi, length)
            inputs = [x.detach() for x in (q, k, v)]
            for b in chosen_backwards(width, names):
                tiles = plan.tiles(*b.blocks)
                ways[b.name] = partial(b.run, direction, *inputs, out, lse, plan, width**-0.5, tiles=tiles)
            speeds = {name: t and round(flops / t / 1e9, 1) for name, t in milliseconds(ways).items()}
            yield {"width": width, "length": length, "mask": kind, "backward_tflops": speeds}
