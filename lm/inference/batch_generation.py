"""Continue many prompts in input order, up to ``Generator.max_rows`` at a time."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.data.example_files import json_lines
from lm.inference.generator import Event, Generator
from lm.inference.sampling import Sampling

# Requests started before the first of them finishes, per row: while a long text is written, the other rows stay busy.
AHEAD = 4
MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how."""

    text: str
    sampling: Sampling


@dataclass
class Continuation:
    """A continuation as it grows. ``events`` are kept for their log-probabilities."""

    prompt: Prompt
    text: str = ""
    events: list[Event] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None

    def as_dict(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return prompt, continuation and finish reason, and the log-probabilities of tokens if requested."""
        content: dict[str, Any] = {
            "prompt": self.prompt.text,
            "continuation": self.text,
            "finish_reason": self.finish_reason,
        }
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
            handle = generator.add(prompt.text, prompt.sampling)
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
    current: Continuation | None = None
    for prompt, event in events_in_order(generator, prompts):
        if current is None:
            current = Continuation(prompt)
        current.text += event.text
        current.events.append(event)
        if event.finish_reason is not None:
            current.finish_reason = event.finish_reason
            yield current
            current = None


def read_prompts(path: Path, defaults: Sampling) -> Iterator[Prompt]:
    """Yield the prompts of a JSONL file, ``{"prompt": "…"}`` per line, reading as it goes.

    A line may have settings of ``Sampling`` that differ from ``defaults``; empty lines are skipped.

    Raises:
        UserError: a line is invalid; ``check_prompts`` lists all of them.
    """
    for where, line in _lines(path):
        prompt, problems = _parsed(line, defaults)
        if prompt is None:
            raise UserError(f"{where}: {'; '.join(problems)}")
        yield prompt


def check_prompts(path: Path, defaults: Sampling) -> int:
    """Read the whole file once and return the number of prompts in it.

    Raises:
        UserError: the file cannot be read, or has invalid lines; the message lists them by number.
    """
    messages, count = [], 0
    for where, line in _lines(path):
        prompt, problems = _parsed(line, defaults)
        count += prompt is not None
        messages += [f"{where}: {problem}" for problem in problems]
        if len(messages) >= MOST_PROBLEMS:
            messages.append("there may be more")
            break
    if messages:
        raise UserError("\n".join(messages))
    return count


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any] | str]]:
    """The objects of the lines, each with its place; a phrase for a line that has none."""
    try:
        with path.open("rb") as file:
            yield from json_lines(str(path), enumerate(file, 1))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _parsed(content: dict[str, Any] | str, defaults: Sampling) -> tuple[Prompt | None, list[str]]:
    """The prompt of a line, or None and what is wrong with it."""
    if isinstance(content, str):
        return None, [content]
    if not isinstance(content.get("prompt"), str):
        return None, ['no object with a text "prompt"']
    kinds = {f.name: _kind(getattr(defaults, f.name), f.name) for f in dataclasses.fields(Sampling)}
    given = {name: value for name, value in content.items() if name != "prompt"}
    problems = [f'unknown setting "{name}"; the settings are {", ".join(kinds)}' for name in given if name not in kinds]
    problems += [
        f"{name} must be {_WORDS[kinds[name]]}, not {json.dumps(value, ensure_ascii=False)}"
        for name, value in given.items()
        if name in kinds and not _is_a(kinds[name], value)
    ]
    if problems:
        return None, problems
    if "stop" in given:
        given["stop"] = tuple(given["stop"])
    sampling = dataclasses.replace(defaults, **given)
    problems = sampling.problems()
    return (None, problems) if problems else (Prompt(content["prompt"], sampling), [])


_WORDS = {"number": "a number", "integer": "an integer", "strings": "a list of strings"}


def _kind(value: Any, name: str) -> str:
    if name == "stop":
        return "strings"
    return "number" if isinstance(value, float) else "integer"


def _is_a(kind: str, value: Any) -> bool:
    if kind == "strings":
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    return not isinstance(value, bool) and isinstance(value, int | float if kind == "number" else int)
