from __future__ import annotations

import json

import pytest
import torch
import triton.runtime

from lm.kernels import tile_sizes
from lm.kernels.aot import ARCHITECTURES, SHARED_MEMORY_BYTES, fake_driver
from lm.kernels.tile_sizes import TileSizes

KERNELS = ("attention_forward", "attention_query_gradient", "attention_key_gradient", "decoding_part")


@pytest.fixture
def on_gpu(monkeypatch):
    """Make Triton see a GPU of an architecture."""

    def pretend(architecture: int) -> None:
        monkeypatch.setattr(triton.runtime.driver, "_active", fake_driver(architecture))

    monkeypatch.setenv("TRITON_INTERPRET", "0")
    return pretend


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_table_has_every_kernel_size_of_dtype_and_head_dimension(on_gpu, architecture):
    on_gpu(architecture)
    for kernel in KERNELS:
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            for width in range(1, 257):
                chosen = tile_sizes.choose(kernel, dtype, width)
                for size in (chosen.block_m, chosen.block_n):
                    assert size >= 16
                    assert size.bit_count() == 1
                assert chosen.num_warps in (4, 8)


def test_hoppers_wgmma_needs_64_queries_per_four_warps():
    for kernel in KERNELS[:3]:
        for width in (64, 128):
            chosen = TileSizes(*tile_sizes.table()["90"][kernel]["16"][str(width)])
            lines = chosen.block_n if kernel == "attention_key_gradient" else chosen.block_m
            assert lines >= 64


@pytest.mark.parametrize(
    ("architecture", "substitute"),
    [
        *[("80", "80"), ("90", "90"), ("100", "90"), ("103", "90")],
        *[(consumer, "120") for consumer in ("86", "87", "89", "120", "121")],
    ],
)
def test_an_architecture_without_an_entry_uses_one_with_no_more_shared_memory(architecture, substitute):
    assert tile_sizes.nearest(architecture) == substitute
    assert int(substitute) in SHARED_MEMORY_BYTES


@pytest.mark.parametrize(
    ("width", "padded"), [(1, 16), (16, 16), (17, 32), (64, 64), (80, 128), (128, 128), (129, 256), (256, 256)]
)
def test_heads_are_padded_to_powers_of_two_that_tensor_cores_take(width, padded):
    assert tile_sizes.padded_width(width) == padded


def test_the_table_is_written_as_it_was_read():
    text = tile_sizes.to_json(tile_sizes.table())
    assert text == tile_sizes.TABLE.read_text(encoding="utf-8")
    assert json.loads(text)


def test_the_interpreter_has_small_tiles(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert tile_sizes.choose("attention_forward", torch.float32, 64) == TileSizes(32, 32, 4, 1)
