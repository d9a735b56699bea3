"""Tile sizes, warps and pipeline stages of the kernels: looked up in a table, never tuned during training.

``tile_sizes.json`` maps architecture, kernel, bits of the dtype and head dimension to four numbers.
``python -m lm.kernels.tune`` measures and writes them on a GPU of that architecture.
"""

from __future__ import annotations

import functools
import json
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from lm.kernels import dispatch

TABLE = Path(__file__).with_suffix(".json")
SMALLEST_WIDTH, LARGEST_WIDTH = 16, 256
# Small in the interpreter, where time depends on the number of operations.
INTERPRETED = (32, 32, 4, 1)


@dataclass(frozen=True)
class TileSizes:
    """The tiling of one kernel: ``block_m`` queries by ``block_n`` keys, and how a tile is computed."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """The keyword arguments of a kernel's launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def padded_width(width: int) -> int:
    """The power of two to which a head of ``width`` is padded; tensor cores need at least 16."""
    return max(SMALLEST_WIDTH, 1 << (width - 1).bit_length())


def choose(kernel: str, dtype: torch.dtype, width: int) -> TileSizes:
    """The tile sizes of ``kernel`` on the current device; ``width`` is the head dimension, at most 256."""
    if dispatch.interpreted():
        return TileSizes(*INTERPRETED)
    from triton.runtime import driver

    architecture = str(driver.active.get_current_target().arch)
    return table()[nearest(architecture)][kernel][str(8 * dtype.itemsize)][padded_width(width)]


def nearest(architecture: str) -> str:
    """The architecture whose entries are used for this one.

    If it has none, one with the same shared memory per block: 99 KiB on consumer cards from 8.6, 227 KiB (Hopper's) on
    Blackwell's data center cards, otherwise 163 KiB (Ampere's).
    """
    if architecture in table():
        return architecture
    number = int(architecture)
    return "120" if number in (86, 87, 89) or number > 110 else "90" if number > 90 else "80"


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[int, TileSizes]]]]:
    """Architecture → kernel → bits → padded head dimension → tile sizes."""
    return {
        architecture: {
            kernel: {
                bits: {int(width): TileSizes(*numbers) for width, numbers in widths.items()}
                for bits, widths in by_bits.items()
            }
            for kernel, by_bits in kernels.items()
        }
        for architecture, kernels in json.loads(TABLE.read_text(encoding="utf-8")).items()
    }


def to_json(entries: dict[str, dict[str, dict[str, dict[int, TileSizes]]]]) -> str:
    """The text of ``tile_sizes.json``, one line per kernel and size of dtype."""
    architectures = []
    for architecture, kernels in sorted(entries.items(), key=lambda item: int(item[0])):
        lines = []
        for kernel, by_bits in kernels.items():
            sizes = (
                f'   "{bits}": {{'
                + ", ".join(f'"{width}": {json.dumps(astuple(widths[width]))}' for width in sorted(widths))
                + "}"
                for bits, widths in by_bits.items()
            )
            lines.append(f'  "{kernel}": {{\n' + ",\n".join(sizes) + "\n  }")
        architectures.append(f' "{architecture}": {{\n' + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(architectures) + "\n}\n"
