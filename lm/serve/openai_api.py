"""``/v1``: completions, chat completions and models, as OpenAI's API has them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lm.inference.chat_template import PLAIN_STOPS, render
from lm.serve.answers import (
    ChatShape,
    CompletionShape,
    Piece,
    Pieces,
    Scored,
    Shape,
    Usage,
    events_of_answer,
    piece_of,
    whole_answer,
)
from lm.serve.engine import Asked, Engine
from lm.serve.guard import error_of, read_body, unless_gone
from lm.serve.schema import ApiError, Wishes, of_choice, parse_json, read_chat, read_completion, tokens_of
from lm.serve.service import Service


@dataclass(frozen=True)
class OpenAI:
    """The endpoints."""

    service: Service
    engine: Engine

    async def completions(self, request: Request) -> Response:
        service = self.service
        asked = read_completion(parse_json(await read_body(request, service.limits.body_bytes)), service.limits)
        wishes = asked.wishes
        service.check(wishes.model, len(asked.prompts) * wishes.choices)
        prompts = await asyncio.to_thread(self._tokens, asked.prompts, "prompt")
        texts = [service.tokenizer.decode(tokens) for tokens in prompts]
        sampling = replace(wishes.sampling, max_new_tokens=max(1, asked.max_tokens))
        jobs = [Asked(tokens, of_choice(sampling, n)) for tokens in prompts for n in range(wishes.choices)]
        echo = [(text, tokens) for text, tokens in zip(texts, prompts, strict=True) for _ in range(wishes.choices)]
        pieces = self._written(jobs if asked.max_tokens else [])
        if asked.echo:
            pieces = self._echoed(echo, pieces, sampling.logprobs, ends=not asked.max_tokens)
        starts = [0 if asked.echo else len(text) for text, _ in echo]
        shape = CompletionShape(service.tokenizer, starts, sampling.logprobs is not None)
        usage = Usage(sum(map(len, prompts)))
        return await self._answer(request, shape, pieces, len(echo), usage, wishes)

    async def chat_completions(self, request: Request) -> Response:
        service = self.service
        asked = read_chat(parse_json(await read_body(request, service.limits.body_bytes)), service.limits)
        wishes = asked.wishes
        service.check(wishes.model, wishes.choices)
        text = await asyncio.to_thread(render, asked.messages, service.template)
        (tokens,) = await asyncio.to_thread(self._tokens, [text], "messages")
        room = min(service.context_length - 1 - len(tokens), service.limits.new_tokens)
        sampling = replace(
            wishes.sampling,
            max_new_tokens=asked.max_tokens or max(1, room),
            stop=wishes.sampling.stop + (PLAIN_STOPS if service.template is None else ()),
        )
        pieces = self._written([Asked(tokens, of_choice(sampling, n)) for n in range(wishes.choices)])
        shape = ChatShape(service.tokenizer, sampling.logprobs is not None)
        return await self._answer(request, shape, pieces, wishes.choices, Usage(len(tokens)), wishes)

    async def models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.service.name:
            raise ApiError(404, f'there is no model "{name}" here, only "{self.service.name}"', code="model_not_found")
        return JSONResponse(self._model())

    def _model(self) -> dict[str, object]:
        created = int((self.service.checkpoint.path / "state.json").stat().st_mtime)
        return {"id": self.service.name, "object": "model", "created": created, "owned_by": "kindling"}

    def _tokens(self, prompts: Sequence[str | list[int]], param: str) -> list[Sequence[int]]:
        service = self.service
        return [tokens_of(prompt, service.tokenizer, service.context_length, param) for prompt in prompts]

    async def _written(self, asked: Sequence[Asked]) -> Pieces:
        async with self.engine.write(asked) as events:
            async for index, event in events:
                yield index, piece_of(event)

    async def _echoed(
        self, prompts: Sequence[tuple[str, Sequence[int]]], written: Pieces, logprobs: int | None, *, ends: bool
    ) -> Pieces:
        """First each choice's prompt, with the log-probabilities of its tokens if they are asked for."""
        for index, (text, tokens) in enumerate(prompts):
            scored: list[Scored] = []
            if logprobs is not None:
                parts = await self.engine.compute(
                    self.service.probabilities(list(tokens), "next_token", max(1, logprobs))
                )
                scored = [Scored(p.token, p.logprob, p.alternatives[:logprobs]) for part in parts for p in part]
            yield index, Piece(text, tuple(scored), finish_reason="length" if ends else None)
        async for each in written:
            yield each

    async def _answer(
        self, request: Request, shape: Shape, pieces: Pieces, choices: int, usage: Usage, wishes: Wishes
    ) -> Response:
        if not wishes.stream:
            answer = whole_answer(shape, self.service.name, pieces, choices, usage)
            return JSONResponse(await unless_gone(request, answer))
        events = events_of_answer(
            shape, self.service.name, pieces, usage, wishes.include_usage, lambda error: error_of(error).body()
        )
        return EventStream(await unless_gone(request, anext(events)), events)


class EventStream(StreamingResponse):
    """Server-sent events, of which the first is there already. However it ends, ``rest`` is closed."""

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        self._first, self._rest = first, rest
        super().__init__(self._all(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    async def _all(self) -> AsyncIterator[str]:
        yield self._first
        async for event in self._rest:
            yield event

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._rest.aclose()
