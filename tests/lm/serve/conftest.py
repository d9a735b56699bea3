"""A server on a free port, in a thread, and a plain client."""

from __future__ import annotations

import faulthandler
import http.client
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

from lm.inference.generator import Event, Generator
from lm.inference.sampling import Sampling
from lm.runs.directory import Run
from lm.serve.app import make_app
from lm.serve.guard import AccessPolicy
from lm.serve.schema import Limits
from lm.serve.server import listen, make_server
from lm.serve.service import Service

POISON = [7, 7, 7]
LOCAL, FEW = AccessPolicy(), Limits(concurrent=4)


class WatchedGenerator(Generator):
    """Counts cancellations and the most texts of one step; fails at one prompt."""

    cancelled = 0
    most_at_once = 0

    def add(self, prompt: Sequence[int] | str, sampling: Sampling, ends: Sequence[int] = ()) -> int:
        if list(prompt) == POISON:
            raise RuntimeError("this prompt is poison")
        return super().add(prompt, sampling, ends)

    def cancel(self, handle: int) -> None:
        self.cancelled += 1
        super().cancel(handle)

    def step(self) -> list[Event]:
        events = super().step()
        self.most_at_once = max(self.most_at_once, len(events))
        return events


class WatchedService(Service):
    def make_writer(self) -> Generator:
        made = WatchedGenerator(self.model, max_rows=self.limits.concurrent)
        self.__dict__["writer"] = made
        return made


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        return self.json["error"]


@dataclass
class Served:
    """A running server, and a plain client of it."""

    service: Any
    port: int
    stop: Callable[[], None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def writer(self) -> WatchedGenerator:
        return self.service.__dict__["writer"]

    def ask(
        self, path: str, body: Any = None, headers: dict[str, str] | None = None, method: str | None = None
    ) -> Answer:
        """GET, or POST if there is a body: bytes as they are, anything else as JSON."""
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method or ("GET" if data is None else "POST"), path, data, headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            connection.close()

    def events(self, path: str, body: dict[str, Any]) -> list[Any]:
        """The server-sent events of an answer; the last must be [DONE]."""
        answer = self.ask(path, {**body, "stream": True})
        assert answer.status == 200, answer.body
        assert answer.headers["content-type"].startswith("text/event-stream")
        events = answer.body.decode().split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    def settle(self) -> None:
        """Wait until all requests are finished."""
        until = time.monotonic() + 120
        while self.ask("/health").json["requests"] or self.writer.busy:
            assert time.monotonic() < until
            time.sleep(0.01)


@contextmanager
def serve_run(run: Run, policy: AccessPolicy = LOCAL, limits: Limits = FEW) -> Iterator[Served]:
    checkpoint = run.newest()
    service = WatchedService.open(run, checkpoint, run.load_model(torch.device("cpu"), checkpoint), limits)
    with serve_service(service, policy, lambda: "writer" in service.__dict__) as served:
        yield served


@contextmanager
def serve_service(
    service: Any, policy: AccessPolicy = LOCAL, is_ready: Callable[[], bool] = lambda: True
) -> Iterator[Served]:
    listening = listen("127.0.0.1", 0)
    server = make_server(make_app(service, policy))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 120
        while not (server.started and is_ready()):
            assert thread.is_alive()
            assert time.monotonic() < until
            time.sleep(0.005)
        yield Served(service, listening.getsockname()[1], partial(setattr, server, "should_exit", True))
    finally:
        server.should_exit = True
        thread.join(120)
        listening.close()
        if thread.is_alive():
            faulthandler.dump_traceback(file=sys.__stderr__)
        assert not thread.is_alive()


@pytest.fixture(scope="session")
def serving() -> Callable[..., Any]:
    """Serve a run for a block: ``with serving(run, policy, limits) as served``."""
    return serve_run


@pytest.fixture(scope="session")
def serving_service() -> Callable[..., Any]:
    """Serve a service for a block: ``with serving_service(service, policy) as served``."""
    return serve_service


@pytest.fixture(scope="session")
def served(trained: Run) -> Iterator[Served]:
    """A served hybrid run, trained for 100 steps; no test changes it."""
    with serve_run(trained) as served:
        yield served


@pytest.fixture(scope="session")
def poison() -> list[int]:
    """A prompt at which the model fails, as if the machine had failed."""
    return POISON
