from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

import pytest

from data_prep.errors import UserError
from lm.inference.generator import Event
from lm.inference.sampling import Sampling
from lm.serve.engine import BusyError, Engine, FailedError, StoppedError, TextRequest

ENDLESS = 10**9


class Counting:
    """A generator that counts up from the prompt's first token, as many times as the second; it fails at 13."""

    def __init__(self) -> None:
        self.live: dict[int, list[int]] = {}
        self.handles = 0
        self.steps: list[int] = []  # how many texts each step continued
        self.cancelled: list[int] = []

    def add(self, prompt, sampling, ends) -> int:
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


def run(test: Callable, capacity: int = 8) -> list[Counting]:
    """Run a test with a new engine; return the generators that the engine made."""
    writers: list[Counting] = []

    def make() -> Counting:
        writers.append(Counting())
        return writers[-1]

    async def body() -> None:
        engine = Engine(make, capacity)
        engine.start()
        try:
            await asyncio.wait_for(test(engine), 20)
        finally:
            await engine.close()
        assert engine.in_use == 0

    asyncio.run(body())
    return writers


def counts(*prompts: tuple[int, int]) -> list[TextRequest]:
    return [TextRequest(prompt, Sampling()) for prompt in prompts]


async def written(engine: Engine, *prompts: tuple[int, int]) -> list[str]:
    texts = [""] * len(prompts)
    async with engine.write(counts(*prompts)) as events:
        async for index, event in events:
            texts[index] += event.text
    return texts


def test_each_text_reaches_its_own_caller():
    async def test(engine: Engine) -> None:
        results = await asyncio.gather(written(engine, (1, 3), (5, 2)), written(engine, (7, 1)), written(engine))
        assert results == [["1 2 3 ", "5 6 "], ["7 "], []]

    run(test)


def test_concurrent_texts_are_generated_in_one_batch():
    async def test(engine: Engine) -> None:
        started, resume = asyncio.Event(), asyncio.Event()
        other = asyncio.create_task(engine.compute(blocking(asyncio.get_running_loop(), started, resume)))
        await started.wait()
        texts = asyncio.gather(*(written(engine, (0, 5)) for _ in range(3)))
        await asyncio.sleep(0)
        resume.set()
        await asyncio.gather(texts, other)

    (writer,) = run(test)
    assert writer.steps == [3] * 5


def test_an_abandoned_text_is_canceled():
    async def test(engine: Engine) -> None:
        async with engine.write(counts((100, ENDLESS))) as events:
            await anext(events)
        assert engine.in_use == 0
        assert await written(engine, (1, 1)) == ["1 "]  # the thread continues, and has canceled the other first

    (writer,) = run(test)
    assert writer.cancelled == [1]
    assert not writer.live


def test_a_text_abandoned_before_it_began_is_never_started():
    async def test(engine: Engine) -> None:
        started, resume = asyncio.Event(), asyncio.Event()
        other = asyncio.create_task(engine.compute(blocking(asyncio.get_running_loop(), started, resume)))
        await started.wait()
        async with engine.write(counts((100, ENDLESS))):
            pass
        resume.set()
        await other

    (writer,) = run(test)
    assert writer.handles == 0


def blocking(loop: asyncio.AbstractEventLoop, started: asyncio.Event, resume: asyncio.Event) -> Iterator[int]:
    """Keep the engine's thread busy until ``resume`` is set."""
    loop.call_soon_threadsafe(started.set)
    asyncio.run_coroutine_threadsafe(resume.wait(), loop).result()
    yield 1


def test_a_failing_model_fails_the_active_requests_and_none_after_them(capsys):
    async def test(engine: Engine) -> None:
        results = await asyncio.gather(written(engine, (11, 9)), written(engine, (20, ENDLESS)), return_exceptions=True)
        assert [type(result) for result in results] == [FailedError, FailedError]
        assert await written(engine, (1, 2)) == ["1 2 "]

    assert len(run(test)) == 2
    assert "RuntimeError: thirteen" in capsys.readouterr().err


def test_a_mistake_is_reported_only_to_its_own_caller():
    async def test(engine: Engine) -> None:
        other = asyncio.create_task(written(engine, (20, 50)))
        with pytest.raises(UserError, match="nothing to count"):
            await written(engine, (1, 0))
        assert (await other)[0].startswith("20 21 22")

    run(test)


def test_no_more_than_the_capacity_is_accepted_and_finished_work_frees_it():
    async def test(engine: Engine) -> None:
        async with engine.write(counts((20, ENDLESS), (20, ENDLESS))) as events:
            await anext(events)
            with pytest.raises(BusyError):
                await written(engine, (1, 1), (1, 1))
            assert await written(engine, (1, 1)) == ["1 "]
            assert await engine.compute(iter([1])) == [1]
        assert await written(engine, (1, 1), (1, 1), (1, 1)) == ["1 "] * 3

    run(test, capacity=3)


def test_other_work_and_texts_alternate():
    async def test(engine: Engine) -> None:
        async with engine.write(counts((20, ENDLESS))) as events:
            await anext(events)
            assert await engine.compute(iter(range(20))) == list(range(20))
            for number in range(21, 41):  # a step, at least, for each piece
                assert (await anext(events))[1].token == number

    run(test)


def test_failing_work_affects_no_other(capsys):
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


def test_stopping_notifies_waiting_callers():
    async def test(engine: Engine) -> None:
        task = asyncio.create_task(written(engine, (20, ENDLESS)))
        await asyncio.sleep(0.05)
        engine.stop()
        with pytest.raises(StoppedError):
            await task
        with pytest.raises(StoppedError):
            await written(engine, (1, 1))

    run(test)
