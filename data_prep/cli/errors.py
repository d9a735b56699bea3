"""Commands that report errors in one sentence, without a traceback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from data_prep.errors import INTERRUPTED_STATUS, MACHINE_ERROR_STATUS, USER_ERROR_STATUS, UserError


@contextmanager
def friendly_errors(context: click.Context) -> Iterator[None]:
    """Turn errors into one line on stderr and an exit status.

    The status is 2 for errors the user can fix (``UserError``), 1 for errors of the machine (``OSError``), 130 for
    Ctrl-C. A closed pipe (``… | head``) is not reported.
    """
    try:
        yield
    except UserError as error:
        _leave(context, "\n".join(f"error: {line}" for line in str(error).splitlines()), USER_ERROR_STATUS)
    except KeyboardInterrupt as interrupt:
        _leave(context, str(interrupt) or "stopped", INTERRUPTED_STATUS)
    except BrokenPipeError:
        raise  # click exits silently
    except OSError as error:
        _leave(context, f"error: {_sentence(error)}", MACHINE_ERROR_STATUS)


def _sentence(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    file = f'"{error.filename}": ' if error.filename is not None else ""
    return file + error.strerror[:1].lower() + error.strerror[1:]


def _leave(context: click.Context, message: str, status: int) -> None:
    click.echo(message, err=True)
    context.exit(status)


class FriendlyCommand(click.Command):
    """A command with ``friendly_errors``."""

    def invoke(self, ctx: click.Context) -> Any:
        with friendly_errors(ctx):
            return super().invoke(ctx)


class FriendlyGroup(click.Group):
    """A group whose commands have ``friendly_errors``."""

    command_class = FriendlyCommand

    def invoke(self, ctx: click.Context) -> Any:
        with friendly_errors(ctx):
            return super().invoke(ctx)
