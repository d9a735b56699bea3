from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from lm.model import threads
from lm.model.threads import (
    IdleThreads,
    core_seconds,
    loaded_libgomp,
    one_thread,
    others_want_cores,
    unused_seconds,
)

needs_libgomp = pytest.mark.skipif(not loaded_libgomp(), reason="needs a PyTorch with GNU OpenMP")


def in_new_process(code: str, **variables: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_time_with_and_without_a_core_is_the_sum_over_the_threads(tmp_path):
    for name, line in {"1": "100000000 2500000000 7\n", "2": "0 500000000 1\n", "3": "", "4": "off\n"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "schedstat").write_text(line)
    (tmp_path / "5").mkdir()
    assert core_seconds(tmp_path) == (0.1, 3.0)
    assert core_seconds(tmp_path / "none") == (0, 0)


def test_copies_of_libgomp_are_found_by_name(tmp_path):
    (tmp_path / "maps").write_text("7f0-7f1 r-xp 0 08:01 12 /usr/lib/libc.so.6\n7f2-7f3 rw-p 00000000 00:00 0\n")
    assert loaded_libgomp(tmp_path / "maps") == []
    assert loaded_libgomp(tmp_path / "none") == []


def watched(monkeypatch: pytest.MonkeyPatch, shares: list[tuple[float, float, float]]) -> list[str]:
    """What ``_watch`` does at each look; the shares of time: with a core, without one, and of cores without work."""
    done: list[str] = []

    class EndError(Exception):
        pass

    class Recorded:
        def __init__(self, libraries: list[object]) -> None:
            assert not others_want_cores()
            done[-1] = "hold"

        def release(self) -> None:
            assert not others_want_cores()
            done[-1] = "release"

    clock, totals, coming = [0.0], [0.0, 0.0, 0.0], iter(shares)

    def sleep(seconds: float) -> None:
        share = next(coming, None)
        if share is None:
            raise EndError
        clock[0] += seconds
        totals[:] = [total + seconds * part for total, part in zip(totals, share, strict=True)]
        assert others_want_cores() == ([each for each in done if each][-1:] == ["hold"])
        done.append("")

    monkeypatch.setattr(threads, "IdleThreads", Recorded)
    monkeypatch.setattr(threads, "core_seconds", lambda: (totals[0], totals[1]))
    monkeypatch.setattr(threads, "unused_seconds", lambda: totals[2])
    monkeypatch.setattr(threads, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    with pytest.raises(EndError):
        threads._watch([], 2)
    threads._busy.clear()
    return done


BUSY, BETWEEN, QUIET = (1.2, 0.6, 0.0), (1.8, 0.15, 0.0), (1.9, 0.02, 0.0)
RESTING, ONE_THREAD = (0.1, 0.0, 1.9), (1.0, 0.01, 0.0)


def test_idle_threads_are_held_from_the_first_busy_look_until_a_quiet_while(monkeypatch):
    shares = [QUIET, BETWEEN, BUSY, BUSY, QUIET, BUSY, QUIET, QUIET, QUIET]
    assert watched(monkeypatch, shares) == ["", "", "hold", "", "", "", "", "release", ""]


def test_between_the_two_limits_and_without_work_nothing_changes(monkeypatch):
    assert set(watched(monkeypatch, [BETWEEN] * 10)) == {""}
    assert watched(monkeypatch, [BUSY, *[BETWEEN] * 10, *[RESTING] * 10]) == ["hold", *[""] * 20]
    shares = [(0.1, 0.3, 0.5), BUSY, QUIET, RESTING, QUIET]
    assert watched(monkeypatch, shares) == ["", "hold", "", "", "release"]


def test_one_thread_that_is_not_disturbed_does_not_mean_that_the_machine_is_quiet(monkeypatch):
    assert watched(monkeypatch, [BUSY, *[ONE_THREAD] * 10]) == ["hold", *[""] * 10]
    alone = (1.0, 0.01, 0.9)
    assert watched(monkeypatch, [BUSY, *[alone] * 2]) == ["hold", "", "release"]


def test_time_without_work_is_that_of_the_cores_of_this_process(tmp_path, monkeypatch):
    monkeypatch.setattr(threads, "os", SimpleNamespace(**vars(os) | {"sched_getaffinity": lambda process: {1, 10}}))
    lines = "cpu 9 9 9 900 9\ncpu0 1 1 1 50 1\ncpu1 1 1 1 100 20 3\ncpu10 1 1 1 30 50 3\nintr 5\n"
    (tmp_path / "stat").write_text(lines)
    assert unused_seconds(tmp_path / "stat") == 200 / os.sysconf("SC_CLK_TCK")


def test_one_thread_computes_in_the_block():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), one_thread():
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == before


@needs_libgomp
def test_threads_stop_spinning_while_idle_threads_are_held():
    # The CPU seconds of waiting: spinning costs about a millisecond after each operation, sleeping nothing.
    code = """
import time, torch
from lm.model.threads import IdleThreads, loaded_libgomp
torch.set_num_threads(2)
numbers = torch.ones(1 << 17)
def waiting():
    numbers.add_(1)
    began = time.process_time()
    for _ in range(40):
        numbers.add_(1)
        time.sleep(0.01)
    return time.process_time() - began
spinning = waiting()
idle = IdleThreads(loaded_libgomp())
time.sleep(0.2)
sleeping = waiting()
idle.release()
assert spinning > 3 * sleeping, (spinning, sleeping)
assert waiting() > 3 * sleeping
"""
    in_new_process(code, PYTHONPATH=str(Path(__file__).parents[3]))


@needs_libgomp
def test_idle_threads_end_when_they_are_released():
    before = threads_of_this_process()
    IdleThreads(loaded_libgomp()).release()
    until = time.monotonic() + 20
    while threads_of_this_process() > before:  # the system ends them a moment later
        assert time.monotonic() < until
        time.sleep(0.01)


def threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


@pytest.mark.parametrize(
    ("variables", "watches"),
    [({}, True), ({"OMP_WAIT_POLICY": "PASSIVE"}, False), ({"GOMP_SPINCOUNT": "10"}, False)],
)
@needs_libgomp
def test_a_choice_in_the_environment_is_left_alone(variables, watches):
    code = """
import threading, torch
from lm.model.device import choose_device
choose_device("cpu")
choose_device("cpu")
print([thread.name for thread in threading.enumerate()].count("busy cores"))
"""
    assert in_new_process(code, PYTHONPATH=str(Path(__file__).parents[3]), **variables).strip() == str(int(watches))


def test_there_are_no_more_threads_than_cores_unless_the_environment_says_so():
    code = """
import torch
from lm.model import threads
threads.available_cores = lambda: 1
torch.set_num_threads(3)
threads.settle_threads()
print(torch.get_num_threads())
torch.set_num_threads(2)
threads.settle_threads()
print(torch.get_num_threads())
"""
    path = str(Path(__file__).parents[3])
    assert in_new_process(code, PYTHONPATH=path).split() == ["1", "2"]
    assert in_new_process(code, PYTHONPATH=path, OMP_NUM_THREADS="3").split() == ["3", "2"]
