"""Help on one screen, and all of it: ``--help`` shows what matters first, ``--help-all`` everything, both in groups."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import click

OPTIONS, OTHERS = "Options", "Other options"
WIDEST = 100  # columns of help, if the terminal has them


class Section(NamedTuple):
    """A group of a command's options, by the names of their parameters, separated by spaces.

    ``--help`` shows the ``common`` ones, ``--help-all`` these and ``more``.
    """

    title: str
    common: str
    more: str = ""


class SectionOption(click.Option):
    """A setting of a section with a title of its own, under which ``--help-all`` shows it.

    ``--help`` shows it only if a ``Section`` of the command names it.
    """

    def __init__(self, *names: Any, section: str, **attributes: Any) -> None:
        super().__init__(*names, **attributes)
        self.section = section


class SectionedCommand(click.Command):
    """A command whose help has two lengths.

    ``-h`` and ``--help`` show the description up to the first form feed (``\\f``), and of each common option the first
    clause of its help text. ``--help-all`` shows everything. An option that no section names is common.
    """

    def __init__(self, *args: Any, sections: Sequence[Section] = (), **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.sections = sections
        self.context_settings.setdefault("max_content_width", WIDEST)

    def get_help_option_names(self, ctx: click.Context) -> list[str]:
        return ["-h", "--help"]

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        *own, short = super().get_params(ctx)  # click adds --help at the end
        return [*own, self._help_all, short]

    @cached_property
    def _help_all(self) -> click.Option:
        return click.Option(
            ["--help-all"],
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_show_all,
            hidden=not self.has_more_help,
            help="Show every option, and explain each in full.",
        )

    @property
    def has_more_help(self) -> bool:
        """Whether ``--help-all`` shows what ``--help`` leaves out."""
        return bool(self.sections) or "\f" in (self.help or "")

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        text = inspect.cleandoc(self.help or "")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(text.replace("\f", "") if is_whole(ctx) else text.partition("\f")[0].rstrip())

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, options in self._groups(ctx):
            shown = options if is_whole(ctx) or not self.has_more_help else map(_shortened, options)
            if records := [record for each in shown if (record := each.get_help_record(ctx))]:
                with formatter.section(title):
                    formatter.write_dl(records)

    def _groups(self, ctx: click.Context) -> Iterator[tuple[str, list[click.Option]]]:
        """The options that this help shows, in groups with a title."""
        options = {str(each.name): each for each in self.get_params(ctx) if isinstance(each, click.Option)}
        if not self.sections:
            yield OPTIONS, list(options.values())
            return
        settings: dict[str, list[click.Option]] = {}
        for each in options.values():
            if isinstance(each, SectionOption):
                settings.setdefault(each.section, []).append(each)
        named: set[str] = set()
        for section in self.sections:
            shown = [*section.common.split(), *(section.more.split() if is_whole(ctx) else ())]
            named |= {*section.common.split(), *section.more.split()}
            if is_whole(ctx):
                shown = [name for name in shown if not isinstance(options[name], SectionOption)]
            yield section.title, [options[name] for name in shown]
        if is_whole(ctx):
            yield from settings.items()
        rest = [name for name, each in options.items() if name not in named and not isinstance(each, SectionOption)]
        yield OTHERS, [options[name] for name in rest]


def is_whole(ctx: click.Context) -> bool:
    """Whether the user asked for the whole help."""
    return bool(ctx.meta.get(__name__))


def _show_all(ctx: click.Context, parameter: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        ctx.meta[__name__] = True
        click.echo(ctx.get_help(), color=ctx.color)
        ctx.exit()


def _shortened(option: click.Option) -> click.Option:
    """The option with the first clause of its help text only."""
    short = copy.copy(option)
    first = re.split(r"; |\. ", option.help or "", maxsplit=1)[0].rstrip(".")
    short.help = f"{first}." if first else None
    return short
