"""Tile sizes, warps and pipeline stages of the kernels: looked up in a table, never tuned during training.

``python -m lm.kernels.tune`` measures them on a GPU of an architecture and writes them to ``tile_sizes.json``.
"""

from __future__ import annotations

import functools
import json
import re
from dataclasses import astuple, dataclass
from pathlib import Path

import torch

from lm.kernels import dispatch

TABLE = Path(__file__).with_suffix(".json")
# Architecture → kernel → bits of the dtype → padded head dimension → the four numbers of TileSizes.
Table = dict[str, dict[str, dict[str, dict[str, list[int]]]]]


@dataclass(frozen=True)
class TileSizes:
    """The tiling of one kernel: ``block_m`` queries by ``block_n`` keys, and how a tile is computed."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def arguments(self) -> dict[str, int]:
        """The keyword arguments of a kernel's launch."""
        return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), astuple(self), strict=True))


def padded_width(width: int) -> int:
    """The power of two to which a head of ``width`` is padded; tensor cores need at least 16."""
    return max(16, 1 << (width - 1).bit_length())


def choose(kernel: str, dtype: torch.dtype, width: int) -> TileSizes:
    """The tile sizes of ``kernel`` on the current device; ``width`` is the head dimension, at most 256."""
    if dispatch.interpreted():
        return TileSizes(32, 32, 4, 1)  # small, because time depends on the number of operations
    from triton.runtime import driver

    architecture = str(driver.active.get_current_target().arch)
    numbers = table()[nearest(architecture)][kernel][str(8 * dtype.itemsize)][str(padded_width(width))]
    return TileSizes(*numbers)


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
def table() -> Table:
    """The content of ``tile_sizes.json``."""
    return json.loads(TABLE.read_text(encoding="utf-8"))


def to_json(entries: Table) -> str:
    """The text of ``tile_sizes.json``, one line per kernel and size of dtype."""
    text = json.dumps(dict(sorted(entries.items(), key=lambda item: int(item[0]))), indent=1)
    return re.sub(r"\{[^{}]*\}", lambda innermost: json.dumps(json.loads(innermost[0])), text) + "\n"
