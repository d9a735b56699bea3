from __future__ import annotations

import threading
import time

import pytest

from lm.data.batch import Batch
from lm.data.prefetch import prefetch
from lm.objectives.batches import TrainingBatches


def thread_is_running() -> bool:
    return any(thread.name.startswith("kindling-prefetch") for thread in threading.enumerate())


@pytest.mark.parametrize("ahead", [1, 2, 5])
def test_it_gives_what_was_made_in_order_and_then_ends(ahead):
    with prefetch(lambda number: number * number, range(3, 40), ahead=ahead) as squares:
        assert list(squares) == [number * number for number in range(3, 40)]
        assert list(squares) == []  # and goes on having ended
    assert not thread_is_running()


def test_nothing_to_make_ends_at_once():
    with prefetch(str, []) as nothing:
        assert list(nothing) == []


def test_it_works_ahead_but_no_further_than_told():
    made = []
    with prefetch(lambda number: made.append(number), range(100), ahead=2) as waiting:
        until = time.monotonic() + 60
        while len(made) < 3 and time.monotonic() < until:
            time.sleep(0.001)
        time.sleep(0.02)
        assert made == [0, 1, 2]  # two are ready, the third waits for room
        next(waiting)
    assert len(made) <= 6


def test_an_error_comes_where_its_result_would_have_come():
    def make(number: int) -> int:
        return 12 // (3 - number)

    with prefetch(make, range(10)) as results, pytest.raises(ZeroDivisionError):
        seen = []
        for result in results:
            seen.append(result)
    assert seen == [4, 6, 12]
    assert not thread_is_running()


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("taken", [0, 1, 7])
def test_the_thread_does_not_outlive_an_error_of_its_user(error, taken):
    with pytest.raises(error), prefetch(lambda number: number, range(10**9)) as numbers:
        for _ in range(taken):
            next(numbers)
        time.sleep(0.005)  # the thread fills the queue and waits for room
        raise error
    assert not thread_is_running()


def test_things_are_made_in_another_thread():
    with prefetch(lambda _: threading.get_ident(), [0]) as threads:
        assert next(threads) != threading.get_ident()


@pytest.mark.parametrize("breaks", [None, 3])
def test_no_thread_of_the_loader_outlives_training(small, quietly, tmp_path, monkeypatch, breaks):
    batch = TrainingBatches.batch

    def broken(self: TrainingBatches, step: int, rank: int = 0, world: int = 1) -> Batch:
        if step == breaks:
            raise OSError("the disk went away")
        return batch(self, step)

    monkeypatch.setattr(TrainingBatches, "batch", broken)
    if breaks is None:
        quietly(small.replace(steps=5), tmp_path / "run")
    else:
        with pytest.raises(OSError, match="the disk went away"):
            quietly(small.replace(steps=5), tmp_path / "run")
    assert not thread_is_running()
