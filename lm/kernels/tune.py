"""Find the fastest tile sizes on the GPU that is here and write them into the table: ``python -m lm.kernels.tune``.

Training never tunes: it looks up ``configurations.json``, so that every run and every rank computes alike.
"""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from contextlib import contextmanager, suppress
from multiprocessing import get_context

import click
import torch

from lm.kernels import dispatch, masks, tile_sizes
from lm.kernels.tile_sizes import Configuration

WIDTHS = (16, 32, 64, 128, 256)
DTYPES = {"16": torch.bfloat16, "32": torch.float32}
# Another configuration must be this much faster than the one that stands, or noise would rewrite the table.
WORTHWHILE = 1.02

Timer = Callable[[Callable[[], object]], float]


def candidates(kernel: str, bits: str) -> Iterator[Configuration]:
    """What is worth trying. float32 multiplies without tensor cores and needs small tiles; decoding has few queries."""
    sizes = (64, 128) if bits == "16" else (16, 32, 64)
    queries = (16,) if kernel == "decoding_part" else sizes
    keys = (32, 64, 128) if bits == "16" else (16, 32, 64)
    for block_m, block_n, warps, stages in itertools.product(queries, keys, (4, 8), (1, 2, 3, 4)):
        a_warp = block_m * block_n // warps  # scores: more than 2,048 do not fit into its registers, few are soon done
        if kernel == "decoding_part" or bits == "32" or 512 <= a_warp <= 2048:
            yield Configuration(block_m, block_n, warps, stages)


def workloads(width: int, dtype: torch.dtype, device: torch.device) -> dict[str, Callable[[], object]]:
    """For each kernel of the table, a call whose time it decides: a cache of 16,384 keys, or a batch of rows of 2,048.

    Of the 16 rows, 12 are packed with documents of 1,024 tokens on average and 4 are of one document; of each kind,
    some are read both ways, so that each makes up between an eighth and a third of the work.
    """
    from lm.kernels import attention_triton, decoding_triton

    rows, length, heads, scale = 16, 2048, max(1, 1024 // width), width**-0.5
    q, k, v = (torch.randn(rows, length, heads, width, dtype=dtype, device=device) for _ in range(3))
    starts = torch.rand(rows, length, generator=torch.Generator().manual_seed(0)) < 1 / 1024
    starts[12:] = False
    both_ways = torch.zeros(rows, dtype=torch.bool)
    both_ways[8:13] = True
    lo, hi = (bound.to(device) for bound in masks.packed(starts, both_ways))
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
def using(kernel: str, configuration: Configuration) -> Iterator[None]:
    """Let one kernel run in another configuration than the table's."""
    choose = tile_sizes.choose
    tile_sizes.choose = lambda name, *rest: configuration if name == kernel else choose(name, *rest)
    try:
        yield
    finally:
        tile_sizes.choose = choose


def fastest(
    kernel: str, standing: Configuration, choices: Iterator[Configuration], call: Callable[[], object], time: Timer
) -> tuple[Configuration, dict[Configuration, float]]:
    """The configuration to keep, and the milliseconds of all that ran; ``standing`` stays unless clearly beaten."""
    times: dict[Configuration, float] = {}
    for choice in dict.fromkeys([standing, *choices]):
        try:
            with using(kernel, choice):
                times[choice] = time(call)
        except Exception as error:  # what a GPU cannot run, Triton tells with errors of many kinds
            click.echo(f"  {choice}: {str(error).splitlines()[0][:80]}", err=True)
    best = min(times, key=times.__getitem__)
    kept = standing if standing in times and times[standing] < WORTHWHILE * times[best] else best
    return kept, times


def compile_ahead(case: tuple[str, str, int, Configuration]) -> None:
    """Compile one kernel in one configuration, for a later process to find in Triton's cache on disk."""
    kernel, bits, width, choice = case
    call = workloads(width, DTYPES[bits], torch.device("cuda"))[kernel]
    with using(kernel, choice), suppress(Exception):  # ``fastest`` tells what cannot be compiled
        call()


@click.command()
@click.option("--kernel", "kernels", multiple=True, help="Only this kernel of the table (may be repeated).")
@click.option("--width", "widths", multiple=True, type=click.Choice([str(w) for w in WIDTHS]))
@click.option("--bits", "sizes", multiple=True, type=click.Choice(list(DTYPES)))
def main(kernels: tuple[str, ...], widths: tuple[str, ...], sizes: tuple[str, ...]) -> None:
    """Time the kernels of the table in other configurations, and keep what is at least 2 % faster."""
    if not torch.cuda.is_available() or dispatch.obstacle_to_triton(torch.device("cuda")):
        raise click.UsageError("there is no CUDA GPU here that the kernels run on: the table can only be tuned on one")
    import triton.testing

    device = torch.device("cuda")
    architecture = "".join(map(str, torch.cuda.get_device_capability(device)))
    table = tile_sizes.table()
    mine = table.setdefault(architecture, copy.deepcopy(table[tile_sizes.nearest(architecture)]))
    asked = list(itertools.product(sizes or DTYPES, map(int, widths or map(str, WIDTHS))))
    cases = [
        (kernel, bits, width, choice)
        for bits, width in asked
        for kernel in (kernels or mine)
        for choice in candidates(kernel, bits)
    ]
    click.echo(f"compiling {len(cases):,} kernels", err=True)
    with ProcessPoolExecutor(max(1, (os.cpu_count() or 1) - 2), get_context("spawn")) as pool, suppress(BrokenExecutor):
        list(pool.map(compile_ahead, cases, chunksize=8))
    for bits, width in asked:
        for kernel, call in workloads(width, DTYPES[bits], device).items():
            if kernels and kernel not in kernels:
                continue
            before = mine[kernel][bits][width]
            kept, times = fastest(
                kernel,
                before,
                candidates(kernel, bits),
                call,
                lambda call: triton.testing.do_bench(call, warmup=10, rep=30, return_mode="median"),
            )
            mine[kernel][bits][width] = kept
            told = f"{before} {times.get(before, float('nan')):.3f} ms"
            click.echo(f"{kernel} {bits} bits, heads of {width}: {told} → {kept} {times[kept]:.3f} ms")
            tile_sizes.TABLE.write_text(tile_sizes.to_json(table), encoding="utf-8")
    click.echo("now: make kernels-aot UPDATE=--update, and look at what changed")


if __name__ == "__main__":
    main()
