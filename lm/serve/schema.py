"""What a request says, read and checked: all that is wrong with it is told at once, in OpenAI's form."""

from __future__ import annotations

import difflib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.sampling import MOST_LOGPROBS, Sampling

LARGEST_SEED = 2**63
MOST_CHOICES = 128
MOST_STOPS = 16
MOST_ALTERNATIVES = 50
MOST_ROUNDS = 32
CHARACTERS_LOOKED_AT = 64  # for each token of the context
# Fields that say something to OpenAI's own service, and change nothing here.
WITHOUT_EFFECT = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields of OpenAI's that are not here, with the values that ask for nothing.
NOT_HERE: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "suffix": ("",),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}


class ApiError(Exception):
    """An answer that is an error: ``status`` is HTTP's, the rest as OpenAI words it."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, kind: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.kind = kind or ("server_error" if status >= 500 else "invalid_request_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Limits:
    """What one request, and all together, may ask for.

    Attributes:
        concurrent: texts that are written at the same time.
        waiting: texts that may wait for their turn.
        new_tokens: tokens of one text.
        body_bytes: of a request.
    """

    concurrent: int = 16
    waiting: int = 256
    new_tokens: int = 2048
    body_bytes: int = 1 << 20


def parse_json(body: bytes) -> dict[str, Any]:
    """The JSON object that a request is. Raises ApiError."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except RecursionError:
        raise ApiError(400, "the request is not JSON that can be read: it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the request has half of a surrogate pair, which is no character") from None
    except ValueError as error:
        raise ApiError(400, f"the request is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the request must be a JSON object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no number in JSON")


class Fields:
    """The fields of a request: each is taken once, with a default; ``done`` raises if any was wrong or is left over.

    ``null`` is the same as not given.
    """

    def __init__(self, body: dict[str, Any], where: str = "") -> None:
        self._body = {name: value for name, value in body.items() if value is not None}
        self._where = where
        self._known: set[str] = set()
        self.problems: list[tuple[str, str]] = []  # (field, sentence)

    def problem(self, name: str, sentence: str) -> None:
        self.problems.append((self._where + name, f'"{self._where}{name}" {sentence}'))

    def take(self, name: str) -> Any:
        """The value as it came; None: not given."""
        self._known.add(name)
        return self._body.get(name)

    def whole(self, name: str, default: int, low: int, high: int) -> int:
        value = self.take(name)
        if value is None:
            return default
        if type(value) is not int or not low <= value <= high:
            self.problem(name, f"must be a whole number from {low} to {high}, not {_short(value)}")
            return default
        return value

    def number(self, name: str, default: float, low: float, high: float) -> float:
        value = self.take(name)
        if value is None:
            return default
        if type(value) not in (int, float) or not low <= value <= high:
            self.problem(name, f"must be a number from {low:g} to {high:g}, not {_short(value)}")
            return default
        return float(value)

    def flag(self, name: str) -> bool:
        value = self.take(name)
        if value is not None and type(value) is not bool:
            self.problem(name, f"must be true or false, not {_short(value)}")
        return value is True

    def text(self, name: str) -> str:
        """A text that must be given."""
        value = self.take(name)
        if not isinstance(value, str):
            self.problem(name, "must be a text" + ("" if value is None else f", not {_short(value)}"))
            return ""
        return value

    def inner(self, name: str) -> Fields:
        """The fields of an object within; what is wrong with them is told here too."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            self.problem(name, f"must be an object, not {_short(value)}")
            value = None
        within = Fields(value or {}, f"{self._where}{name}.")
        within.problems = self.problems
        return within

    def refuse(self, sampling: Sampling) -> None:
        """What cannot be of settings made of these fields is wrong with the fields."""
        for problem in sampling.problems():
            self.problem(*problem.split(" ", 1))

    def leftovers(self) -> None:
        """Every field that was not taken is wrong."""
        for name, value in self._body.items():
            if name in self._known or name in WITHOUT_EFFECT or value in NOT_HERE.get(name, ()):
                continue
            if name in NOT_HERE:
                self.problem(name, "is not supported here")
                continue
            near = difflib.get_close_matches(name, self._known, 1)
            self.problem(_short(name)[1:-1], "is not known" + (f': did you mean "{near[0]}"?' if near else ""))

    def done(self) -> None:
        self.leftovers()
        if self.problems:
            raise ApiError(400, "; ".join(text for _, text in self.problems[:10]), param=self.problems[0][0])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…" + text[-1:]


@dataclass(frozen=True)
class Wishes:
    """What completions and chat completions have in common."""

    model: str | None
    sampling: Sampling
    choices: int
    stream: bool
    include_usage: bool


def of_choice(sampling: Sampling, number: int) -> Sampling:
    """How one of several choices is written: each has a seed of its own, the first the one that was asked for."""
    return replace(sampling, seed=(sampling.seed + number) % LARGEST_SEED)


@dataclass(frozen=True)
class Completion:
    """A request to ``/v1/completions``. ``max_tokens`` of 0 (only with ``echo``) writes nothing."""

    prompts: list[str | list[int]]
    echo: bool
    max_tokens: int
    wishes: Wishes


@dataclass(frozen=True)
class Chat:
    """A request to ``/v1/chat/completions``. ``max_tokens`` of None: what the context has room for."""

    messages: list[dict[str, str]]
    max_tokens: int | None
    wishes: Wishes


def read_completion(body: dict[str, Any], limits: Limits) -> Completion:
    """Raises ApiError."""
    fields = Fields(body)
    prompts = _prompts(fields)
    echo = fields.flag("echo")
    max_tokens = fields.whole("max_tokens", 16, 0 if echo else 1, limits.new_tokens)
    logprobs = fields.take("logprobs")
    if logprobs is not None:
        logprobs = fields.whole("logprobs", 0, 0, MOST_LOGPROBS)
    wishes = _wishes(fields, logprobs, max(1, max_tokens))
    fields.done()
    return Completion(prompts, echo, max_tokens, wishes)


def read_chat(body: dict[str, Any], limits: Limits) -> Chat:
    """Raises ApiError."""
    fields = Fields(body)
    messages = _messages(fields)
    given = "max_tokens" if fields.take("max_completion_tokens") is None else "max_completion_tokens"
    max_tokens = None
    if fields.take(given) is not None:
        max_tokens = fields.whole(given, 1, 1, limits.new_tokens)
    top = fields.whole("top_logprobs", 0, 0, MOST_LOGPROBS)
    wanted = fields.flag("logprobs")
    if top and not wanted:
        fields.problem("top_logprobs", 'needs "logprobs" to be true')
    wishes = _wishes(fields, top if wanted else None, max_tokens or limits.new_tokens)
    fields.done()
    return Chat(messages, max_tokens, wishes)


def _wishes(fields: Fields, logprobs: int | None, max_new_tokens: int) -> Wishes:
    seed = fields.take("seed")
    if seed is None:
        seed = secrets.randbelow(LARGEST_SEED)
    else:
        seed = fields.whole("seed", 0, -LARGEST_SEED, LARGEST_SEED - 1) % LARGEST_SEED
    sampling = Sampling(
        temperature=fields.number("temperature", 1.0, 0, 100),
        top_k=fields.whole("top_k", 0, 0, 1 << 30),
        top_p=fields.number("top_p", 1.0, 0, 1),
        min_p=fields.number("min_p", 0.0, 0, 1),
        typical_p=fields.number("typical_p", 1.0, 0, 1),
        repetition_penalty=fields.number("repetition_penalty", 1.0, 0.01, 100),
        presence_penalty=fields.number("presence_penalty", 0.0, -2, 2),
        frequency_penalty=fields.number("frequency_penalty", 0.0, -2, 2),
        max_new_tokens=max_new_tokens,
        stop=_stops(fields),
        seed=seed,
        logprobs=logprobs,
    )
    fields.refuse(sampling)
    stream = fields.flag("stream")
    model = None if fields.take("model") is None else fields.text("model")
    options = fields.inner("stream_options")
    include_usage = options.flag("include_usage")
    options.flag("include_obfuscation")
    options.leftovers()
    choices = fields.whole("n", 1, 1, MOST_CHOICES)
    return Wishes(model, sampling, choices, stream, include_usage)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        fields.problem("stop", f"must be a text or a list of at most {MOST_STOPS} texts, none empty")
        return ()
    return tuple(stops)


def _prompts(fields: Fields) -> list[str | list[int]]:
    value = fields.take("prompt")
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(token) is int for token in value):
            return [value]
        if all(isinstance(text, str) for text in value):
            return value
        if all(isinstance(ids, list) and ids and all(type(token) is int for token in ids) for ids in value):
            return value
    fields.problem("prompt", "must be a text, a list of texts, a list of token ids, or a list of such lists")
    return []


def _messages(fields: Fields) -> list[dict[str, str]]:
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        fields.problem("messages", "must be a list of messages, at least one")
        return []
    return [_message(fields, number, message) for number, message in enumerate(value)]


def _message(fields: Fields, number: int, message: Any) -> dict[str, str]:
    name = f"messages[{number}]"
    if not isinstance(message, dict):
        fields.problem(name, 'must be an object with "role" and "content"')
        return {}
    role = message.get("role")
    role = "system" if role == "developer" else role
    if role not in ("system", "user", "assistant"):
        fields.problem(f"{name}.role", f"must be system, user or assistant, not {_short(role)}")
        return {}
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        parts = [part.get("text") for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(content, str):
        fields.problem(f"{name}.content", "must be a text, or a list of parts of the type text")
        return {}
    return {"role": role, "content": content}


def tokens_of(prompt: str | list[int], tokenizer: Tokenizer, context_length: int, param: str) -> Sequence[int]:
    """The tokens of a prompt. Raises ApiError if some do not exist, or they are more than the model reads at once."""
    if isinstance(prompt, str):
        refuse_enormous(prompt, tokenizer, context_length, param)
        tokens = tokenizer.encode(prompt)
    else:
        tokens = prompt
    if len(tokens) >= context_length:
        raise _too_long(f"{len(tokens):,}", context_length, param)
    if strange := next((token for token in tokens if not 0 <= token < tokenizer.vocab_size), None):
        raise ApiError(
            400, f'"{param}" has the token id {strange}; ids are from 0 to {tokenizer.vocab_size - 1}', param=param
        )
    return tokens


def refuse_enormous(text: str, tokenizer: Tokenizer, context_length: int, param: str) -> None:
    """Raise ApiError if the beginning of a text alone is far too long: a megabyte is not encoded only to be refused.

    Where a text is cut its tokens may be others than in the whole, but never so many.
    """
    beginning = text[: CHARACTERS_LOOKED_AT * context_length]
    if len(beginning) < len(text) and len(tokenizer.encode(beginning)) >= 2 * context_length:
        raise _too_long(f"more than {context_length:,}", context_length, param)


def _too_long(tokens: str, context_length: int, param: str) -> ApiError:
    message = f'"{param}" has {tokens} tokens; this model reads at most {context_length - 1:,} at once'
    return ApiError(400, message, param=param, code="context_length_exceeded")
