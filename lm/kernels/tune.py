"""Find the fastest tile sizes on this GPU and write them to the table: ``python -m lm.kernels.tune``.

Training never tunes: it looks sizes up in ``tile_sizes.json``, so that every run and every rank computes the same.

Tile sizes are compiled first and dropped, without being timed, if the machine code spills, needs too much shared memory
or serializes its products (the gate of ``lm.kernels.aot``). The others are timed on each class of work, long rows and
packed ones; the table takes those with the least geometric mean.
"""

from __future__ import annotations

import copy
import functools
import itertools
import math
import os
import time as clock
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import astuple
from multiprocessing import get_context
from typing import Any

import click
import torch

from lm.kernels import aot, dispatch, masks, tile_sizes
from lm.kernels.tile_sizes import TileSizes

WIDTHS = ("64", "128", "32", "16", "256")  # what most models use comes first
DTYPES = {"16": torch.bfloat16, "32": torch.float32}
# Other tile sizes must be this much faster than the current ones, or noise would rewrite the table.
WORTHWHILE = 1.02
SPILL_LIMIT = 256  # bytes: more has never been fast, and what spills less may be

Timer = Callable[[Callable[[], object]], float]


def candidates(kernel: str, bits: str) -> Iterator[TileSizes]:
    """Tile sizes worth trying. float32 does not use tensor cores and needs small tiles; decoding has few queries."""
    sizes = (64, 128) if bits == "16" else (16, 32, 64)
    queries = (16,) if kernel == "decoding_part" else sizes
    keys = (32, 64, 128) if bits == "16" else (16, 32, 64)
    for block_m, block_n, warps, stages in itertools.product(queries, keys, (4, 8), (1, 2, 3, 4)):
        per_warp = block_m * block_n // warps  # scores: more than 2,048 do not fit in its registers, few waste it
        if kernel == "decoding_part" or bits == "32" or 512 <= per_warp <= 2048:
            yield TileSizes(block_m, block_n, warps, stages)


def heads_of(width: int) -> int:
    return max(1, 1024 // width)


def workloads(width: int, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Callable[[], object]]]:
    """For each kernel of the table, a call to time for each class of work.

    "long" has 8 rows of 2,048 tokens with one document each, "packed" 16 with documents of 512 tokens on average; a
    quarter of the former and half of the latter are bidirectional. Decoding has a cache of 16,384 keys.
    """
    from lm.kernels import attention_triton, decoding_triton

    length, heads, scale = 2048, heads_of(width), width**-0.5
    calls: dict[str, dict[str, Callable[[], object]]] = {"decoding_part": {}}
    for name, rows, bidirectional_rows, mean_document in (("long", 8, 2, None), ("packed", 16, 8, 512)):
        q, k, v = (torch.randn(rows, length, heads, width, dtype=dtype, device=device) for _ in range(3))
        draws = torch.rand(rows, length, generator=torch.Generator().manual_seed(0))
        starts = draws < (1 / mean_document if mean_document else 0)
        lo, hi = (x.to(device) for x in masks.packed(starts, torch.arange(rows) < bidirectional_rows))
        out, lse = attention_triton.forward(q, k, v, lo, hi, scale, 0.0)
        forward = functools.partial(attention_triton.forward, q, k, v, lo, hi, scale, 0.0)
        backward = functools.partial(attention_triton.backward, out, q, k, v, out, lse, lo, hi, scale, 0.0)
        for kernel in ("attention_forward", "attention_query_gradient", "attention_key_gradient"):
            calls.setdefault(kernel, {})[name] = forward if kernel == "attention_forward" else backward
    q = torch.randn(4, 1, heads, width, dtype=dtype, device=device)
    cache = torch.randn(4, 16384, heads, width, dtype=dtype, device=device)
    cached = masks.causal(4, 1, past=16383, device=device)
    calls["decoding_part"]["cache"] = lambda: decoding_triton.forward(q, cache, cache, *cached, scale, 0.0)
    return calls


@contextmanager
def using(kernel: str, tiles: TileSizes) -> Iterator[None]:
    """Run one kernel with these tile sizes instead of the table's."""
    choose = tile_sizes.choose
    tile_sizes.choose = lambda name, *rest: tiles if name == kernel else choose(name, *rest)
    try:
        yield
    finally:
        tile_sizes.choose = choose


Times = dict[TileSizes, dict[str, float]]


def mean(times: Mapping[str, float]) -> float:
    """The geometric mean over the classes of work: a class counts by its ratios, however long it takes."""
    return math.exp(sum(map(math.log, times.values())) / len(times))


def fastest(
    kernel: str,
    current: TileSizes,
    choices: Iterable[TileSizes],
    calls: Mapping[str, Callable[[], object]],
    time: Timer,
) -> tuple[TileSizes, Times]:
    """The tile sizes to keep, and the milliseconds of all that ran, by class of work; ``current`` stays unless clearly
    beaten in the geometric mean."""
    times: Times = {}
    for choice in dict.fromkeys([current, *choices]):
        try:
            with using(kernel, choice):
                times[choice] = {name: time(call) for name, call in calls.items()}
        except Exception as error:  # Triton raises many kinds of errors for what a GPU cannot run
            click.echo(f"  {choice}: {str(error).splitlines()[0][:80]}", err=True)
    best = min(times, key=lambda choice: mean(times[choice]))
    kept = current if current in times and mean(times[current]) < WORTHWHILE * mean(times[best]) else best
    return kept, times


def sacrificed(kept: TileSizes, times: Times) -> str:
    """What each class would gain with tile sizes of its own, such as "packed 1.12 with 64 × 32"; empty if little."""
    found = []
    for name in times[kept]:
        best = min(times, key=lambda choice: times[choice][name])
        gain = times[kept][name] / times[best][name]
        if gain >= WORTHWHILE:
            found.append(f"{name} {gain:.2f} with {best}")
    return "; ".join(found)


Job = tuple[int, str, str, int, TileSizes]


def judge(job: Job) -> str:
    """Compile one kernel for an architecture with one choice of tile sizes, into Triton's cache on disk, for a later
    process; what the gate finds, or an empty string."""
    architecture, kernel, bits, width, choice = job
    try:
        with aot.compiling_for(architecture) as made, using(kernel, choice):
            aot.attention_case(DTYPES[bits], width, heads_of(width), heads_of(width), 0.0)
        compiled = aot.inspect_kernel(next(found for name, found in made if name == kernel))
    except Exception as error:  # the compiler raises many kinds
        return str(error).splitlines()[0][:80] if str(error) else type(error).__name__
    if compiled.spilled_bytes > SPILL_LIMIT:
        return f"spills {compiled.spilled_bytes} bytes"
    if compiled.shared_bytes > aot.SHARED_MEMORY_BYTES[int(tile_sizes.nearest(str(architecture)))]:
        return f"needs {compiled.shared_bytes:,} bytes of shared memory"
    return "serializes its products" if compiled.serialized else ""


def passing(jobs: list[Job], verdicts: Iterable[str]) -> dict[tuple[str, str, int], list[TileSizes]]:
    """The tile sizes that passed the gate, by kernel, bits and width."""
    found: dict[tuple[str, str, int], list[TileSizes]] = {}
    for (_, kernel, bits, width, choice), verdict in zip(jobs, verdicts, strict=True):
        kept = found.setdefault((kernel, bits, width), [])
        if not verdict:
            kept.append(choice)
    return found


@click.command()
@click.option("--kernel", "kernels", multiple=True, help="Tune only this kernel (may be repeated).")
@click.option("--width", "widths", multiple=True, type=click.Choice(WIDTHS), help="Only this head dimension.")
@click.option("--bits", "sizes", multiple=True, type=click.Choice(list(DTYPES)), help="Only dtypes of this size.")
@click.option("--minutes", default=10.0, show_default=True, help="Start no further head dimension after this time.")
def main(kernels: tuple[str, ...], widths: tuple[str, ...], sizes: tuple[str, ...], minutes: float) -> None:
    """Time the kernels with other tile sizes, and keep those that are at least 2 % faster."""
    if not torch.cuda.is_available() or dispatch.obstacle_to_triton(torch.device("cuda")):
        raise click.UsageError("the table can only be tuned on a GPU, and no CUDA GPU that runs the kernels was found")
    import triton.testing

    end = clock.monotonic() + 60 * minutes
    time = functools.partial(triton.testing.do_bench, warmup=5, rep=20, return_mode="median")
    device = torch.device("cuda")
    architecture = "".join(map(str, torch.cuda.get_device_capability(device)))
    table: dict[str, Any] = tile_sizes.table()
    entries = table.setdefault(architecture, copy.deepcopy(table[tile_sizes.nearest(architecture)]))
    for bits, width in itertools.product(sizes or DTYPES, map(int, widths or WIDTHS)):
        if clock.monotonic() >= end:
            click.echo(f"no time left for {bits} bits, heads of {width}", err=True)
            continue
        jobs = [
            (int(architecture), kernel, bits, width, choice)
            for kernel in (kernels or entries)
            for choice in candidates(kernel, bits)
        ]
        click.echo(f"compiling {len(jobs):,} kernels of {bits} bits for heads of {width}", err=True)
        workers = max(1, (os.cpu_count() or 1) - 2)
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            sound = passing(jobs, pool.map(judge, jobs, chunksize=2))
        for kernel, calls in workloads(width, DTYPES[bits], device).items():
            if kernels and kernel not in kernels:
                continue
            before = TileSizes(*entries[kernel][bits][str(width)])
            kept, times = fastest(kernel, before, sound[kernel, bits, width], calls, time)
            entries[kernel][bits][str(width)] = list(astuple(kept))
            old = mean(times[before]) if before in times else math.nan
            click.echo(
                f"{kernel} {bits} bits, heads of {width}: {before} {old:.3f} ms → {kept} {mean(times[kept]):.3f} ms"
            )
            if lost := sacrificed(kept, times):
                click.echo(f"  tile sizes of their own would gain: {lost}")
            tile_sizes.TABLE.write_text(tile_sizes.to_json(table), encoding="utf-8", newline="\n")
    click.echo("next: make kernels-aot UPDATE=--update, and review what changed")


if __name__ == "__main__":
    main()
