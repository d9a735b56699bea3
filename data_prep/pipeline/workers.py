"""Run one function for many calls: in this process, in worker processes, or on a Ray cluster.

The function is called as ``function(*arguments, advance)`` and reports its progress with ``advance(bytes)``. Calls may
end in any order, so a function returns its result or leaves it on disk.
"""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_all_start_methods, get_context, parent_process
from typing import Any

from data_prep.errors import UserError
from data_prep.settings import NO_RAY

Advance = Callable[[int], None]
POLL_SECONDS = 0.1
RAY_RETRIES = 3  # for a call whose machine or process died
# Fork from a server, not from this process: an encoder may have threads here, and a fork would copy their locks.
# Windows has no fork, and waits for at most 61 processes.
START_METHOD = "forkserver" if "forkserver" in get_all_start_methods() else "spawn"
MOST_WORKERS = 61 if os.name == "nt" else 1 << 20


def run_calls(
    function: Callable[..., Any],
    calls: Sequence[tuple[Any, ...]],
    *,
    engine: str = "local",
    workers: int = 1,
    advance: Advance = lambda size: None,
) -> list[Any]:
    """Call ``function(*call, advance)`` for each of ``calls``, and return the results in the same order.

    With one worker, everything runs in this process. With ``engine="ray"``, calls become tasks on the Ray cluster at
    ``RAY_ADDRESS``, or on a local one with ``workers`` processes.

    Raises:
        ChildProcessError: a worker process died. An exception in a call is raised here too and cancels the others.
    """
    if engine == "ray":
        return _run_on_ray(function, calls, workers, advance)
    if workers == 1 or len(calls) < 2:
        return [function(*call, advance) for call in calls]
    return _run_in_processes(function, calls, min(workers, len(calls), MOST_WORKERS), advance)


def _run_in_processes(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int, advance: Advance
) -> list[Any]:
    context = get_context(START_METHOD)
    if START_METHOD == "forkserver":
        context.set_forkserver_preload([function.__module__])
    done = context.Value("q", 0)
    pool = ProcessPoolExecutor(workers, context, _start_worker, (done,))
    reported = 0
    try:
        with _interrupts_held():  # submitting starts processes
            futures: list[Future[Any]] = [pool.submit(_call_in_worker, function, call) for call in calls]
        waiting = set(futures)
        while waiting:
            finished, waiting = wait(waiting, POLL_SECONDS, FIRST_COMPLETED)
            for future in finished:
                future.result()  # raises the error of a failed call
            advance(done.value - reported)
            reported = done.value
        return [future.result() for future in futures]
    except BrokenProcessPool:
        raise ChildProcessError(
            "a worker process was killed, perhaps because memory ran out: try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Delay Ctrl-C briefly. Processes started meanwhile never receive it: only the parent decides to stop.

    They inherit the signal mask; Windows has none, so there a process that is just starting ends with a traceback. In
    this process a mask is not enough, because any thread may receive the signal.
    """
    if threading.current_thread() is not threading.main_thread():  # Ctrl-C never interrupts another thread
        yield
        return
    held: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    has_mask = hasattr(signal, "pthread_sigmask")
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if has_mask else set()
    try:
        yield
    finally:
        if has_mask:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if held and callable(handler):
        handler(signal.SIGINT, None)


# State of a worker process, set when it starts: the bytes done by all workers together.
_done: Any


def _start_worker(done: Any) -> None:
    global _done
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are the parallelism
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _done = done


def _exit_with_parent() -> None:
    """Exit when the parent process ends, since a parent that was killed cannot stop its workers."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call_in_worker(function: Callable[..., Any], call: tuple[Any, ...]) -> Any:
    return function(*call, _advance)


def _advance(size: int) -> None:
    with _done.get_lock():
        _done.value += size


def _run_on_ray(
    function: Callable[..., Any], calls: Sequence[tuple[Any, ...]], workers: int, advance: Advance
) -> list[Any]:
    try:
        import ray
    except ImportError:
        raise UserError(NO_RAY) from None

    started = not ray.is_initialized()
    if started:
        address = os.environ.get("RAY_ADDRESS")
        ray.init(
            address=address,
            num_cpus=None if address else workers,
            log_to_driver=False,
            logging_level=logging.ERROR,
            include_dashboard=False,
        )
    try:
        remote = ray.remote(num_cpus=1, max_retries=RAY_RETRIES)(_call_on_ray)
        references = [remote.remote(function, call) for call in calls]
        waiting = list(references)
        while waiting:
            ended, waiting = ray.wait(waiting)
            for _, size in ray.get(ended):
                advance(size)
        return [result for result, _ in ray.get(references)]
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
    except ray.exceptions.RayError as error:
        raise ChildProcessError(f"Ray failed: {str(error).splitlines()[0]}") from None
    finally:
        if started:
            ray.shutdown()


def _call_on_ray(function: Callable[..., Any], call: tuple[Any, ...]) -> tuple[Any, int]:
    sizes: list[int] = []
    return function(*call, sizes.append), sum(sizes)
