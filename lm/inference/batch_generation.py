"""Continue many prompts: in the order in which they come, as many at a time as there are rows."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_prep.errors import UserError
from lm.data.example_files import json_lines
from lm.inference.generator import Event, Generator
from lm.inference.sampling import Sampling

# Requests begun before the first of them is finished, for each row: while a long text is written, the other rows go on.
AHEAD = 4
MOST_PROBLEMS = 20


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and how."""

    text: str
    sampling: Sampling


@dataclass
class Written:
    """A continuation as it grows. ``events`` are kept for their log-probabilities."""

    prompt: Prompt
    text: str = ""
    events: list[Event] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] | None = None


def in_order(generator: Generator, prompts: Iterable[Prompt], rows: int) -> Iterator[tuple[Prompt, Event]]:
    """All events of the first prompt, then all of the second, …, each as soon as it can be told.

    Reads ``prompts`` as they are needed, and holds no more than ``AHEAD`` times ``rows`` of them.
    """
    source = iter(prompts)
    begun: deque[tuple[int, Prompt]] = deque()
    held: dict[int, list[Event]] = {}
    while True:
        while len(begun) < AHEAD * rows and (prompt := next(source, None)) is not None:
            handle = generator.add(prompt.text, prompt.sampling)
            begun.append((handle, prompt))
            held[handle] = []
        if not begun:
            return
        for event in generator.step():
            held[event.handle].append(event)
        while begun:
            handle, prompt = begun[0]
            events, held[handle] = held[handle], []
            for event in events:
                yield prompt, event
            if not events or events[-1].finish_reason is None:
                break
            begun.popleft()
            del held[handle]


def whole_texts(generator: Generator, prompts: Iterable[Prompt], rows: int) -> Iterator[Written]:
    """The finished continuations, in the order of the prompts."""
    written: Written | None = None
    for prompt, event in in_order(generator, prompts, rows):
        if written is None:
            written = Written(prompt)
        written.text += event.text
        written.events.append(event)
        if event.finish_reason is not None:
            written.finish_reason = event.finish_reason
            yield written
            written = None


def read_prompts(path: Path, defaults: Sampling) -> Iterator[Prompt]:
    """The prompts of a JSONL file: ``{"prompt": "…"}`` a line, with settings of ``Sampling`` where they differ from
    ``defaults``; empty lines are passed over. Reads as it goes.

    Raises:
        UserError: for the first line that cannot be; ``check_prompts`` tells of all of them.
    """
    for place, line in _lines(path):
        prompt, problems = _parsed(line, defaults)
        if prompt is None:
            raise UserError(f"{place}: {'; '.join(problems)}")
        yield prompt


def check_prompts(path: Path, defaults: Sampling) -> int:
    """Read the whole file once and return how many prompts it holds.

    Raises:
        UserError: there is no such file, or lines in it that cannot be, with their numbers.
    """
    told, count = [], 0
    for place, line in _lines(path):
        prompt, problems = _parsed(line, defaults)
        count += prompt is not None
        told += [f"{place}: {problem}" for problem in problems]
        if len(told) >= MOST_PROBLEMS:
            told.append("there may be more")
            break
    if told:
        raise UserError("\n".join(told))
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
    problems = [f'unknown setting "{name}"; there are {", ".join(kinds)}' for name in given if name not in kinds]
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


_WORDS = {"number": "a number", "integer": "a whole number", "texts": "a list of texts"}


def _kind(value: Any, name: str) -> str:
    if name == "stop":
        return "texts"
    return "number" if isinstance(value, float) else "integer"


def _is_a(kind: str, value: Any) -> bool:
    if kind == "texts":
        return isinstance(value, list) and all(isinstance(each, str) for each in value)
    return not isinstance(value, bool) and isinstance(value, int | float if kind == "number" else int)
