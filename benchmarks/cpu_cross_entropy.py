"""Compare time and memory of our output head and loss on the CPU, forward and backward, with PyTorch's.

    python -m benchmarks.cpu_cross_entropy [--rounds 7]

Peak memory is the increase of a separate process's resident memory during one call, including the returned gradients,
after a first call with few tokens has loaded everything that is needed.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from benchmarks.side_by_side import in_turn, table
from lm import kernels

TOKENS, VOCABULARY = 4096, 32768
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(hidden @ weight.T, targets, reduction="sum")


def pytorchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum")


def chunk(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return plain(hidden, weight, targets)


def checkpointed(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Eight chunks, whose logits are recomputed in the backward pass."""
    parts = zip(hidden.chunk(8), targets.chunk(8), strict=True)
    losses = [torch.utils.checkpoint.checkpoint(chunk, h, weight, t, use_reentrant=False) for h, t in parts]
    return torch.stack(losses).sum()


def candidates() -> dict[str, Loss]:
    losses: dict[str, Loss] = {
        "logits + F.cross_entropy": plain,
        "the same, compiled": torch.compile(plain),
        "in 8 checkpointed chunks, compiled": torch.compile(checkpointed),
        "kindling": kernels.linear_cross_entropy,
    }
    return losses | ({"F.linear_cross_entropy": pytorchs} if hasattr(F, "linear_cross_entropy") else {})


def inputs(tokens: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = (torch.randn(VOCABULARY, width) / width**0.5).requires_grad_()
    return hidden, weight, torch.randint(0, VOCABULARY, (tokens,))


def step(loss: Loss, tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss(*tensors), tensors[:2])


def resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM, the current or peak memory of this process."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found.group(1))


def peak_bytes(name: str, width: int) -> int:
    loss = candidates()[name]
    for tokens in (512, TOKENS) if "compiled" in name else (512,):
        step(loss, inputs(tokens, width))  # compiles a compiled one for the measured shape, too
    tensors = inputs(TOKENS, width)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak to the current memory
    before = resident("VmRSS")
    step(loss, tensors)
    return resident("VmHWM") - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    for width in (256, 512):
        tensors = inputs(TOKENS, width)
        calls = {name: partial(step, loss, tensors) for name, loss in candidates().items()}
        title = f"{TOKENS:,} tokens x {width} wide, vocabulary {VOCABULARY:,}, float32"
        print(table(title, in_turn(calls, rounds=rounds), "logits + F.cross_entropy"))
        for name in calls:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(f"  peak memory {pool.apply(peak_bytes, (name, width)) / 2**20:8,.0f} MiB  {name}", flush=True)
