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

SAMPLING = {
    "temperature": (0.8, "Below 1: safer, above: wilder, 0: always the likeliest token."),
    "top-k": (0, "Draw from the k likeliest tokens; 0: from all."),
    "top-p": (1.0, "Draw from the likeliest tokens that together reach this probability."),
    "min-p": (0.0, "Leave out tokens less than this many times as likely as the likeliest."),
    "typical-p": (
        1.0,
        "Draw from the tokens nearest to the expected information that together reach this probability.",
    ),
    "repetition-penalty": (1.0, "Make tokens that were read or written less likely; 1: do not."),
    "presence-penalty": (0.0, "Taken off the score of every token that was written; 0: nothing."),
    "frequency-penalty": (0.0, "Taken off it for each time it was written; 0: nothing."),
    "max-new-tokens": (200, "Tokens to write at most."),
    "seed": (0, "The same seed writes the same text."),
}


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each setting of ``lm.sampling.Sampling`` but ``logprobs``."""
    function = click.option("--stop", multiple=True, help="Stop before this text; may be repeated.")(function)
    for name, (default, text) in reversed(SAMPLING.items()):
        function = click.option(f"--{name}", default=default, show_default=True, help=text)(function)
    return function


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
