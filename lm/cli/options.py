"""Options and arguments that several commands share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from lm.config.settings import Setting

if TYPE_CHECKING:
    from lm.data.examples import Columns

run_argument = click.argument("run", metavar="RUN", type=click.Path(path_type=Path))
checkpoint_option, best_checkpoint_option = (
    click.option(
        "--checkpoint",
        "which",
        default=default,
        show_default=True,
        metavar="newest|best|STEP",
        help="Which of the run's checkpoints: the newest, that of the best validation, or the one of a step.",
    )
    for default in ("newest", "best")
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    help="Where to compute.",
)
compile_option = click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile the model for this CPU first, which takes some seconds and a C++ compiler: one text at a time is "
    "then written faster, many at a time are not.",
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
    """An option for each setting of ``lm.inference.sampling.Sampling`` but ``logprobs``."""
    function = click.option("--stop", multiple=True, help="Stop before this text; may be repeated.")(function)
    for name, (default, text) in reversed(SAMPLING.items()):
        function = click.option(f"--{name}", default=default, show_default=True, help=text)(function)
    return function


def settings_options(settings: Iterable[Setting]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An option for each of these settings of a recipe, explained from the dataclass that defines it."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for setting in reversed(list(settings)):
            function = _setting_option(setting)(function)
        return function

    return decorate


def _setting_option(setting: Setting) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    limits = f"; one of {', '.join(setting.choices)}" if setting.choices else ""
    default = json.dumps(setting.default) if setting.default not in ("", ()) else "none"
    text = f"[{setting.section}] {setting.help}{limits}. [default: {default}]"
    repeated = " May be repeated." if setting.kind == "list of texts" else ""
    return click.option(
        setting.option,
        setting.name,
        metavar=setting.kind.upper(),
        default=None,
        multiple=bool(repeated),
        help=text + repeated,
    )


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--reads``, ``--pooling`` and ``--layer``: how a text becomes a vector (``embedding.reading_of``)."""
    for option in (
        click.option(
            "--layer",
            default=-1,
            show_default=True,
            help="Whose states are taken: 0 is the embeddings, 1 the first block, -1 the last.",
        ),
        click.option(
            "--pooling",
            type=click.Choice(["mean", "last"]),
            help="Mean over a text's tokens, or its last one. [default: mean where both ways are read, else last]",
        ),
        click.option(
            "--reads",
            type=click.Choice(["causal", "bidirectional"]),
            help="What a token sees: those before it, or all of its text. [default: all, if the run has learnt that]",
        ),
    ):
        function = option(function)
    return function


COLUMN_HELP = {
    "text": "the text of an example, or the question of a choice",
    "text_pair": 'the second text of a pair; "" for none [default: text_pair, where the file has it]',
    "label": "the answer",
    "choices": "the list of choices, or several columns with one each, as in a,b,c",
    "words": "the words of an example whose words have tags: a list, or text with spaces",
    "tags": "the tags of these words",
    "prompt": "what is asked",
    "response": "what is to be answered",
}


def columns_options(*names: str) -> Callable[..., Any]:
    """``--text-column`` and its like, for these columns of task files; ``columns_of`` reads them."""

    def decorated(function: Callable[..., Any]) -> Callable[..., Any]:
        for name in reversed(names):
            option = f"--{name.replace('_', '-')}-column"
            function = click.option(option, metavar="NAME", help=f"Column with {COLUMN_HELP[name]}.")(function)
        return function

    return decorated


def columns_of(options: dict[str, str | None]) -> Columns:
    """The columns that ``columns_options`` gave to a command; one that was not named keeps its usual name."""
    from lm.data.examples import Columns

    named: dict[str, Any] = {
        name.removesuffix("_column"): value for name, value in options.items() if value is not None
    }
    if "choices" in named:
        named["choices"] = tuple(named["choices"].split(","))
    return Columns(**named)
