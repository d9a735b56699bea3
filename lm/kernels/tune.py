"""Find the fastest tile sizes on this GPU and write them to the table: ``python -m lm.kernels.tune``.

Training never tunes: it looks sizes up in ``tile_sizes.json``, so that every run and every rank computes the same.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import astuple
from multiprocessing import get_context

import click
import torch

from lm.kernels import dispatch, masks, tile_sizes
from lm.kernels.tile_sizes import TileSizes

WIDTHS = ("16", "32", "64", "128", "256")
DTYPES = {"16": torch.bfloat16, "32": torch.float32}
# Other tile sizes must be this much faster than the current ones, or noise would rewrite the table.
WORTHWHILE = 1.02

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


def workloads(width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """A call to time for each kernel of the table: a cache of 16,384 keys, or a batch of 16 rows of 2,048 tokens.

    12 rows are packed with documents of 1,024 tokens on average and 4 hold one document each. Some rows of either kind
    are bidirectional, so that each of the four combinations makes up between an eighth and a third of the work.
    """
    from lm.kernels import attention_triton, decoding_triton

    rows, length, heads, scale = 16, 2048, max(1, 1024 // width), width**-0.5
    q, k, v = (torch.randn(rows, length, heads, width, dtype=dtype, device=device) for _ in range(3))
    starts = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) < 1 / 1024
    starts[12:] = False
    bidirectional = torch.zeros(rows, dtype=torch.bool)
    bidirectional[8:13] = True
    lo, hi = (bound.to(device) for bound in masks.packed(starts, bidirectional))
    out, lse = attention_triton.forward(q, k, v, lo, hi, scale, 0.0)
    cache = torch.randn(4, 16384, heads, width, dtype=dtype, device=device)
    cached = masks.causal(4, 1, past=16383, device=device)

    def backward() -> object:
        return attention_triton.backward(out, q, k, v, out, lse, lo, hi, scale, 0.0)

    return {
        "attention_forward": lambda: attention_triton.forward(q, k, v, lo, hi, scale, 0.0),
        "attention_query_gradient": backward,
        "attention_key_gradient": backward,
        "decoding_part": lambda: decoding_triton.forward(q[:4, :1], cache, cache, *cached, scale, 0.0),
    }


@contextmanager
def using(kernel: str, tiles: TileSizes) -> Iterator[None]:
    """Run one kernel with these tile sizes instead of the table's."""
    choose = tile_sizes.choose
    tile_sizes.choose = lambda name, *rest: tiles if name == kernel else choose(name, *rest)
    try:
        yield
    finally:
        tile_sizes.choose = choose


def fastest(
    kernel: str, current: TileSizes, choices: Iterator[TileSizes], call: Callable[[], object], time: Timer
) -> tuple[TileSizes, dict[TileSizes, float]]:
    """The tile sizes to keep, and the milliseconds of all that ran; ``current`` stays unless clearly beaten."""
    times: dict[TileSizes, float] = {}
    for choice in dict.fromkeys([current, *choices]):
        try:
            with using(kernel, choice):
                times[choice] = time(call)
        except Exception as error:  # Triton raises many kinds of errors for what a GPU cannot run
            click.echo(f"  {choice}: {str(error).splitlines()[0][:80]}", err=True)
    best = min(times, key=times.__getitem__)
    kept = current if current in times and times[current] < WORTHWHILE * times[best] else best
    return kept, times


def compile_ahead(case: tuple[str, str, int, TileSizes]) -> None:
    """Compile one kernel with one choice of tile sizes into Triton's cache on disk, for a later process."""
    kernel, bits, width, choice = case
    call = workloads(width, DTYPES[bits], torch.device("cuda"))[kernel]
    with using(kernel, choice), suppress(Exception):  # ``fastest`` reports what cannot be compiled
        call()


@click.command()
@click.option("--kernel", "kernels", multiple=True, help="Tune only this kernel (may be repeated).")
@click.option("--width", "widths", multiple=True, type=click.Choice(WIDTHS), help="Only this head dimension.")
@click.option("--bits", "sizes", multiple=True, type=click.Choice(list(DTYPES)), help="Only dtypes of this size.")
def main(kernels: tuple[str, ...], widths: tuple[str, ...], sizes: tuple[str, ...]) -> None:
    """Time the kernels with other tile sizes, and keep those that are at least 2 % faster."""
    if not torch.cuda.is_available() or dispatch.obstacle_to_triton(torch.device("cuda")):
        raise click.UsageError("the table can only be tuned on a GPU, and no CUDA GPU that runs the kernels was found")
    import triton.testing

    time = functools.partial(triton.testing.do_bench, warmup=10, rep=30, return_mode="median")
    device = torch.device("cuda")
    architecture = "".join(map(str, torch.cuda.get_device_capability(device)))
    table = tile_sizes.table()
    entries = table.setdefault(architecture, copy.deepcopy(table[tile_sizes.nearest(architecture)]))
    requested = list(itertools.product(sizes or DTYPES, map(int, widths or WIDTHS)))
    cases = [
        (kernel, bits, width, choice)
        for bits, width in requested
        for kernel in (kernels or entries)
        for choice in candidates(kernel, bits)
    ]
    click.echo(f"compiling {len(cases):,} kernels", err=True)
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 2), get_context("spawn")) as pool, suppress(BrokenExecutor):
        list(pool.map(compile_ahead, cases, chunksize=8))
    for bits, width in requested:
        for kernel, call in workloads(width, DTYPES[bits], device).items():
            if kernels and kernel not in kernels:
                continue
            before = TileSizes(*entries[kernel][bits][str(width)])
            kept, times = fastest(kernel, before, candidates(kernel, bits), call, time)
            entries[kernel][bits][str(width)] = list(astuple(kept))
            old = f"{before} {times.get(before, float('nan')):.3f} ms"
            click.echo(f"{kernel} {bits} bits, heads of {width}: {old} → {kept} {times[kept]:.3f} ms")
            tile_sizes.TABLE.write_text(tile_sizes.to_json(table), encoding="utf-8", newline="\n")
    click.echo("next: make kernels-aot UPDATE=--update, and review what changed")


if __name__ == "__main__":
    main()
