"""The candidates by name, each with the tile sizes that the gate and the card compare.

V1 to V5 are forward passes and B1 and B2 backward passes of ``docs/performance.md``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from benchmarks.gpu.candidates import backward_triton, forward_triton
from benchmarks.gpu.candidates.plan import Plan
from lm.kernels.tile_sizes import TileSizes

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Forward:
    """A forward pass for heads of ``width``: ``run(q, k, v, plan, scale, tiles=...)``, and the blocks of its tiles."""

    name: str
    width: int
    blocks: tuple[int, int]
    run: Callable[..., tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Backward:
    """A backward pass: ``run(grad_out, q, k, v, out, lse, plan, scale, tiles=...)``."""

    name: str
    width: int
    blocks: tuple[int, int]
    run: Callable[..., tuple[Tensor, Tensor, Tensor]]


# Form → width → tile sizes. Which compile well is in docs/performance.md, which are fast only a card can say.
FORWARD_SIZES: dict[str, dict[int, TileSizes]] = {
    "split": {64: TileSizes(64, 64, 4, 2), 128: TileSizes(64, 64, 4, 2)},
    "single": {64: TileSizes(64, 64, 4, 3), 128: TileSizes(64, 64, 4, 2)},
    "ahead": {64: TileSizes(64, 64, 4, 3)},
    "delayed": {128: TileSizes(128, 128, 8, 2)},
    "specialized": {64: TileSizes(128, 64, 4, 3), 128: TileSizes(128, 64, 4, 3)},
}
GLUON_SIZES = {64: (128, 2), 128: (128, 2)}  # keys, stages
NAMES = {
    "split": "V1 split",
    "single": "V2 single",
    "ahead": "V3 ahead",
    "delayed": "V3 delayed",
    "specialized": "V4 specialized",
    "two_pass": "B1 two_pass",
    "one_pass": "B2 one_pass",
}
BACKWARD_SIZES: dict[str, dict[int, tuple[TileSizes, TileSizes]]] = {
    "two_pass": {width: (TileSizes(64, 64, 4, 2), TileSizes(64, 128, 8, 2)) for width in (64, 128)},
    # At 128, all tiles tried spill more than 256 bytes of registers or leave a product to the older instructions.
    "one_pass": {64: (TileSizes(64, 64, 4, 2), TileSizes(64, 128, 8, 2))},
}


def triton_forward(form: str, width: int, sizes: TileSizes) -> Forward:
    def run(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float, tiles: Tensor | None = None) -> Pair:
        return forward_triton.forward(q, k, v, plan, scale, form, sizes, tiles)

    return Forward(NAMES[form], width, (sizes.block_m, sizes.block_n), run)


def triton_backward(form: str, width: int, of_queries: TileSizes, of_keys: TileSizes) -> Backward:
    run = partial(backward_triton.backward, form=form, of_queries=of_queries, of_keys=of_keys)
    return Backward(NAMES[form], width, (of_queries.block_m, of_queries.block_n), run)


def gluon_forward(width: int, block_n: int, stages: int) -> Forward:
    from benchmarks.gpu.candidates import forward_gluon  # Hopper only

    run = partial(forward_gluon.forward, block_n=block_n, stages=stages)
    return Forward("V5 gluon", width, (forward_gluon.BLOCK_M, block_n), run)


def forwards(architecture: int) -> list[Forward]:
    """The forward passes for an architecture with TMA.

    V4 and V5 are for Hopper alone: the compiler for sm_100 aborts on V4.
    """
    forms = {form: each for form, each in FORWARD_SIZES.items() if form != "specialized" or architecture == 90}
    found = [triton_forward(form, w, sizes) for form, each in forms.items() for w, sizes in each.items()]
    if architecture == 90:
        found += [gluon_forward(width, *sizes) for width, sizes in GLUON_SIZES.items()]
    return found


def backwards() -> list[Backward]:
    return [triton_backward(form, w, *sizes) for form, each in BACKWARD_SIZES.items() for w, sizes in each.items()]
