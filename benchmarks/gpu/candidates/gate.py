"""Compile the candidates without a GPU, and check their machine code: ``python -m benchmarks.gpu.candidates``.

The gate of ``lm.kernels.aot``, with a snapshot of its own, so that ``make kernels-aot`` takes no longer.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch

from benchmarks.gpu.candidates import variants
from benchmarks.gpu.candidates.plan import make_plan
from lm.kernels import aot, dispatch, masks
from lm.kernels.aot import Compiled

SNAPSHOT = Path(__file__).with_name("aot.json")
ARCHITECTURES = (80, 90, 100, 120)  # without TMA, on sm_80, descriptors become pointers: a candidate need only compile
MOST_SPILLED_BYTES = 256  # as the library's key gradient may on Hopper
HELPERS = ("candidate_prepare",)  # they have no products


def forward_case(architecture: int, name: str, width: int) -> None:
    """Compile a forward pass for causal masks; in V4 they need the upper bound only."""
    (chosen,) = (f for f in variants.forwards(architecture) if (f.name, f.width) == (name, width))
    q, k = (torch.zeros(2, 256, heads, width, dtype=torch.bfloat16) for heads in (4, 2))
    chosen.run(q, k, k, make_plan(*masks.causal(2, 256), 256), 0.1)


def backward_case(architecture: int, name: str, width: int) -> None:
    (chosen,) = (b for b in variants.backwards() if (b.name, b.width) == (name, width))
    q, k = (torch.zeros(2, 256, heads, width, dtype=torch.bfloat16) for heads in (4, 2))
    lse = torch.zeros(2, 4, 256)
    chosen.run(q, q, k, k, q, lse, make_plan(*masks.causal(2, 256), 256), 0.1)


def cases(architecture: int) -> list[aot.Case]:
    """A case for each candidate, named like "bfloat16 64 V1 split"."""
    return [
        *(
            (f"bfloat16 {f.width} {f.name}", forward_case, (architecture, f.name, f.width))
            for f in variants.forwards(architecture)
        ),
        *(
            (f"bfloat16 {b.width} {b.name}", backward_case, (architecture, b.name, b.width))
            for b in variants.backwards()
        ),
    ]


def problems(result: dict[str, Compiled]) -> list[str]:
    """What rules a candidate out before it is timed, one sentence each."""
    found = aot.problems(result)
    for name, compiled in result.items():
        architecture, kernel = name.split()[0], name.split()[-1]
        if kernel not in HELPERS and not (compiled.wgmma or compiled.mma):
            found.append(f"{name} does not use the tensor cores")
        if architecture != "sm_90":
            continue  # the tile sizes are Hopper's: elsewhere a candidate must compile and fit
        if compiled.spilled_bytes > MOST_SPILLED_BYTES:
            found.append(f"{name} spills {compiled.spilled_bytes} bytes of registers")
        if ("V4" in name or "V5" in name) and compiled.warps != 12:
            found.append(f"{name} has {compiled.warps} warps: the work was not divided among groups of warps")
    return found


@click.command()
@click.option("--update", is_flag=True, help="Write the result to the snapshot instead of comparing it.")
@click.option("--arch", "architectures", multiple=True, type=click.Choice([str(a) for a in ARCHITECTURES]))
@click.option("--only", default="", help='Only candidates with this in their name, such as "V3" or "64"; not compared.')
def main(update: bool, architectures: tuple[str, ...], only: str) -> None:
    """Compile the candidates for sm_80, sm_90, sm_100 and sm_120, without a GPU."""
    if dispatch.interpreted():
        raise click.UsageError("unset TRITON_INTERPRET: the interpreter compiles no kernels")
    tasks = [
        (architecture, case)
        for architecture in map(int, architectures or ARCHITECTURES)
        for case in cases(architecture)
        if only in case[0]
    ]
    result = aot.compile_all(tasks)
    aot.settle(result, problems(result), SNAPSHOT, update=update, whole=not (only or architectures))
