from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.context import BaseContext
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.errors import UserError
from data_prep.pipeline import workers
from data_prep.pipeline.workers import Advance, run_calls


def square(number: int, delay: float, advance: Advance) -> tuple[int, int]:
    time.sleep(delay)
    advance(number)
    return number * number, os.getpid()


def fail(number: int, advance: Advance) -> None:
    if number == 2:
        raise UserError("the second is wrong")


def die_once(marker: str, number: int, advance: Advance) -> int:
    """Kill the process that works on call 1, the first time."""
    if number == 1 and not Path(marker).exists():
        Path(marker).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_come_in_the_order_of_the_calls_and_progress_adds_up(count: int) -> None:
    told: list[int] = []
    calls = [(number, 0.02 * (5 - number)) for number in range(6)]
    results = run_calls(square, calls, workers=count, advance=told.append)
    assert [result for result, _ in results] == [0, 1, 4, 9, 16, 25]
    assert sum(told) == 15
    processes = {process for _, process in results}
    assert (os.getpid() in processes) == (count == 1)


@pytest.mark.parametrize("count", [1, 2])
def test_what_a_call_raises_is_raised(count: int) -> None:
    with pytest.raises(UserError, match="the second is wrong"):
        run_calls(fail, [(number,) for number in range(8)], workers=count)


def test_a_killed_worker_is_told_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(ChildProcessError, match="a worker process was killed, perhaps because memory ran out"):
        run_calls(die_once, [(str(tmp_path / "died"), number) for number in range(8)], workers=2)
    assert not [child for child in multiprocessing.active_children() if "ForkServer" in type(child).__name__]


@pytest.mark.usefixtures("ray")
def test_ray_works_on_with_a_worker_killed(tmp_path: Path) -> None:
    told: list[int] = []
    calls = [(str(tmp_path / "died"), number) for number in range(4)]
    assert run_calls(die_once, calls, engine="ray", workers=2, advance=told.append) == [0, 1, 2, 3]
    assert (tmp_path / "died").exists()
    with pytest.raises(UserError, match="the second is wrong"):
        run_calls(fail, [(number,) for number in range(3)], engine="ray", workers=2)


def test_without_ray_a_sentence_says_what_to_install(without: Callable[[str], None]) -> None:
    without("ray")
    with pytest.raises(UserError, match=r'--engine ray needs the package "ray": pip install'):
        run_calls(square, [(1, 0.0)], engine="ray")


def test_ctrl_c_that_comes_while_processes_start_is_not_lost() -> None:
    with pytest.raises(KeyboardInterrupt), workers._interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        held = True
    assert held


def test_where_there_is_no_fork_processes_are_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    def get_context(method: str) -> BaseContext:
        assert method == "spawn"
        return multiprocessing.get_context(method)

    monkeypatch.setattr(workers, "START_METHOD", "spawn")
    monkeypatch.setattr(workers, "get_context", get_context)
    monkeypatch.delattr(BaseContext, "set_forkserver_preload")
    without_masks = {name: value for name, value in vars(signal).items() if name != "pthread_sigmask"}
    monkeypatch.setattr(workers, "signal", SimpleNamespace(**without_masks))
    monkeypatch.setattr(resource_tracker, "_HAVE_SIGMASK", False)
    told: list[int] = []
    results = run_calls(square, [(number, 0.0) for number in range(4)], workers=2, advance=told.append)
    assert [result for result, _ in results] == [0, 1, 4, 9]
    assert os.getpid() not in {process for _, process in results}
    assert sum(told) == 6
    with pytest.raises(UserError, match="the second is wrong"):
        run_calls(fail, [(number,) for number in range(4)], workers=2)


def test_no_more_processes_are_started_than_windows_can_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(workers, "_run_in_processes", lambda function, calls, count, advance: asked.append(count))
    for most in (workers.MOST_WORKERS, 61):
        monkeypatch.setattr(workers, "MOST_WORKERS", most)
        run_calls(fail, [(number,) for number in range(90)], workers=80)
    assert asked == [80, 61]
