"""Commands that report errors in one sentence, without a traceback: wrong input, a full disk, a closed output."""

from __future__ import annotations

import atexit
import difflib
import errno
import gc
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

import click

from data_prep.cli.help import WIDEST, SectionedCommand, is_whole
from data_prep.errors import INTERRUPTED_STATUS, MACHINE_ERROR_STATUS, USER_ERROR_STATUS, UserError
from data_prep.errors.other_names import other_name
from data_prep.files import WINDOWS, is_text

LARGEST_INTEGER = 2**63 - 1


class FriendlyCommand(SectionedCommand):
    """A command that turns errors into one line on stderr and an exit status.

    The status is 2 for errors the user can fix (``UserError``), 1 for errors of the machine (``OSError``), 130 for
    Ctrl-C. A closed pipe (``… | head``) is not reported. Every command refuses arguments that are not UTF-8,
    integers beyond 64 bits and unknown options; for an option of other programs, the message names ours.

    ``extra_hint`` says, after a colon, where an argument belongs that the command does not take.
    """

    def __init__(self, *args: Any, extra_hint: str = "", **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.extra_hint = extra_hint

    def main(self, *args: Any, **extra: Any) -> Any:
        _open_missing_streams()
        _set_encodings()
        atexit.register(gc.freeze)  # or Python's exit looks for garbage in all modules: 0.3 CPU s with PyTorch
        try:
            with errors_reported():
                return super().main(*args, **extra)
        except SystemExit as end:
            _flush_output(quiet=bool(end.code))
            raise

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        for argument in args:
            if not is_text(argument):
                shown = os.fsencode(argument).decode("utf-8", "backslashreplace")
                raise UserError(f'the argument "{shown}" is not UTF-8: convert it')
        try:
            return super().parse_args(ctx, args)
        except click.exceptions.NoArgsIsHelpError:
            raise
        except click.UsageError as error:
            python = "python " if ctx.command_path.endswith(".py") else ""
            hint = f" (see {python}{ctx.command_path} --help)"
            if isinstance(error, click.NoSuchOption):
                options = [name for each in self.params if isinstance(each, click.Option) for name in each.opts]
                if ours := other_name(error.option_name, options):
                    raise UserError(f"unknown option {error.option_name}{ours}") from None
            elif type(error) is click.UsageError and self.extra_hint:  # an argument too many
                hint = f": {self.extra_hint}"
            sentence = " ".join(error.format_message().split()).rstrip(".")
            raise UserError(f"{sentence[:1].lower()}{sentence[1:]}{hint}") from None

    def invoke(self, ctx: click.Context) -> Any:
        with errors_reported():
            problems = [problem for each in self.params if (problem := _problem(each, ctx.params.get(each.name or "")))]
            if problems:
                raise UserError("\n".join(problems))
            return super().invoke(ctx)


class FriendlyGroup(FriendlyCommand, click.Group):
    """A group that reports errors like a ``FriendlyCommand``, as do its commands."""

    command_class = FriendlyCommand

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they were added, not alphabetically."""
        return list(self.commands)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        names = [*self.commands, *(_commands_of_groups(self) if is_whole(ctx) else ())]
        with formatter.section("Commands"):
            formatter.write_dl([(name, _command(self, name).get_short_help_str(WIDEST)) for name in names])

    @property
    def has_more_help(self) -> bool:
        return any(isinstance(each, click.Group) for each in self.commands.values())

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name not in self.commands and not name.startswith("-"):
            known = [*self.commands, *_commands_of_groups(self)]
            inner = [words for words in known if words.endswith(f" {name}")]
            close = inner or difflib.get_close_matches(name, known, 1)
            hint = f': did you mean "{close[0]}"?' if close else f": choose one of {', '.join(self.commands)}"
            if name == "help":
                hint = f": {ctx.command_path} --help lists the commands"
            raise UserError(f'there is no command "{name}"{other_name(name, known) or hint}')
        return super().resolve_command(ctx, args)


def _command(group: click.Group, words: str) -> click.Command:
    """The command that some words name, such as "prep build"."""
    found: click.Command = group
    for word in words.split():
        assert isinstance(found, click.Group)
        found = found.commands[word]
    return found


def _commands_of_groups(group: click.Group) -> Iterator[str]:
    """The commands of a group's groups, such as "prep build"."""
    for name, each in group.commands.items():
        if isinstance(each, click.Group):
            yield from (f"{name} {inner}" for inner in each.commands)


@contextmanager
def errors_reported() -> Iterator[None]:
    """Turn the errors of a block into a message on stderr and an exit status, as ``FriendlyCommand`` says."""
    try:
        yield
    except UserError as error:
        _leave("\n".join(f"error: {line}" for line in str(error).splitlines()), USER_ERROR_STATUS)
    except KeyboardInterrupt as interrupt:
        _leave(str(interrupt) or "stopped", INTERRUPTED_STATUS)
    except BrokenPipeError:
        raise  # click exits silently
    except MemoryError:
        _leave("error: out of memory", MACHINE_ERROR_STATUS)
    except OSError as error:
        _leave(f"error: {_sentence(error)}", MACHINE_ERROR_STATUS)


def _problem(parameter: click.Parameter, value: Any) -> str:
    """What is wrong with a value that no parameter can have, or ""."""
    name = parameter.opts[0] if isinstance(parameter, click.Option) else parameter.human_readable_name
    if isinstance(value, str) and not is_text(value):  # of an environment variable: arguments were checked before
        return f"the value of {name} is not UTF-8"
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        return f"{name} is too large: it must be below 2^63"
    return ""


class _ClosedOutput(io.RawIOBase):
    """Stands for a standard output that was closed before the start (``>&-``): writing fails."""

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> NoReturn:
        raise OSError(errno.EBADF, "standard output is closed")


def _open_missing_streams() -> None:
    """Open what the shell closed, so that no other file takes its place and no message lands in it."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = io.TextIOWrapper(io.BufferedWriter(_ClosedOutput()), encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", encoding="utf-8")


def _set_encodings() -> None:
    """Print "?" for what the encoding of the output lacks; on Windows, read and write UTF-8 in pipes and files too."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if WINDOWS and isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8")
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")


def _flush_output(*, quiet: bool) -> None:
    """Write the rest of the output, so that a full disk or a closed pipe is reported here and not by Python at exit.

    ``quiet``: the command has reported an error already.
    """
    try:
        sys.stdout.flush()
    except OSError as error:
        sys.stdout = io.StringIO()  # or Python would try again at its end
        if isinstance(error, BrokenPipeError):
            sys.exit(MACHINE_ERROR_STATUS)
        if not quiet:
            _leave(f"error: {_sentence(error)}", MACHINE_ERROR_STATUS)


def _sentence(error: OSError) -> str:
    if error.strerror is None:
        return str(error)
    file = f'"{error.filename}": ' if error.filename is not None else ""
    return file + error.strerror[:1].lower() + error.strerror[1:]


def _leave(message: str, status: int) -> NoReturn:
    with suppress(OSError):  # stderr may be full or closed too
        click.echo(message, err=True)
    sys.exit(status)
