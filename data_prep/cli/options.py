"""Command-line options that follow from settings dataclasses: names, types, defaults, choices and help text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from data_prep.cli.help import SectionOption
from data_prep.settings import option_of, settings_of

ALSO = {"text_field": ("--text-column",)}  # what finetune calls it


def options_of(*kinds: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Add an option for each setting of these dataclasses; its value arrives under the setting's name.

    ``--help-all`` shows them by their dataclass, under the first words of its docstring.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for title, each in reversed([(_title(kind), each) for kind in kinds for each in settings_of(kind)]):
            choices, default = each.metadata["choices"], each.default
            command = click.option(
                option_of(each),
                *ALSO.get(each.name, ()),
                each.name,
                cls=SectionOption,
                section=title,
                type=click.Choice(choices) if choices else None,
                metavar=f"[{'|'.join(filter(None, choices))}]" if choices else None,
                default=default,
                show_default=default is not False and default not in (None, "", ()),
                is_flag=default is False,
                multiple=isinstance(default, tuple),
                help=each.metadata["help"],
            )(command)
        return command

    return decorate


def _title(kind: Any) -> str:
    return re.split("[.,]", kind.__doc__)[0]
