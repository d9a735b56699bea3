"""Time several ways of doing one thing in turn, A B A B …, so that a busy machine slows all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Medians over the rounds: seconds on the clock, and CPU seconds of all threads together."""

    wall: float
    cpu: float


def in_turn(candidates: Mapping[str, Callable[[], object]], *, rounds: int = 15, warm_up: int = 2) -> dict[str, Timing]:
    """Call each candidate once a round, for ``warm_up`` untimed rounds and ``rounds`` timed ones."""
    walls: dict[str, list[float]] = {name: [] for name in candidates}
    cpus: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(warm_up + rounds):
        for name, call in candidates.items():
            wall, cpu = time.perf_counter(), time.process_time()
            call()
            if number >= warm_up:
                walls[name].append(time.perf_counter() - wall)
                cpus[name].append(time.process_time() - cpu)
    return {name: Timing(statistics.median(walls[name]), statistics.median(cpus[name])) for name in candidates}


def table(title: str, timings: Mapping[str, Timing], baseline: str) -> str:
    """The timings in milliseconds, each with how many times faster than ``baseline`` it is (wall and CPU)."""
    width = max(map(len, timings))
    lines = [title, f"  {'':{width}}  wall ms   CPU ms  faster (wall, CPU)"]
    for name, timing in timings.items():
        faster = f"{timings[baseline].wall / timing.wall:.2f}, {timings[baseline].cpu / timing.cpu:.2f}"
        lines.append(f"  {name:{width}}  {timing.wall * 1e3:7.2f}  {timing.cpu * 1e3:7.2f}  {faster}")
    return "\n".join(lines)
