"""``kindling sample --chat``: talk with a model in a terminal."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from lm.inference.generator import Generator
    from lm.inference.sampling import Sampling
    from lm.model.transformer import Transformer
    from lm.runs.directory import Run


def converse(run: Run, model: Transformer, sampling: Sampling, *, compiled: bool = False) -> None:
    """Read what the person says, a line each time, and write the answers, until the input ends.

    The conversation is one text by the run's chat template, or plain turns (``chat_template``); with each turn the
    model reads what is new in it. Ctrl-C ends an answer, which stays in the conversation as far as it came.
    """
    from lm.inference.chat_template import PLAIN_STOPS, read_template, render
    from lm.inference.generator import Generator

    template = read_template(run.path)
    if template is None:
        sampling = dataclasses.replace(sampling, stop=(*sampling.stop, *PLAIN_STOPS))
    context = run.config.data.context_length
    generator = Generator(model, run.tokenizer, context, max_rows=1, reuse=True, compiled=compiled)
    if generator.compiling:
        click.echo(generator.compiling, err=True)
    messages: list[dict[str, str]] = []
    while (line := _next_line()) is not None:
        if line.strip():
            messages.append({"role": "user", "content": line.strip()})
            answer = "".join(_shown(generator, render(messages, template), sampling))
            messages.append({"role": "assistant", "content": answer.strip()})


def _next_line() -> str | None:
    """A line of what the person says, or None at the end; asked for in a terminal, where it can be edited."""
    try:
        if sys.stdin.isatty():
            with suppress(ImportError):  # a platform without it goes without
                import readline  # noqa: F401  input() edits lines and remembers them once this is imported
            return input("> ")
        return sys.stdin.readline() or None
    except EOFError:
        click.echo()
        return None
    except KeyboardInterrupt:
        click.echo()
        return ""


def _shown(generator: Generator, prompt: str, sampling: Sampling) -> Iterator[str]:
    """Print the answer as it grows, and give its pieces."""
    handle = generator.add(prompt, sampling)
    with _interrupts() as asked:
        while generator.busy:
            for event in generator.step():
                sys.stdout.write(event.text)
                sys.stdout.flush()
                yield event.text
            if asked:
                generator.cancel(handle)
    sys.stdout.write("\n")
    sys.stdout.flush()


@contextmanager
def _interrupts() -> Iterator[list[bool]]:
    """A list that is no longer empty once Ctrl-C was pressed: a step of the model is never left half done."""
    asked: list[bool] = []

    def remember(number: int, frame: FrameType | None) -> None:
        asked.append(True)

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
