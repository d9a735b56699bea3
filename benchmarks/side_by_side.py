"""Time alternatives in turn, A B A B …, so that a busy machine slows all of them equally."""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds: wall-clock seconds, and CPU seconds of all threads together."""

    wall: float
    cpu: float


def in_turn(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 15, warm_up: int = 2) -> dict[str, Timing]:
    """Call each candidate once per round, for ``warm_up`` untimed rounds and ``rounds`` timed ones."""
    return _rounds({name: partial(timed, call) for name, call in candidates.items()}, rounds, warm_up)


def timed(call: Callable[[], object]) -> Timing:
    """Time one call in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return Timing(time.perf_counter() - wall, time.process_time() - cpu)


def _rounds(candidates: Mapping[str, Callable[[], Timing]], rounds: int, warm_up: int) -> dict[str, Timing]:
    found: dict[str, list[Timing]] = {name: [] for name in candidates}
    for number in range(warm_up + rounds):
        for name, measure in candidates.items():
            timing = measure()
            if number >= warm_up:
                found[name].append(timing)
    return {
        name: Timing(statistics.median(t.wall for t in timings), statistics.median(t.cpu for t in timings))
        for name, timings in found.items()
    }


def apart_in_turn(
    makers: Mapping[str, Callable[[], Callable[[], object]]], *, rounds: int = 15, warm_up: int = 2
) -> dict[str, Timing]:
    """As ``in_turn``, but each candidate is made and called in its own process, which it may configure.

    A maker is a module-level function, or a ``functools.partial`` of one.
    """
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, make in makers.items():
        pipes[name], there = context.Pipe()
        processes.append(context.Process(target=_serve, args=(there, make), daemon=True))
        processes[-1].start()

    try:
        return _rounds({name: partial(_ask, pipe) for name, pipe in pipes.items()}, rounds, warm_up)
    finally:
        for process in processes:
            process.terminate()


def _ask(pipe: Connection) -> Timing:
    pipe.send("again")
    timing: Timing = pipe.recv()
    return timing


def _serve(pipe: Connection, make: Callable[[], Callable[[], object]]) -> None:
    call = make()
    while pipe.recv():
        pipe.send(timed(call))


def table(title: str, timings: Mapping[str, Timing], baseline: str) -> str:
    """Format the timings in milliseconds, each with its speedup over ``baseline`` (wall and CPU)."""
    width = max(map(len, timings))
    lines = [title, f"  {'':{width}}  wall ms   CPU ms  faster (wall, CPU)"]
    for name, timing in timings.items():
        faster = f"{timings[baseline].wall / timing.wall:.2f}, {timings[baseline].cpu / timing.cpu:.2f}"
        lines.append(f"  {name:{width}}  {timing.wall * 1e3:7.2f}  {timing.cpu * 1e3:7.2f}  {faster}")
    return "\n".join(lines)
