"""Options and arguments that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from lm.config import all_settings

run_argument = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
checkpoint_option = click.option(
    "--checkpoint",
    "which",
    default="newest",
    show_default=True,
    metavar="newest|best|STEP",
    help="Which of the run's checkpoints: the newest, that of the best validation, or the one of a step.",
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    help="Where to compute.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout, for machines.")


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for every setting of a recipe, explained from the dataclass that defines it."""
    for setting in reversed(list(all_settings())):
        limits = f"; one of {', '.join(setting.choices)}" if setting.choices else ""
        default = json.dumps(setting.default) if setting.default not in ("", ()) else "none"
        text = f"[{setting.section}] {setting.help}{limits}. [default: {default}]"
        repeated = " May be repeated." if setting.kind == "list of texts" else ""
        function = click.option(
            setting.option,
            setting.name,
            metavar=setting.kind.upper(),
            default=None,
            multiple=bool(repeated),
            help=text + repeated,
        )(function)
    return function
