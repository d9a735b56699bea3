"""``/v1``: completions and chat completions, as in OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass, replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from lm.serve import answers
from lm.serve.answers import ChatShape, CompletionShape, Piece, Pieces, Scored, Shape, Usage
from lm.serve.engine import Engine, TextRequest
from lm.serve.guard import read_json, unless_disconnected
from lm.serve.schema import (
    Options,
    choice_sampling,
    encode_messages,
    encode_prompt,
    read_chat,
    read_completion,
)
from lm.serve.service import Service


@dataclass(frozen=True)
class OpenAIAPI:
    """The endpoints that generate text."""

    service: Service
    engine: Engine

    async def completions(self, request: Request) -> Response:
        service, tokenizer = self.service, self.service.model.tokenizer
        parsed = read_completion(await read_json(request, service.limits.body_bytes), service.limits, service.defaults)
        options = parsed.options
        service.check(options.model, len(parsed.prompts) * options.choices)
        prompts = await asyncio.to_thread(self._tokens, parsed.prompts, "prompt")
        sampling = replace(options.sampling, max_new_tokens=max(1, parsed.max_tokens))
        jobs = [TextRequest(tokens, choice_sampling(sampling, n)) for tokens in prompts for n in range(options.choices)]
        echo = [(tokenizer.decode(tokens), tokens) for tokens in prompts for _ in range(options.choices)]
        pieces = self._written(jobs if parsed.max_tokens else [])
        if parsed.echo:
            pieces = self._echoed(echo, pieces, sampling.logprobs, ends=not parsed.max_tokens)
        starts = [0 if parsed.echo else len(text) for text, _ in echo]
        shape = CompletionShape(tokenizer, starts, sampling.logprobs is not None)
        return await self._answer(request, shape, pieces, len(echo), Usage(sum(map(len, prompts))), options)

    async def chat_completions(self, request: Request) -> Response:
        service = self.service
        parsed = read_chat(await read_json(request, service.limits.body_bytes), service.limits, service.defaults)
        options = parsed.options
        service.check(options.model, options.choices)
        tokens = await asyncio.to_thread(encode_messages, parsed.messages, service.chat, service.model)
        room = min(service.model.context_length - 1 - len(tokens), service.limits.new_tokens)
        sampling = replace(
            options.sampling,
            max_new_tokens=parsed.max_tokens or max(1, room),
            stop=options.sampling.stop + service.chat.stops,
        )
        choices = [choice_sampling(sampling, n) for n in range(options.choices)]
        pieces = self._written([TextRequest(tokens, choice, service.chat.ends) for choice in choices])
        shape = ChatShape(service.model.tokenizer, sampling.logprobs is not None)
        return await self._answer(request, shape, pieces, options.choices, Usage(len(tokens)), options)

    def _tokens(self, prompts: Sequence[str | list[int]], param: str) -> list[Sequence[int]]:
        return [encode_prompt(prompt, self.service.model, param) for prompt in prompts]

    async def _written(self, requests: Sequence[TextRequest]) -> Pieces:
        async with self.engine.write(requests) as events:
            async for index, event in events:
                yield index, Piece.of(event)

    async def _echoed(
        self, prompts: Sequence[tuple[str, Sequence[int]]], written: Pieces, logprobs: int | None, *, ends: bool
    ) -> Pieces:
        """Put each choice's prompt first, with the log-probabilities of its tokens if they are requested."""
        for index, (text, tokens) in enumerate(prompts):
            scored: list[Scored] = []
            if logprobs is not None:
                work = self.service.probabilities(list(tokens), "next_token", max(1, logprobs))
                parts = await self.engine.compute(work)
                scored = [Scored(p.token, p.logprob, p.alternatives[:logprobs]) for part in parts for p in part]
            yield index, Piece(text, tuple(scored), finish_reason="length" if ends else None)
        async for each in written:
            yield each

    async def _answer(
        self, request: Request, shape: Shape, pieces: Pieces, choices: int, usage: Usage, options: Options
    ) -> Response:
        if not options.stream:
            answer = answers.whole_answer(shape, self.service.name, pieces, choices, usage)
            return JSONResponse(await unless_disconnected(request, answer))
        events = answers.events_of_answer(shape, self.service.name, pieces, usage, options.include_usage)
        return EventStream(await unless_disconnected(request, anext(events)), events)


class EventStream(StreamingResponse):
    """A stream of server-sent events, ``first`` and then ``rest``, which is closed however the stream ends."""

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
