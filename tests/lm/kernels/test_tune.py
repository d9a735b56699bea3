from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from lm.kernels import aot, tile_sizes, tune
from lm.kernels.aot import Compiled
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
    choices = [OTHER, BROKEN]
    time = timer({CURRENT: 1.0, OTHER: faster})
    found, times = tune.fastest("attention_forward", CURRENT, choices, {"long": call}, time)
    assert found == kept
    assert times == {CURRENT: {"long": 1.0}, OTHER: {"long": faster}}


def test_classes_of_work_count_by_their_ratios_and_what_one_loses_is_said():
    # Twice as fast on long rows, which take long, and three times as slow on packed ones.
    milliseconds = {("long", CURRENT): 100.0, ("packed", CURRENT): 1.0, ("long", OTHER): 50.0, ("packed", OTHER): 3.0}
    calls = {name: lambda name=name: (name, call()) for name in ("long", "packed")}
    found, times = tune.fastest("attention_forward", CURRENT, [OTHER], calls, lambda run: milliseconds[run()])
    assert found == CURRENT
    assert tune.mean(times[CURRENT]) == pytest.approx(10)
    assert tune.sacrificed(CURRENT, times) == f"long 2.00 with {OTHER}"


def test_tile_sizes_that_cannot_run_are_skipped_even_if_they_are_in_the_table():
    found, times = tune.fastest("attention_forward", BROKEN, [OTHER], {"long": call}, timer({OTHER: 1.0}))
    assert found == OTHER
    assert BROKEN not in times


def test_what_fails_the_gate_is_not_timed(monkeypatch):
    good = Compiled(128, 0, 65536, 4, 16, 0, 0, 300, 0)
    made = {
        CURRENT: good,
        OTHER: replace(good, spilled_bytes=300),
        BROKEN: replace(good, shared_bytes=300_000),
        TileSizes(64, 32, 4, 2): replace(good, serialized=1),
    }
    monkeypatch.setattr(aot, "attention_case", lambda *_: None)
    monkeypatch.setattr(aot, "inspect_kernel", lambda kernel: made[kernel])

    class Compilations(list):
        """What has been compiled once a case has run: the chosen tile sizes stand for the kernel."""

        def __iter__(self):
            return iter([("attention_forward", call())])

    @contextmanager
    def compiling_for(_):
        yield Compilations()

    monkeypatch.setattr(aot, "compiling_for", compiling_for)
    jobs = [(90, "attention_forward", "16", 64, choice) for choice in made]
    verdicts = []
    for job in jobs:
        with tune.using("attention_forward", job[-1]):
            verdicts.append(tune.judge(job))
    assert verdicts == ["", "spills 300 bytes", "needs 300,000 bytes of shared memory", "serializes its products"]
    assert tune.passing(jobs, verdicts) == {("attention_forward", "16", 64): [CURRENT]}


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
