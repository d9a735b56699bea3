from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner

from lm.kernels import tile_sizes, tune
from lm.kernels.tile_sizes import TileSizes

CURRENT, OTHER, BROKEN = TileSizes(64, 64, 4, 2), TileSizes(128, 64, 4, 2), TileSizes(128, 128, 4, 4)


def timer(milliseconds: dict[TileSizes, float]):
    """A timer that returns the given times instead of measuring."""

    def time(call) -> float:
        chosen = call()
        if chosen not in milliseconds:
            raise RuntimeError("out of resource: shared memory")
        return milliseconds[chosen]

    return time


def call() -> TileSizes:
    return tile_sizes.choose("attention_forward", torch.bfloat16, 64)


@pytest.mark.parametrize(("faster", "kept"), [(0.5, OTHER), (0.99, CURRENT), (2.0, CURRENT)])
def test_the_fastest_is_kept_if_it_is_clearly_faster(faster, kept):
    choices = iter([OTHER, BROKEN])
    found, times = tune.fastest("attention_forward", CURRENT, choices, call, timer({CURRENT: 1.0, OTHER: faster}))
    assert found == kept
    assert times == {CURRENT: 1.0, OTHER: faster}


def test_tile_sizes_that_cannot_run_are_skipped_even_if_they_are_in_the_table():
    found, times = tune.fastest("attention_forward", BROKEN, iter([OTHER]), call, timer({OTHER: 1.0}))
    assert found == OTHER
    assert BROKEN not in times


def test_only_the_tuned_kernel_uses_the_other_tile_sizes(monkeypatch):
    monkeypatch.setattr(tile_sizes, "choose", lambda *_: CURRENT)
    with tune.using("attention_forward", OTHER):
        assert call() == OTHER
        assert tile_sizes.choose("decoding_part", torch.bfloat16, 64) == CURRENT
    assert call() == CURRENT


def test_candidates_are_tiles_that_the_kernels_take():
    for kernel in tile_sizes.table()["90"]:
        for bits in tune.DTYPES:
            for choice in tune.candidates(kernel, bits):
                assert min(choice.block_m, choice.block_n) >= 16


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = CliRunner().invoke(tune.main, [])
    assert result.exit_code == 2
    assert "no CUDA GPU" in result.output
