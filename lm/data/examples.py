"""Labeled examples of a task: how files hold them, what their labels mean, and what is wrong with them.

======================  ==========================================  ===================================================
task                    columns (their usual names)                 ``Example.texts`` and ``Example.label``
======================  ==========================================  ===================================================
classification          text, text_pair if there is one, label      the text or both; the label's name
regression              text, text_pair if there is one, label      the text or both; a float
tokens                  words, tags: lists, or text with spaces     the words; as many names of tags
choice                  text, choices, label                        the text and its choices; the right one, from 0
instruction             prompt, response; or a whole conversation   the prompt and the response; None
                        (``Columns``)                               what is said; who says it
contrastive             text, text_pair if there is one             the text or both; None
any other               as classification
======================  ==========================================  ===================================================

``lm.data.example_files`` reads the files, ``lm.data.labels`` the labels in them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.files import parse_json
from data_prep.sources.records import HUGGING_FACE, column_names, known_fields, value_at
from lm.config.finetune_settings import FinetuneConfig
from lm.data.example_files import STDIN, rows_of
from lm.data.labels import choice_of, class_name, is_missing, number_of, refuse_doubles, text_of

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
            "choice": {"text": self.text} | {f"choices {n}": name for n, name in enumerate(self.choices)} | answer,
            "contrastive": texts,
            "instruction": self._conversation(first, labeled=labeled),
        }.get(task, texts | answer)

    def _conversation(self, first: dict[str, Any], *, labeled: bool) -> dict[str, str]:
        """Prompt and response; else, if they have no other names, a conversation in one of three usual formats:
        "messages", ShareGPT's "conversations", or Alpaca's "instruction", "input" and "output"."""
        usual = (self.prompt, self.response) == (Columns.prompt, Columns.response)
        if labeled and usual and not {self.prompt, self.response} <= first.keys():
            for name in ("messages", "conversations"):
                if name in first:
                    return {"messages": name}
            if {"instruction", "output"} <= first.keys():
                return {"prompt": "instruction", "response": "output"}
        return {"prompt": self.prompt} | ({"response": self.response} if labeled else {})


def read_examples(
    source: str | Path, task: str, columns: Columns = Columns(), kept: Collection[str] = ()
) -> list[Example]:
    """All examples of a file or of a Hugging Face dataset (``hf:NAME[:SPLIT]``) for a task.

    Classes have one spelling, except for those in ``kept`` (``lm.data.labels``).

    Raises:
        UserError: the source cannot be read or is empty, a column is missing (the message names those that exist), or
            examples are invalid, each with file and line.
    """
    outcomes = list(_outcomes(source, task, columns, kept, labeled=True))
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
    for found in _outcomes(source, task, columns, (), labeled=False):
        if isinstance(found, UserError):
            raise found
        yield found


def unlabeled_texts(source: str | Path, columns: Columns = Columns()) -> Iterator[tuple[str, ...]]:
    """The text, or pair of texts, of each row; as of ``stream_examples``."""
    return (example.texts for example in stream_examples(source, "classification", columns))


def check_first_example(source: str | Path, task: str, columns: Columns = Columns(), *, labeled: bool = True) -> None:
    """Raise as ``read_examples`` if a file cannot be read, is empty, or its first row is not an example.

    Standard input, which can be read only once, and Hugging Face datasets are not looked at.
    """
    if str(source) == STDIN or str(source).startswith(HUGGING_FACE):
        return
    first = next(_outcomes(source, task, columns, (), labeled=labeled), None)
    if isinstance(first, UserError):
        raise first
    if first is None and labeled:
        raise UserError(f"{source} has no examples")


def _outcomes(
    source: str | Path, task: str, columns: Columns, kept: Collection[str], *, labeled: bool
) -> Iterator[Example | UserError]:
    """Yield each row's example, or the error in it."""
    needed: dict[str, str] = {}
    for place, row in rows_of(source, lines_as="" if labeled else columns.text):
        if not needed:
            needed = columns.needed(task, row, labeled=labeled)
            absent = {part: name for part, name in needed.items() if name not in row and value_at(row, name) is None}
            if absent:
                options = dict.fromkeys(f"--{part.partition(' ')[0].replace('_', '-')}-column" for part in absent)
                raise UserError(
                    f"{place}: there is no column {known_fields(absent.values())} "
                    f"in {known_fields(column_names(row))}: "
                    f"name {'it' if len(absent) == 1 else 'them'} with {' and '.join(options)}"
                )
        row = row | {name: value_at(row, name) for name in needed.values() if name not in row}  # translation.en
        try:
            yield _example(task, place, row, needed, kept, labeled=labeled)
        except UserError as problem:
            yield UserError(f"{place}: {problem}")


def _example(
    task: str, place: str, row: dict[str, Any], needed: dict[str, str], kept: Collection[str], *, labeled: bool
) -> Example:
    """Return a row's example. UserError: what is wrong with it, to follow the place."""

    def text(part: str) -> str:
        return _text(needed[part], row.get(needed[part]), may_be_empty=not labeled)

    answer = row.get(needed["label"]) if "label" in needed else None
    if "label" in needed and is_missing(answer):
        raise UserError(f'"{needed["label"]}" is missing')
    if task == "tokens":
        words = _words(needed["words"], row.get(needed["words"]))
        tags = _tags(needed["tags"], row.get(needed["tags"]), kept) if labeled else None
        if tags is not None and len(tags) != len(words):
            raise UserError(f"there are {len(words)} words, but {len(tags)} tags")
        return Example(words, tags, place)
    if task == "choice":
        choices = _choices(row, [name for part, name in needed.items() if part.startswith("choices ")])
        typed = isinstance(row.get(needed["choices 0"]), list)  # not in a .csv file, which holds texts alone
        right = choice_of(needed["label"], answer, choices, typed=typed) if labeled else None
        return Example((text("text"), *choices), right, place)
    if task == "instruction" and "messages" in needed:
        return _conversation(needed["messages"], row, place)
    if task == "instruction":
        texts = tuple(text(part) for part in needed)
        if needed["prompt"] == "instruction" and row.get("input"):
            texts = (f"{texts[0]}\n{_text('input', row['input'])}", *texts[1:])
        if needed["prompt"] == "instruction" and row.get("system"):
            return Example((_text("system", row["system"]), *texts), ("system", "user", "assistant"), place)
        return Example(texts, None, place)
    texts = tuple(text(part) for part in ("text", "text_pair") if part in needed)
    if not labeled or task == "contrastive":
        return Example(texts, None, place)
    if task == "regression":
        return Example(texts, number_of(needed["label"], answer), place)
    return Example(texts, class_name(needed["label"], answer, kept), place)


# Who speaks, by the names of OpenAI's format and of ShareGPT's.
ROLES = {name: name for name in ("system", "user", "assistant")}
ROLES |= {"developer": "system", "human": "user", "gpt": "assistant"}


def _conversation(column: str, row: dict[str, Any], place: str) -> Example:
    """A conversation as its texts, labeled with the roles; a column "system" comes first."""
    spoken = [("system", _text("system", row["system"]))] if row.get("system") else []
    spoken += messages_of(column, _parsed(row.get(column)))
    if not any(role == "assistant" for role, _ in spoken):
        raise UserError(f'"{column}" has no message of the assistant\'s, so there is nothing to learn')
    return Example(tuple(text for _, text in spoken), tuple(role for role, _ in spoken), place)


def messages_of(column: str, value: Any) -> list[tuple[str, str]]:
    """The role and the text of each message in a list. UserError: what is wrong with it, to follow the place."""
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise UserError(f'"{column}" is missing or is not a list of messages')
    spoken = []
    for number, message in enumerate(value, 1):
        try:
            spoken.append(_message(message))
        except UserError as problem:
            raise UserError(f'message {number} of "{column}": {problem}') from None
    return spoken


def _message(message: dict[str, Any]) -> tuple[str, str]:
    """The role and the text of a message in OpenAI's format or ShareGPT's."""
    said_by, said = ("from", "value") if message.get("role") is None else ("role", "content")
    role, content = message.get(said_by), message.get(said)
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(_text("text", part.get("text"), may_be_empty=True) for part in content)
    if not isinstance(role, str) or role not in ROLES:
        raise UserError(f"the role is {json.dumps(role, default=str)}, not one of {', '.join(ROLES)}")
    if unread := [name for name in ("tool_calls", "function_call") if message.get(name)]:
        raise UserError(f'"{unread[0]}" cannot be learned: only text can')
    return ROLES[role], _text(said, content, may_be_empty=ROLES[role] != "assistant")


def _text(column: str, value: Any, *, may_be_empty: bool = False) -> str:
    if not isinstance(value, str) or not (may_be_empty or value.strip()):
        raise UserError(f'"{column}" is missing or has no text')
    return text_of(column, value)


def _words(column: str, value: Any) -> tuple[str, ...]:
    return tuple(text_of(column, _word(column, word)) for word in _list(column, value))


def _word(column: str, value: Any) -> str:
    """A word: a text, or a number that a file holds instead of one."""
    return value if isinstance(value, str) else class_name(column, value)


def _tags(column: str, value: Any, kept: Collection[str]) -> tuple[str, ...]:
    return tuple(class_name(column, tag, kept) for tag in _list(column, value))


def _list(column: str, value: Any) -> list[Any]:
    found = value.split() if isinstance(value, str) else value
    if not isinstance(found, list) or not found:
        raise UserError(f'"{column}" is missing or is not a list')
    return found


def _parsed(value: Any) -> Any:
    """The value; a text, in which .csv files hold a list, as the JSON in it, or None if that is invalid."""
    try:
        return parse_json(value) if isinstance(value, str) else value
    except ValueError:
        return None


def _choices(row: dict[str, Any], names: Sequence[str]) -> tuple[str, ...]:
    found: Any = _parsed(row.get(names[0])) if len(names) == 1 else [row.get(name) for name in names]
    if not isinstance(found, list) or len(found) < 2:
        raise UserError(f'"{names[0]}" is missing or is not a list of at least two texts')
    return tuple(_text(names[min(n, len(names) - 1)], choice) for n, choice in enumerate(found))


@dataclass(frozen=True)
class Labels:
    """The classes of a task, in a fixed order: the number of a class is its index in ``names``."""

    names: tuple[str, ...]

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Labels:
        """The classes (or tags) of examples, sorted as numbers, else by name.

        Raises:
            UserError: there is only one, or two are probably the same.
        """
        found: dict[str, str] = {}  # with the place of each, the first one
        for example in examples:
            for name in _names_of(example):
                found.setdefault(name, example.place)
        if len(found) < 2:
            raise _constant(examples, *found)
        refuse_doubles(found)
        by_number = all(name.removeprefix("-").isdecimal() and len(name) < 20 for name in found)
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
    first, last = examples[0].place, examples[-1].place
    where = first if first == last else f"{first} to {last.rpartition(', ')[2]}"
    return UserError(f'{where}: every example has the label "{label}", so there is nothing to learn')


def read_task(task: FinetuneConfig, kept: Collection[str] = ()) -> tuple[list[Example], list[Example]]:
    """The training and validation examples of a fine-tuning, as ``read_examples``; no validation file: no examples.

    Contrastive training is validated on pairs of texts with their similarity.
    """
    columns = columns_of(task)
    train = read_examples(task.train, task.task, columns, kept)
    if not task.validation:
        return train, []
    if task.task == "contrastive":  # a column of "" is that of the training texts
        return train, read_similar(task.validation, replace(columns, text_pair=columns.text_pair or None))
    return train, read_examples(task.validation, task.task, columns, kept)


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
