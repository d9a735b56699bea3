"""Tile sizes, warps and pipeline stages of the kernels: looked up in a table, never tuned while training.

``configurations.json`` maps architecture, kernel, bits of the dtype and head dimension to four numbers. It is written
by ``python -m lm.kernels.tune`` on the GPU in question.
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
# Tested tile sizes are small there, for the interpreter's cost is the number of operations.
INTERPRETED = (32, 32, 4, 1)


@dataclass(frozen=True)
class Configuration:
    """How one kernel is cut: ``block_m`` queries and ``block_n`` keys a tile."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """As the keyword arguments of a kernel's launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


def padded(width: int) -> int:
    """The power of two in which a head of ``width`` is computed; tensor cores want 16 at least."""
    return max(SMALLEST_WIDTH, 1 << (width - 1).bit_length())


def choose(kernel: str, dtype: torch.dtype, width: int) -> Configuration:
    """The entry for the current device; ``width`` is the head dimension, at most 256."""
    if dispatch.interpreted():
        return Configuration(*INTERPRETED)
    from triton.runtime import driver

    architecture = str(driver.active.get_current_target().arch)
    return table()[nearest(architecture)][kernel][str(8 * dtype.itemsize)][padded(width)]


def nearest(architecture: str) -> str:
    """The architecture of the table that stands for this one.

    Where there is no entry, one with the same shared memory a block serves: 99 KiB on consumer cards from 8.6 on, the
    227 KiB of Hopper on Blackwell's data-centre cards, else the 163 KiB of Ampere's.
    """
    if architecture in table():
        return architecture
    number = int(architecture)
    return "120" if number in (86, 87, 89) or number > 110 else "90" if number > 90 else "80"


@functools.cache
def table() -> dict[str, dict[str, dict[str, dict[int, Configuration]]]]:
    """Architecture → kernel → bits → padded head dimension → configuration."""
    return {
        architecture: {
            kernel: {
                bits: {int(width): Configuration(*numbers) for width, numbers in widths.items()}
                for bits, widths in by_bits.items()
            }
            for kernel, by_bits in kernels.items()
        }
        for architecture, kernels in json.loads(TABLE.read_text(encoding="utf-8")).items()
    }


def to_json(entries: dict[str, dict[str, dict[str, dict[int, Configuration]]]]) -> str:
    """The text of ``configurations.json`` for a table, one line for each kernel and size of dtype."""
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
