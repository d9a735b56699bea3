"""The threads of PyTorch on a CPU: how many there are, and how they wait for each other.

Between two operations, the threads of GNU OpenMP, which PyTorch's packages for Linux come with, spin for about a
millisecond. On a quiet machine nothing is faster. When other programs want the cores as well, a spinning thread keeps
the core that the thread it waits for needs, and training loses half of its speed or more. How long threads spin is read
from the environment when the library is loaded, but the library spins 3,000 times less while it has more threads than
the machine has cores (its manual, GOMP_SPINCOUNT). So while other programs compete, a second set of threads is held
that never works. The number of threads that compute stays the same, and with it every bit of their results. Where bits
do not depend on it, as in decoding, one thread is faster still than several that sleep (``others_want_cores``).
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from data_prep.settings import available_cores

SECONDS_BETWEEN_LOOKS = 0.5
# Seconds per second in which the threads of this process, all together, had a core, or were ready to run and had none.
WORKING = 0.5
BUSY, QUIET = 0.2, 0.1
SPARE = 0.3  # cores that may be missing on a machine that is quiet again
LOOKS_BEFORE_QUIET = 2
OWN_CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


_busy = threading.Event()


def others_want_cores() -> bool:
    """Whether other programs compete for the cores of this process, as seen by the threads of ``settle_threads``."""
    return _busy.is_set()


@functools.cache
def settle_threads() -> None:
    """Use no more threads than this process may use cores, and let them sleep while the machine is busy.

    Only the first call has an effect. What the environment says (OMP_NUM_THREADS, OMP_WAIT_POLICY, GOMP_SPINCOUNT) is
    left as it is.
    """
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > available_cores():
        torch.set_num_threads(available_cores())
    libraries = loaded_libgomp()
    if libraries and torch.get_num_threads() > 1 and not any(name in os.environ for name in OWN_CHOICES):
        arguments = libraries, torch.get_num_threads()
        threading.Thread(target=_watch, args=arguments, name="busy cores", daemon=True).start()


def loaded_libgomp(maps: Path = Path("/proc/self/maps")) -> list[ctypes.CDLL]:
    """Every copy of GNU OpenMP that this process has loaded; none on other systems than Linux."""
    with suppress(OSError):
        words = [line.split(maxsplit=5) for line in maps.read_text().splitlines()]
        paths = {word[5] for word in words if len(word) == 6 and Path(word[5]).name.startswith("libgomp")}
        return [ctypes.CDLL(path) for path in sorted(paths)]
    return []


def _watch(libraries: list[ctypes.CDLL], threads: int) -> None:
    idle, quiet = None, 0
    before, at = (*core_seconds(), unused_seconds()), time.monotonic()
    while True:
        time.sleep(SECONDS_BETWEEN_LOOKS)
        now, clock = (*core_seconds(), unused_seconds()), time.monotonic()
        working, waiting, unused = ((new - old) / (clock - at) for new, old in zip(now, before, strict=True))
        before, at = now, clock
        if working + waiting < WORKING:
            continue  # a process without work learns nothing about the machine
        quiet = quiet + 1 if waiting < QUIET and working + unused > threads - SPARE else 0
        if idle is None and waiting > BUSY:
            idle = IdleThreads(libraries)
            _busy.set()
        elif idle is not None and quiet >= LOOKS_BEFORE_QUIET:
            _busy.clear()
            idle.release()
            idle = None


def core_seconds(tasks: Path = Path("/proc/self/task")) -> tuple[float, float]:
    """How long the present threads of this process have had a core, and were ready to run but had none (Linux)."""
    working = waiting = 0
    for task in tasks.iterdir() if tasks.is_dir() else ():
        with suppress(OSError, ValueError):  # the thread has ended, or the kernel does not count
            had, had_not, _ = map(int, (task / "schedstat").read_text().split())
            working, waiting = working + had, waiting + had_not
    return working / 1e9, waiting / 1e9


def unused_seconds(stat: Path = Path("/proc/stat")) -> float:
    """How long the cores that this process may use have had nothing to do, all together (Linux)."""
    ticks, cores = 0, {f"cpu{number}" for number in os.sched_getaffinity(0)}
    for name, *numbers in map(str.split, stat.read_text().splitlines()):
        if name in cores:
            ticks += int(numbers[3]) + int(numbers[4])  # idle, and waiting for a disk
    return ticks / os.sysconf("SC_CLK_TCK")


class IdleThreads:
    """One more OpenMP thread than the machine has cores, which sleep until they are released."""

    def __init__(self, libraries: list[ctypes.CDLL]) -> None:
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._hold, args=(libraries,), name="idle threads", daemon=True)
        self._thread.start()

    def _hold(self, libraries: list[ctypes.CDLL]) -> None:
        # The threads belong to the thread that started them and end with it.
        for library in libraries:
            nothing = ctypes.cast(library.omp_get_thread_num, ctypes.c_void_p)
            library.GOMP_parallel(nothing, None, library.omp_get_num_procs() + 1, 0)
        self._released.wait()

    def release(self) -> None:
        self._released.set()
        self._thread.join()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside the block."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
