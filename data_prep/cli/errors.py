"""Commands that report errors in one sentence, without a traceback."""

from __future__ import annotations

from typing import Any, NoReturn

import click

from data_prep.errors import INTERRUPTED_STATUS, MACHINE_ERROR_STATUS, USER_ERROR_STATUS, UserError


class FriendlyCommand(click.Command):
    """A command that turns errors into one line on stderr and an exit status.

    The status is 2 for errors the user can fix (``UserError``), 1 for errors of the machine (``OSError``), 130 for
    Ctrl-C. A closed pipe (``… | head``) is not reported.
    """

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except UserError as error:
            _leave(ctx, "\n".join(f"error: {line}" for line in str(error).splitlines()), USER_ERROR_STATUS)
        except KeyboardInterrupt as interrupt:
            _leave(ctx, str(interrupt) or "stopped", INTERRUPTED_STATUS)
        except BrokenPipeError:
            raise  # click exits silently
        except OSError as error:
            _leave(ctx, f"error: {_sentence(error)}", MACHINE_ERROR_STATUS)


class FriendlyGroup(FriendlyCommand, click.Group):
    """A group of commands that report errors like a ``FriendlyCommand``."""


def _sentence(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    file = f'"{error.filename}": ' if error.filename is not None else ""
    return file + error.strerror[:1].lower() + error.strerror[1:]


def _leave(context: click.Context, message: str, status: int) -> NoReturn:
    click.echo(message, err=True)
    context.exit(status)
