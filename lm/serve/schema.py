"""Parse and check requests. One error, in OpenAI's format, lists everything that is wrong with a request."""

from __future__ import annotations

import difflib
import json
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from lm.config.sampling import MOST_LOGPROBS, Sampling
from lm.inference.chat_template import ChatFormat
from lm.inference.language_model import LanguageModel

LARGEST_SEED = 2**63
MOST_CHOICES = 128
MOST_STOPS = 16
MOST_ALTERNATIVES = 50
MOST_ROUNDS = 32
CHARACTERS_CHECKED = 64  # per token of the context
# Fields that concern OpenAI's own service, and have no effect here.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
# Fields of OpenAI's API that are not supported, with the values that request nothing and are accepted.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
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
    """An error to answer with: ``status`` is the HTTP status; the rest are the fields of OpenAI's errors."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        """The JSON body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


OPENAI = Sampling(temperature=1.0)  # the defaults of OpenAI's API


@dataclass(frozen=True)
class Limits:
    """Limits of one request, and of all requests together.

    Attributes:
        concurrent: texts generated at the same time.
        waiting: texts that may wait for their turn.
        new_tokens: tokens generated per text.
        body_bytes: size of a request's body.
    """

    concurrent: int = 16
    waiting: int = 256
    new_tokens: int = 2048
    body_bytes: int = 1 << 20


def parse_json(body: bytes) -> dict[str, Any]:
    """Parse a request's body as a JSON object. Raises ApiError."""
    try:
        value = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on unpaired surrogates, which are not text
    except RecursionError:
        raise ApiError(400, "the request cannot be read as JSON: it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ApiError(400, "the request has an unpaired surrogate, which is not a character") from None
    except ValueError as error:
        raise ApiError(400, f"the request is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the request must be a JSON object")
    return value


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number in JSON")


Default = TypeVar("Default", int, None)


class Fields:
    """The fields of a request. Its methods take one field each; ``done`` raises if any was invalid or is unknown.

    ``null`` counts as not given.
    """

    def __init__(self, body: dict[str, Any], where: str = "") -> None:
        self._body = {name: value for name, value in body.items() if value is not None}
        self._where = where
        self._known: set[str] = set()
        self.problems: list[tuple[str, str]] = []  # (field, sentence)

    def problem(self, name: str, sentence: str) -> None:
        """Record what is wrong with a field: a sentence without its subject, such as "must be …"."""
        self.problems.append((self._where + name, f'"{self._where}{name}" {sentence}'))

    def take(self, name: str) -> Any:
        """The raw value; None if it is not given."""
        self._known.add(name)
        return self._body.get(name)

    def integer(self, name: str, default: Default, low: int, high: int) -> int | Default:
        """An integer in [low, high]; ``default`` if it is not given or invalid."""
        valid = type(value := self.take(name)) is int and low <= value <= high
        return self._checked(name, default, valid, f"a whole number from {low} to {high}")

    def number(self, name: str, default: float, low: float, high: float) -> float:
        """A number in [low, high]; ``default`` if it is not given or invalid."""
        valid = type(value := self.take(name)) in (int, float) and low <= value <= high
        return float(self._checked(name, default, valid, f"a number from {low:g} to {high:g}"))

    def flag(self, name: str) -> bool:
        """A boolean; False if it is not given or invalid."""
        return self._checked(name, False, type(self.take(name)) is bool, "true or false")

    def _checked(self, name: str, default: Any, valid: bool, wanted: str) -> Any:
        if not valid and (value := self.take(name)) is not None:
            self.problem(name, f"must be {wanted}, not {_short(value)}")
        return self.take(name) if valid else default

    def text(self, name: str) -> str:
        """A required string."""
        value = self.take(name)
        if not isinstance(value, str):
            self.problem(name, "must be a string" + ("" if value is None else f", not {_short(value)}"))
            return ""
        return value

    def inner(self, name: str) -> Fields:
        """The fields of a nested object; their problems are added to those of this one."""
        value = self.take(name)
        if value is not None and not isinstance(value, dict):
            self.problem(name, f"must be an object, not {_short(value)}")
            value = None
        within = Fields(value or {}, f"{self._where}{name}.")
        within.problems = self.problems
        return within

    def refuse(self, sampling: Sampling) -> None:
        """Record the problems of settings that were made from these fields."""
        for problem in sampling.problems():
            self.problem(*problem.split(" ", 1))

    def leftovers(self) -> None:
        """Record every field that was not taken."""
        for name, value in self._body.items():
            if name in self._known or name in IGNORED or value in UNSUPPORTED.get(name, ()):
                continue
            if name in UNSUPPORTED:
                self.problem(name, "is not supported here")
                continue
            near = difflib.get_close_matches(name, self._known, 1)
            self.problem(_short(name)[1:-1], "is unknown" + (f': did you mean "{near[0]}"?' if near else ""))

    def done(self) -> None:
        """Raise ApiError if there is any problem, or a field that was not taken."""
        self.leftovers()
        if self.problems:
            raise ApiError(400, "; ".join(text for _, text in self.problems[:10]), param=self.problems[0][0])


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "…" + text[-1:]


@dataclass(frozen=True)
class Options:
    """The options that completions and chat completions have in common."""

    model: str | None
    sampling: Sampling
    choices: int
    stream: bool
    include_usage: bool


def choice_sampling(sampling: Sampling, number: int) -> Sampling:
    """The settings of one of several choices: the first has the requested seed, the others the seeds after it."""
    return replace(sampling, seed=(sampling.seed + number) % LARGEST_SEED)


@dataclass(frozen=True)
class Completion:
    """A request to ``/v1/completions``. With ``max_tokens`` 0 (allowed only with ``echo``) nothing is generated."""

    prompts: list[str | list[int]]
    echo: bool
    max_tokens: int
    options: Options


@dataclass(frozen=True)
class Chat:
    """A request to ``/v1/chat/completions``. ``max_tokens`` None: as many as fit in the context."""

    messages: list[dict[str, str]]
    max_tokens: int | None
    options: Options


def read_completion(body: dict[str, Any], limits: Limits, defaults: Sampling = OPENAI) -> Completion:
    """Parse a request to ``/v1/completions``, with these settings where it has none. Raises ApiError."""
    fields = Fields(body)
    prompts = _prompts(fields)
    echo = fields.flag("echo")
    max_tokens = fields.integer("max_tokens", 16, 0 if echo else 1, limits.new_tokens)
    logprobs = fields.integer("logprobs", None, 0, MOST_LOGPROBS)
    options = _common_options(fields, logprobs, max(1, max_tokens), defaults)
    fields.done()
    return Completion(prompts, echo, max_tokens, options)


def read_chat(body: dict[str, Any], limits: Limits, defaults: Sampling = OPENAI) -> Chat:
    """Parse a request to ``/v1/chat/completions``, with these settings where it has none. Raises ApiError."""
    fields = Fields(body)
    messages = _messages(fields)
    newer, older = (
        fields.integer(name, None, 1, limits.new_tokens) for name in ("max_completion_tokens", "max_tokens")
    )
    max_tokens = newer or older
    if older not in (None, max_tokens):
        fields.problem("max_tokens", 'and "max_completion_tokens" differ: give one of the two')
    top = fields.integer("top_logprobs", 0, 0, MOST_LOGPROBS)
    wanted = fields.flag("logprobs")
    if top and not wanted:
        fields.problem("top_logprobs", 'needs "logprobs" to be true')
    options = _common_options(fields, top if wanted else None, max_tokens or limits.new_tokens, defaults)
    fields.done()
    return Chat(messages, max_tokens, options)


def _common_options(fields: Fields, logprobs: int | None, max_new_tokens: int, defaults: Sampling) -> Options:
    seed = fields.integer("seed", secrets.randbelow(LARGEST_SEED), -LARGEST_SEED, LARGEST_SEED - 1)
    sampling = Sampling(
        temperature=fields.number("temperature", defaults.temperature, 0, 100),
        top_k=fields.integer("top_k", defaults.top_k, 0, 1 << 30),
        top_p=fields.number("top_p", defaults.top_p, 0, 1),
        min_p=fields.number("min_p", defaults.min_p, 0, 1),
        typical_p=fields.number("typical_p", defaults.typical_p, 0, 1),
        repetition_penalty=fields.number("repetition_penalty", defaults.repetition_penalty, 0.01, 100),
        presence_penalty=fields.number("presence_penalty", defaults.presence_penalty, -2, 2),
        frequency_penalty=fields.number("frequency_penalty", defaults.frequency_penalty, -2, 2),
        max_new_tokens=max_new_tokens,
        stop=_stops(fields),
        seed=seed % LARGEST_SEED,
        logprobs=logprobs,
    )
    fields.refuse(sampling)
    stream = fields.flag("stream")
    model = None if fields.take("model") is None else fields.text("model")
    stream_options = fields.inner("stream_options")
    include_usage = stream_options.flag("include_usage")
    stream_options.flag("include_obfuscation")
    stream_options.leftovers()
    choices = fields.integer("n", 1, 1, MOST_CHOICES)
    return Options(model, sampling, choices, stream, include_usage)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    stops = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > MOST_STOPS or not all(isinstance(s, str) and s for s in stops):
        fields.problem("stop", f"must be a string or a list of at most {MOST_STOPS} strings, none empty")
        return ()
    return tuple(stops)


def _prompts(fields: Fields) -> list[str | list[int]]:
    value = fields.take("prompt")
    if isinstance(value, str) or _is_token_ids(value):
        return [value]
    if isinstance(value, list) and value and (all(isinstance(x, str) for x in value) or all(map(_is_token_ids, value))):
        return value
    fields.problem("prompt", "must be a string, a list of strings, a list of token ids, or a list of such lists")
    return []


def _is_token_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def _messages(fields: Fields) -> list[dict[str, str]]:
    value = fields.take("messages")
    if not isinstance(value, list) or not value:
        fields.problem("messages", "must be a list of at least one message")
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
        fields.problem(f"{name}.content", "must be a string, or a list of parts of type text")
        return {}
    return {"role": role, "content": content}


def encode_prompt(prompt: str | list[int], model: LanguageModel, param: str) -> Sequence[int]:
    """The token ids of a prompt. Raises ApiError if an id does not exist, or the prompt exceeds the context."""
    if isinstance(prompt, str):
        check_size(prompt, model, param)
    tokens = model.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
    if len(tokens) >= model.context_length:
        raise _too_long(f"{len(tokens):,}", model, param)
    known = model.tokenizer.vocab_size
    if invalid := next((token for token in tokens if not 0 <= token < known), None):
        raise ApiError(400, f'"{param}" has the token id {invalid}; ids range from 0 to {known - 1}', param=param)
    return tokens


def encode_messages(messages: Sequence[dict[str, str]], chat: ChatFormat, model: LanguageModel) -> list[int]:
    """The token ids of a conversation. Raises UserError if it cannot be formatted, ApiError as ``encode_prompt``."""
    rendered = chat.render(messages)
    check_size(rendered.text, model, "messages")
    (tokens,) = chat.pieces_of(rendered, ())
    if len(tokens) >= model.context_length:
        raise _too_long(f"{len(tokens):,}", model, "messages")
    return tokens


def check_size(text: str, model: LanguageModel, param: str) -> None:
    """Raise ApiError if the beginning of a text alone is far too long, without encoding a megabyte first.

    The tokens next to the cut may differ from those of the whole text, but never by that many.
    """
    beginning = text[: CHARACTERS_CHECKED * model.context_length]
    if len(beginning) < len(text) and len(model.tokenizer.encode(beginning)) >= 2 * model.context_length:
        raise _too_long(f"more than {model.context_length:,}", model, param)


def _too_long(tokens: str, model: LanguageModel, param: str) -> ApiError:
    message = f'"{param}" has {tokens} tokens; this model reads at most {model.context_length - 1:,} at once'
    return ApiError(400, message, param=param, code="context_length_exceeded")
