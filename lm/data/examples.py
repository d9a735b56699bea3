"""Labeled examples of a task: how files hold them, what their labels mean, and what is wrong with them.

======================  ==========================================  ===================================================
task                    columns (their usual names)                 ``Example.texts`` and ``Example.label``
======================  ==========================================  ===================================================
classification          text, text_pair if there is one, label      the text or both; the label's name
regression              text, text_pair if there is one, label      the text or both; a float
tokens                  words, tags: lists, or text with spaces     the words; as many names of tags
choice                  text, choices, label                        the text and its choices; the right one, from 0
instruction             prompt, response                            the prompt and the response; None
contrastive             text, text_pair if there is one             the text or both; None
any other               as classification
======================  ==========================================  ===================================================

``lm.data.example_files`` reads the files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.sources.records import column_names, known_fields, value_at
from lm.config.settings import FinetuneConfig
from lm.data.example_files import rows_of

MOST_PROBLEMS = 5  # that are reported at once


@dataclass(frozen=True)
class Example:
    """One example of a task. ``label`` is None if it was not read; ``place`` is like ``file.jsonl, line 12``."""

    texts: tuple[str, ...]
    label: Any
    place: str


@dataclass(frozen=True)
class Columns:
    """The names of the columns that hold the parts of an example; each task uses its own (see the module).

    ``text_pair`` None: there is a second text if the file's first row has the column "text_pair"; "": there is none.
    ``choices`` is one column with a list of texts, or several with a text each.
    """

    text: str = FinetuneConfig.text_column
    text_pair: str | None = None
    label: str = FinetuneConfig.label_column
    choices: tuple[str, ...] = (FinetuneConfig.choices_column,)
    words: str = FinetuneConfig.words_column
    tags: str = FinetuneConfig.tags_column
    prompt: str = FinetuneConfig.prompt_column
    response: str = FinetuneConfig.response_column

    def needed(self, task: str, first: dict[str, Any], *, labeled: bool) -> dict[str, str]:
        """The columns of a task's examples, by their part in it; ``first`` is the file's first row."""
        pair = self.text_pair or ("text_pair" if self.text_pair is None and "text_pair" in first else "")
        texts = {"text": self.text} | ({"text_pair": pair} if pair else {})
        answer = {"label": self.label} if labeled else {}
        return {
            "tokens": {"words": self.words} | ({"tags": self.tags} if labeled else {}),
            "choice": {"text": self.text} | {f"choice {n}": name for n, name in enumerate(self.choices)} | answer,
            "contrastive": texts,
            "instruction": {"prompt": self.prompt} | ({"response": self.response} if labeled else {}),
        }.get(task, texts | answer)


def read_examples(source: str | Path, task: str, columns: Columns = Columns()) -> list[Example]:
    """All examples of a file or of a Hugging Face dataset (``hf:NAME[:SPLIT]``) for a task.

    Raises:
        UserError: the source cannot be read or is empty, a column is missing (the message names those that exist), or
            examples are invalid, each with file and line.
    """
    outcomes = list(_outcomes(source, task, columns, labeled=True))
    problems = [str(found) for found in outcomes if isinstance(found, UserError)]
    if (more := len(problems) - MOST_PROBLEMS) > 0:
        problems[MOST_PROBLEMS:] = [f"and {more:,} more like these"]
    if problems or not outcomes:
        raise UserError("\n".join(problems) or f"{source} has no examples")
    return [found for found in outcomes if isinstance(found, Example)]


def stream_examples(source: str | Path, task: str, columns: Columns = Columns()) -> Iterator[Example]:
    """Stream examples without their labels; raises as ``read_examples``, at the first problem. Texts may be empty.

    ``-`` is JSON lines from standard input, and each line of a .txt file is a text.
    """
    for found in _outcomes(source, task, columns, labeled=False):
        if isinstance(found, UserError):
            raise found
        yield found


def _outcomes(source: str | Path, task: str, columns: Columns, *, labeled: bool) -> Iterator[Example | UserError]:
    """Yield each row's example, or the error in it."""
    needed: dict[str, str] = {}
    for place, row in rows_of(source, lines_as="" if labeled else columns.text):
        if not needed:
            needed = columns.needed(task, row, labeled=labeled)
            missing = [name for name in needed.values() if name not in row and value_at(row, name) is None]
            if missing:
                raise UserError(
                    f"{place}: there is no column {known_fields(missing)} in {known_fields(column_names(row))}: "
                    "name the columns, for example with --text-column"
                )
        row = row | {name: value_at(row, name) for name in needed.values() if name not in row}  # translation.en
        try:
            yield _example(task, place, row, needed, labeled=labeled)
        except UserError as problem:
            yield UserError(f"{place}: {problem}")


def _example(task: str, place: str, row: dict[str, Any], needed: dict[str, str], *, labeled: bool) -> Example:
    """Return a row's example. UserError: what is wrong with it, to follow the place."""

    def text(part: str) -> str:
        return _text(needed[part], row.get(needed[part]), may_be_empty=not labeled)

    answer = row.get(needed["label"]) if "label" in needed else None
    if "label" in needed and (answer is None or answer == ""):
        raise UserError(f'"{needed["label"]}" is missing')
    if task == "tokens":
        words = _words(needed["words"], row.get(needed["words"]))
        tags = _words(needed["tags"], row.get(needed["tags"])) if labeled else None
        if tags is not None and len(tags) != len(words):
            raise UserError(f"there are {len(words)} words, but {len(tags)} tags")
        return Example(words, tags, place)
    if task == "choice":
        choices = _choices(row, [name for part, name in needed.items() if part.startswith("choice ")])
        return Example((text("text"), *choices), _choice(answer, choices) if labeled else None, place)
    if task == "instruction":
        return Example(tuple(text(part) for part in needed), None, place)
    texts = tuple(text(part) for part in ("text", "text_pair") if part in needed)
    if not labeled or task == "contrastive":
        return Example(texts, None, place)
    label = _number(needed["label"], answer) if task == "regression" else _name(needed["label"], answer)
    return Example(texts, label, place)


def _text(column: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise UserError(f'"{column}" is missing or has no text')
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError(f'"{column}" contains half of a surrogate pair') from None
    return value


def _words(column: str, value: Any) -> tuple[str, ...]:
    words = value.split() if isinstance(value, str) else value
    if not isinstance(words, list) or not words:
        raise UserError(f'"{column}" is missing or is not a list')
    return tuple(_name(column, word) for word in words)


def _choices(row: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    found = [row.get(name) for name in names]
    if len(names) == 1:
        try:  # .csv files hold a list as text
            found = json.loads(found[0]) if isinstance(found[0], str) else found[0]  # type: ignore[assignment]
        except ValueError:
            found = []
    if not isinstance(found, list) or len(found) < 2:
        raise UserError(f'"{names[0]}" is missing or is not a list of at least two texts')
    return tuple(_text(names[min(n, len(names) - 1)], choice) for n, choice in enumerate(found))


def _choice(answer: Any, choices: Sequence[str]) -> int:
    """The number of the choice that an answer names, by its number from 0, its full text, or its letter from A."""
    text = _name("label", answer)
    number = -1
    if text.isdecimal():
        number = int(text)
    elif text in choices:
        number = choices.index(text)
    elif len(text) == 1:
        number = ord(text.upper()) - ord("A")
    if not 0 <= number < len(choices):
        wrong = f'the answer "{text}" is none of the {len(choices)} choices'
        raise UserError(f"{wrong}: give its number from 0, its letter or its text")
    return number


def _name(column: str, value: Any) -> str:
    """A label as text: 1, 1.0 and "1" are the same label in every kind of file."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, (str, int)):
        return str(value)
    if isinstance(value, float):
        raise UserError(f'"{column}" is {value}, which is not a class: use --task regression for numbers')
    raise UserError(f'"{column}" is neither text nor a whole number')


def _number(column: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f'"{column}" is {json.dumps(value, default=str)}, not a number')
    return number


@dataclass(frozen=True)
class Labels:
    """The classes of a task, in a fixed order: the number of a class is its index in ``names``."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Labels:
        """The classes (or tags) of examples, sorted as numbers, else by name. UserError if there is only one."""
        found = {name for example in examples for name in _names_of(example)}
        if len(found) < 2:
            raise _constant(examples, *found)
        by_number = all(name.removeprefix("-").isdecimal() for name in found)
        return cls(tuple(sorted(found, key=lambda name: (int(name) if by_number else 0, name))))

    def indices(self, example: Example) -> list[int]:
        """The numbers of an example's class or tags. UserError for one that the training examples do not have."""
        for name in _names_of(example):
            if name not in self.names:
                raise UserError(
                    f'{example.place}: the label "{name}" does not occur in the training examples: they have '
                    f"{known_fields(self.names)}"
                )
        return [self.names.index(name) for name in _names_of(example)]


def _names_of(example: Example) -> tuple[str, ...]:
    return example.label if isinstance(example.label, tuple) else (example.label,)


def numbers_of(examples: Sequence[Example]) -> list[float]:
    """The numbers that a regression learns from. UserError if all are the same."""
    numbers = [example.label for example in examples]
    if len(set(numbers)) < 2:
        raise _constant(examples, numbers[0])
    return numbers


def _constant(examples: Sequence[Example], label: Any) -> UserError:
    first, last = examples[0].place, examples[-1].place.rpartition(", ")[2]
    return UserError(f'{first} to {last}: every example has the label "{label}", so there is nothing to learn')


def read_task(task: FinetuneConfig) -> tuple[list[Example], list[Example]]:
    """The training and validation examples of a fine-tuning, as ``read_examples``; no validation file: no examples.

    Contrastive training is validated on pairs of texts with their similarity.
    """
    columns = columns_of(task)
    train = read_examples(task.train, task.task, columns)
    if not task.validation:
        return train, []
    if task.task == "contrastive":  # a column of "" is that of the training texts
        return train, read_similar(task.validation, replace(columns, text_pair=columns.text_pair or None))
    return train, read_examples(task.validation, task.task, columns)


def columns_of(task: FinetuneConfig) -> Columns:
    """The columns that the settings name."""
    named: dict[str, Any] = {f.name: getattr(task, f"{f.name}_column") for f in fields(Columns)}
    named |= {"choices": tuple(named["choices"].split(","))}
    return Columns(**named | ({"text_pair": None} if named["text_pair"] == "auto" else {}))


def content_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of the content of examples, not of their files."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.texts, example.label]).encode())
    return digest.hexdigest()


def read_similar(source: str | Path, columns: Columns) -> list[Example]:
    """Pairs of texts, labeled with their similarity; raises as ``read_examples``, and for single texts."""
    pairs = read_examples(source, "regression", columns)
    if len(pairs[0].texts) != 2:
        raise UserError(f"{pairs[0].place}: there is only one text, but similarity needs two")
    return pairs
