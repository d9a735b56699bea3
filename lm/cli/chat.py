"""``kindling sample --chat``: chat with a model in a terminal."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import click

from data_prep.errors import UserError

if TYPE_CHECKING:
    from lm.inference.chat_template import ChatFormat
    from lm.inference.generator import Generator
    from lm.inference.sampling import Sampling


def converse(generator: Generator, chat: ChatFormat, sampling: Sampling) -> None:
    """Read the user's messages, one per line, and print the answers until the input ends.

    Each answer continues the whole conversation; a generator with ``reuse`` reads only what is new in each turn. Ctrl-C
    stops an answer; what was printed stays in the conversation.
    """
    sampling = dataclasses.replace(sampling, stop=(*sampling.stop, *chat.stops))
    messages: list[dict[str, str]] = []
    while (line := _next_line()) is not None:
        if line.strip():
            messages.append({"role": "user", "content": line.strip()})
            answer = "".join(_shown(generator, chat, messages, sampling))
            messages.append({"role": "assistant", "content": answer.strip()})


def _next_line() -> str | None:
    """Return the next line of input, or None at its end; a terminal shows a prompt and allows editing.

    Raises:
        UserError: it is not UTF-8.
    """
    try:
        if sys.stdin.isatty():
            with suppress(ImportError):  # not on every platform
                import readline  # noqa: F401  gives input() line editing and a history
            return _text(input("> "))
        return _text(sys.stdin.readline()) or None
    except UnicodeError:
        raise UserError("the input is not UTF-8: convert it") from None
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""


def _text(line: str) -> str:
    """The line; UnicodeEncodeError if it holds bytes that are not text, as Python may read them."""
    line.encode("utf-8")
    return line


def _shown(generator: Generator, chat: ChatFormat, messages: list[dict[str, str]], sampling: Sampling) -> Iterator[str]:
    """Print the answer as it grows, and yield its pieces."""
    handle = generator.add(chat.encode(messages), sampling, chat.ends)
    with _interrupts() as pressed:
        while generator.busy:
            for event in generator.step():
                sys.stdout.write(event.text)
                sys.stdout.flush()
                yield event.text
            if pressed:
                generator.cancel(handle)
    sys.stdout.write("\n")
    sys.stdout.flush()


@contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """Yield a list that Ctrl-C appends to, so that a step of the model is never interrupted half-way."""
    pressed: list[bool] = []

    def remember(number: int, frame: FrameType | None) -> None:
        pressed.append(True)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
