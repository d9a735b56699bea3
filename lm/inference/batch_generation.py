"""Continue many prompts in input order, up to ``Generator.max_rows`` at a time."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.data.example_files import STDIN, json_lines
from lm.data.examples import messages_of
from lm.inference.chat_template import ChatFormat, Message
from lm.inference.generator import Event, Generator
from lm.inference.sampling import Sampling

# Requests started before the first of them finishes, per row: while a long text is written, the other rows stay busy.
AHEAD = 4
MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how; or the ``messages`` of a chat, their tokens, and those that end its answer.

    What is written may have its place before a ``suffix`` (``lm.inference.infill``).
    """

    text: str
    sampling: Sampling
    messages: Sequence[Message] = ()
    tokens: Sequence[int] = ()
    ends: Sequence[int] = ()
    suffix: str = ""


@dataclass(frozen=True)
class Continuation:
    """A finished continuation. ``events`` are kept for their log-probabilities."""

    prompt: Prompt
    text: str
    events: list[Event]
    finish_reason: Literal["stop", "length"]

    def as_dict(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return prompt, continuation and finish reason, and the log-probabilities of tokens if requested."""
        said = self.prompt.messages
        content: dict[str, Any] = {"messages": said} if said else {"prompt": self.prompt.text}
        content |= {"suffix": self.prompt.suffix} if self.prompt.suffix else {}
        content |= {"continuation": self.text, "finish_reason": self.finish_reason}
        if self.prompt.sampling.logprobs is not None:

            def named(token: int, logprob: float | None) -> dict[str, Any]:
                return {"token": tokenizer.decode([token]), "id": token, "logprob": logprob}

            content["tokens"] = [
                named(event.token, event.logprob) | {"top": [named(*each) for each in event.top_logprobs]}
                for event in self.events
                if event.token is not None
            ]
        return content


def events_in_order(generator: Generator, prompts: Iterable[Prompt]) -> Iterator[tuple[Prompt, Event]]:
    """Yield all events of the first prompt, then all of the second, and so on, each as early as possible.

    Reads ``prompts`` as they are needed, and holds no more than ``AHEAD`` per row of the generator.
    """
    source = iter(prompts)
    started: deque[tuple[int, Prompt]] = deque()
    held: dict[int, list[Event]] = {}
    while True:
        while len(started) < AHEAD * generator.max_rows and (prompt := next(source, None)) is not None:
            handle = generator.add(prompt.tokens or prompt.text, prompt.sampling, prompt.ends)
            started.append((handle, prompt))
            held[handle] = []
        if not started:
            return
        for event in generator.step():
            held[event.handle].append(event)
        while started:
            handle, prompt = started[0]
            events, held[handle] = held[handle], []
            for event in events:
                yield prompt, event
            if not events or events[-1].finish_reason is None:
                break
            started.popleft()
            del held[handle]


def continuations(generator: Generator, prompts: Iterable[Prompt]) -> Iterator[Continuation]:
    """Yield the finished continuations in the order of the prompts."""
    events: list[Event] = []
    for prompt, event in events_in_order(generator, prompts):
        events.append(event)
        if event.finish_reason is not None:
            yield Continuation(prompt, "".join(each.text for each in events), events, event.finish_reason)
            events = []


def read_prompts(path: Path, defaults: Sampling, chat: ChatFormat) -> Iterator[Prompt]:
    """Yield the prompts of a JSONL file, ``{"prompt": "…"}`` or ``{"messages": […]}`` per line, reading as it goes.

    A line may have settings of ``Sampling`` that differ from ``defaults``; empty lines are skipped. Raise UserError for
    an invalid line; ``check_prompts`` lists all of them.
    """
    for prompt, problems in _outcomes(path, defaults, chat):
        if prompt is None:
            raise UserError("\n".join(problems))
        yield prompt


def check_prompts(path: Path, defaults: Sampling, chat: ChatFormat) -> int:
    """Read the whole file once and return the number of its prompts; UserError lists invalid lines by number."""
    messages, count = [], 0
    for prompt, problems in _outcomes(path, defaults, chat):
        count += prompt is not None
        messages += problems
        if len(messages) >= MOST_PROBLEMS:
            messages.append("there may be more")
            break
    if messages:
        raise UserError("\n".join(messages))
    return count


def _outcomes(path: Path, defaults: Sampling, chat: ChatFormat) -> Iterator[tuple[Prompt | None, list[str]]]:
    """Yield each line's prompt, or None and what is wrong with the line; the path ``-`` is standard input."""
    is_stdin = str(path) == STDIN
    try:
        with nullcontext(sys.stdin.buffer) if is_stdin else path.open("rb") as file:
            for place, content in json_lines("standard input" if is_stdin else str(path), enumerate(file, 1)):
                prompt, problems = _parsed(content, defaults, chat)
                yield prompt, [f"{place}: {problem}" for problem in problems]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _parsed(content: dict[str, Any] | str, defaults: Sampling, chat: ChatFormat) -> tuple[Prompt | None, list[str]]:
    """Return the prompt of a line, or None and what is wrong with it."""
    if isinstance(content, str):
        return None, [content]
    text, said = content.pop("prompt", None), content.pop("messages", None)
    if isinstance(text, str) == isinstance(said, list):
        return None, ['no object with a text "prompt", or else a list of "messages"']
    problems = [problem for name, value in content.items() if (problem := _problem(defaults, name, value))]
    if not problems:
        if "stop" in content:
            content["stop"] = tuple(content["stop"])
        sampling = dataclasses.replace(defaults, **content)
        problems = sampling.problems()
    if problems:
        return None, problems
    if said is None:
        return Prompt(text, sampling), []
    try:
        messages = [{"role": role, "content": words} for role, words in messages_of("messages", said)]
        tokens = chat.encode(messages)
    except UserError as problem:
        return None, [str(problem)]
    return Prompt("", dataclasses.replace(sampling, stop=sampling.stop + chat.stops), messages, tokens, chat.ends), []


def _problem(defaults: Sampling, name: str, value: Any) -> str:
    """Return what is wrong with the name of a setting or the type of its value; "" if nothing is."""
    names = [field.name for field in dataclasses.fields(Sampling)]
    if name not in names:
        return f'unknown setting "{name}"; the settings are {", ".join(names)}'
    if name == "stop":
        wanted, fits = "a list of strings", isinstance(value, list) and all(isinstance(each, str) for each in value)
    elif isinstance(getattr(defaults, name), float):
        wanted, fits = "a number", isinstance(value, int | float) and not isinstance(value, bool)
    else:
        wanted, fits = "an integer", isinstance(value, int) and not isinstance(value, bool)
    return "" if fits else f"{name} must be {wanted}, not {json.dumps(value, ensure_ascii=False)}"
