"""Answers in OpenAI's format, whole or as server-sent events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.inference.detokenizer import Detokenizer
from lm.inference.generator import Event
from lm.serve.engine import BusyError, StoppedError
from lm.serve.schema import ApiError


@dataclass(frozen=True)
class Scored:
    """A token with its log-probability, in nats, and the most likely alternatives, (token, log-probability) each."""

    token: int
    logprob: float
    top: Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Piece:
    """A part of one choice: its text, its tokens if log-probabilities were requested, the number of tokens that the
    model generated for it, and why the choice ended, if it did."""

    text: str
    scored: tuple[Scored, ...] = ()
    written: int = 0
    finish_reason: str | None = None

    @classmethod
    def of(cls, event: Event) -> Piece:
        """The piece of a choice that one step of the generator produced."""
        if event.token is None:
            return cls(event.text, finish_reason=event.finish_reason)
        scored = () if event.logprob is None else (Scored(event.token, event.logprob, event.top_logprobs),)
        return cls(event.text, scored, 1, event.finish_reason)


Pieces = AsyncGenerator[tuple[int, Piece], None]  # (index of the choice, its next piece)


def join_pieces(pieces: Sequence[Piece]) -> Piece:
    """Join the pieces of one choice."""
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(scored for piece in pieces for scored in piece.scored),
        sum(piece.written for piece in pieces),
        pieces[-1].finish_reason,
    )


@dataclass
class Usage:
    """Counts of tokens read and generated; each prompt is counted once."""

    prompt_tokens: int
    completion_tokens: int = 0

    def body(self) -> dict[str, int]:
        return {**vars(self), "total_tokens": self.prompt_tokens + self.completion_tokens}


@dataclass
class CompletionShape:
    """``/v1/completions``. ``starts``: the offset, in characters, at which each choice's text begins."""

    tokenizer: Tokenizer
    starts: Sequence[int]
    logprobs: bool
    prefix: str = "cmpl-"
    kind: str = "text_completion"
    kind_of_chunk: str = "text_completion"
    _positions: dict[int, tuple[Detokenizer, int]] = field(default_factory=dict)

    def opening(self, index: int) -> None:
        return None

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        logprobs = self._logprobs(index, piece.scored) if self.logprobs else None
        return {"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    whole = delta

    def _logprobs(self, index: int, scored: Sequence[Scored]) -> dict[str, Any]:
        # Where each token's text begins, in characters, counted on from the choice's last piece.
        stream, offset = self._positions.get(index) or (Detokenizer(self.tokenizer), self.starts[index])
        offsets = []
        for one in scored:
            offsets.append(offset)
            offset += len(stream.add(one.token))
        self._positions[index] = stream, offset
        return {
            "tokens": [token_name(self.tokenizer, one.token) for one in scored],
            "token_logprobs": [one.logprob for one in scored],
            "top_logprobs": [_by_name(self.tokenizer, one) for one in scored],
            "text_offset": offsets,
        }


@dataclass
class ChatShape:
    """``/v1/chat/completions``."""

    tokenizer: Tokenizer
    logprobs: bool
    prefix: str = "chatcmpl-"
    kind: str = "chat.completion"
    kind_of_chunk: str = "chat.completion.chunk"

    def whole(self, index: int, piece: Piece) -> dict[str, Any]:
        message = {"role": "assistant", "content": piece.text, "refusal": None}
        return self._choice(index, piece, {"message": message})

    def opening(self, index: int) -> dict[str, Any]:
        return self._choice(index, Piece(""), {"delta": {"role": "assistant", "content": ""}})

    def delta(self, index: int, piece: Piece) -> dict[str, Any]:
        return self._choice(index, piece, {"delta": {"content": piece.text} if piece.text else {}})

    def _choice(self, index: int, piece: Piece, content: dict[str, Any]) -> dict[str, Any]:
        logprobs = {"content": [self._scored(one) for one in piece.scored], "refusal": None} if piece.scored else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": piece.finish_reason}

    def _scored(self, one: Scored) -> dict[str, Any]:
        top = [self._named(token, logprob) for token, logprob in one.top]
        return {**self._named(one.token, one.logprob), "top_logprobs": top}

    def _named(self, token: int, logprob: float) -> dict[str, Any]:
        data = self.tokenizer.decode_bytes([token])
        return {"token": token_name(self.tokenizer, token), "logprob": logprob, "bytes": list(data)}


Shape = CompletionShape | ChatShape  # the format of one of the two kinds of answers


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text, or if it is only part of a character, as ``bytes:\\xe2\\x82``."""
    data = tokenizer.decode_bytes([token])
    try:
        return data.decode("utf-8") or tokenizer.decode([token])
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _by_name(tokenizer: Tokenizer, one: Scored) -> dict[str, float]:
    """Log-probabilities by name, of the most likely tokens and the actual one; of equal names the highest."""
    named: dict[str, float] = {}
    for token, logprob in [*one.top, (one.token, one.logprob)]:
        named.setdefault(token_name(tokenizer, token), logprob)
    return named


def error_of(error: Exception) -> ApiError:
    """The error that a client receives for an exception."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UserError):
        return ApiError(400, "; ".join(str(error).splitlines()))
    if isinstance(error, BusyError):
        return ApiError(429, "the server is at capacity: try again soon", code="rate_limit_exceeded")
    if isinstance(error, StoppedError):
        return ApiError(503, "the server is shutting down")
    return ApiError(500, "the server failed on this request: see its log")


def header(shape: Shape, kind: str, model: str) -> dict[str, Any]:
    """The fields that all answers have, with a new id."""
    return {"id": shape.prefix + secrets.token_hex(12), "object": kind, "created": int(time.time()), "model": model}


async def whole_answer(shape: Shape, model: str, pieces: Pieces, choices: int, usage: Usage) -> dict[str, Any]:
    """The body of an answer with all choices, once they are finished; adds the generated tokens to ``usage``."""
    parts: list[list[Piece]] = [[] for _ in range(choices)]
    async with aclosing(pieces):
        async for index, piece in pieces:
            parts[index].append(piece)
            usage.completion_tokens += piece.written
    finished = [shape.whole(index, join_pieces(each)) for index, each in enumerate(parts)]
    return {**header(shape, shape.kind, model), "choices": finished, "usage": usage.body()}


async def events_of_answer(
    shape: Shape, model: str, pieces: Pieces, usage: Usage, include_usage: bool
) -> AsyncGenerator[str, None]:
    """The pieces as server-sent events, as they arrive; an error is the last event.

    An exception before the first piece is raised instead, because it can still become an HTTP error.
    """
    common = header(shape, shape.kind_of_chunk, model)
    opened: set[int] = set()
    try:
        async with aclosing(pieces):
            async for index, piece in pieces:
                usage.completion_tokens += piece.written
                choices = [] if index in opened else [shape.opening(index)]
                opened.add(index)
                if piece.text or piece.scored or piece.finish_reason:
                    choices.append(shape.delta(index, piece))
                for choice in filter(None, choices):
                    yield event({**common, "choices": [choice], **({"usage": None} if include_usage else {})})
    except Exception as error:
        if not opened:
            raise
        yield event(error_of(error).body())
        return
    if include_usage:
        yield event({**common, "choices": [], "usage": usage.body()})
    yield "data: [DONE]\n\n"


def event(data: dict[str, Any]) -> str:
    """``data`` as one server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"
