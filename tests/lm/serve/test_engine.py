from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from data_prep.errors import UserError
from lm.inference.generator import Event
from lm.inference.sampling import Sampling
from lm.serve.engine import Asked, BusyError, Engine, FailedError, StoppedError

ENDLESS = 10**9


class Counting:
    """A writer that counts: from the prompt's first token up, as many as the second says; at 13 it breaks."""

    def __init__(self) -> None:
        self.live: dict[int, list[int]] = {}
        self.handles = 0
        self.steps: list[int] = []  # how many texts each step wrote
        self.cancelled: list[int] = []

    def add(self, prompt, sampling) -> int:
        if prompt[1] < 1:
            raise UserError("there is nothing to count")
        self.handles += 1
        self.live[self.handles] = list(prompt)
        return self.handles

    def step(self) -> list[Event]:
        self.steps.append(len(self.live))
        events = []
        for handle, (number, left) in list(self.live.items()):
            if number == 13:
                raise RuntimeError("thirteen")
            events.append(Event(handle, number, f"{number} ", finish_reason="length" if left == 1 else None))
            self.live[handle] = [number + 1, left - 1]
            if left == 1:
                del self.live[handle]
        return events

    def cancel(self, handle: int) -> None:
        self.cancelled.append(handle)
        self.live.pop(handle, None)


def run(test: Callable, places: int = 8) -> list[Counting]:
    """Run a coroutine function of an engine; the writers that the engine made."""
    writers: list[Counting] = []

    def make() -> Counting:
        writers.append(Counting())
        return writers[-1]

    async def body() -> None:
        engine = Engine(make, places)
        engine.start()
        try:
            await asyncio.wait_for(test(engine), 20)
        finally:
            await engine.close()
        assert engine.taken == 0

    asyncio.run(body())
    return writers


def counts(*prompts: tuple[int, int]) -> list[Asked]:
    return [Asked(prompt, Sampling()) for prompt in prompts]


async def written(engine: Engine, *prompts: tuple[int, int]) -> list[str]:
    texts = [""] * len(prompts)
    async with engine.write(counts(*prompts)) as events:
        async for index, event in events:
            texts[index] += event.text
    return texts


def test_each_text_reaches_the_one_who_asked_for_it():
    async def test(engine: Engine) -> None:
        results = await asyncio.gather(written(engine, (1, 3), (5, 2)), written(engine, (7, 1)), written(engine))
        assert results == [["1 2 3 ", "5 6 "], ["7 "], []]

    run(test)


def test_texts_that_are_there_together_are_written_together():
    async def test(engine: Engine) -> None:
        started, go_on = asyncio.Event(), asyncio.Event()
        other = asyncio.create_task(engine.compute(blocking(asyncio.get_running_loop(), started, go_on)))
        await started.wait()
        texts = asyncio.gather(*(written(engine, (0, 5)) for _ in range(3)))
        await asyncio.sleep(0)
        go_on.set()
        await asyncio.gather(texts, other)

    (writer,) = run(test)
    assert writer.steps == [3] * 5


def test_who_leaves_is_not_written_for_any_more():
    async def test(engine: Engine) -> None:
        async with engine.write(counts((100, ENDLESS))) as events:
            await anext(events)
        assert engine.taken == 0
        assert await written(engine, (1, 1)) == ["1 "]  # the thread goes on, and has let go before

    (writer,) = run(test)
    assert writer.cancelled == [1]
    assert not writer.live


def test_who_left_before_a_text_began_costs_nothing():
    async def test(engine: Engine) -> None:
        started, go_on = asyncio.Event(), asyncio.Event()
        other = asyncio.create_task(engine.compute(blocking(asyncio.get_running_loop(), started, go_on)))
        await started.wait()
        async with engine.write(counts((100, ENDLESS))):
            pass
        go_on.set()
        await other

    (writer,) = run(test)
    assert writer.handles == 0


def blocking(loop: asyncio.AbstractEventLoop, started: asyncio.Event, go_on: asyncio.Event) -> Iterator[int]:
    """Keeps the engine's thread busy until it is told to go on."""
    loop.call_soon_threadsafe(started.set)
    asyncio.run_coroutine_threadsafe(go_on.wait(), loop).result()
    yield 1


def test_a_failing_model_fails_those_who_wait_for_it_and_nobody_after_them(capsys):
    async def test(engine: Engine) -> None:
        results = await asyncio.gather(written(engine, (11, 9)), written(engine, (20, ENDLESS)), return_exceptions=True)
        assert [type(result) for result in results] == [FailedError, FailedError]
        assert await written(engine, (1, 2)) == ["1 2 "]

    assert len(run(test)) == 2
    assert "RuntimeError: thirteen" in capsys.readouterr().err


def test_a_mistake_is_told_to_who_made_it_alone():
    async def test(engine: Engine) -> None:
        other = asyncio.create_task(written(engine, (20, 50)))
        with pytest.raises(UserError, match="nothing to count"):
            await written(engine, (1, 0))
        assert (await other)[0].startswith("20 21 22")

    run(test)


def test_no_more_is_taken_than_there_are_places_and_places_come_back():
    async def test(engine: Engine) -> None:
        async with engine.write(counts((20, ENDLESS), (20, ENDLESS))) as events:
            await anext(events)
            with pytest.raises(BusyError):
                await written(engine, (1, 1), (1, 1))
            assert await written(engine, (1, 1)) == ["1 "]
            assert await engine.compute(iter([1])) == [1]
        assert await written(engine, (1, 1), (1, 1), (1, 1)) == ["1 "] * 3

    run(test, places=3)


def test_other_work_and_texts_take_turns():
    async def test(engine: Engine) -> None:
        async with engine.write(counts((20, ENDLESS))) as events:
            await anext(events)
            assert await engine.compute(iter(range(20))) == list(range(20))
            for number in range(21, 41):  # a step, at least, for each piece
                assert (await anext(events))[1].token == number

    run(test)


def test_work_that_fails_fails_alone(capsys):
    def failing() -> Iterator[int]:
        yield 1
        raise ZeroDivisionError

    def refusing() -> Iterator[int]:
        raise UserError("no")
        yield 1

    async def test(engine: Engine) -> None:
        with pytest.raises(FailedError):
            await engine.compute(failing())
        with pytest.raises(UserError, match="no"):
            await engine.compute(refusing())
        assert await engine.compute(iter([5])) == [5]

    run(test)
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_closing_tells_those_who_still_wait():
    async def test(engine: Engine) -> None:
        task = asyncio.create_task(written(engine, (20, ENDLESS)))
        await asyncio.sleep(0.05)
        engine.stop()
        with pytest.raises(StoppedError):
            await task
        with pytest.raises(StoppedError):
            await written(engine, (1, 1))

    run(test)
