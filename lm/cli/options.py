"""Options and arguments that several commands share."""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from data_prep.cli.help import SectionOption
from data_prep.errors import UserError
from data_prep.errors.command_names import command
from lm.config.finetune_settings import FinetuneConfig
from lm.config.sampling import Sampling
from lm.config.setting import Setting
from lm.config.settings import Config, all_settings

if TYPE_CHECKING:
    from click.types import OptionHelpExtra

    from lm.data.examples import Columns
    from lm.data.image_files import Picture

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def is_given(parameter: str) -> bool:
    """Whether the user typed an option of the running command."""
    return click.get_current_context().get_parameter_source(parameter) is ParameterSource.COMMANDLINE


def run_argument(function: Callable[..., Any]) -> Callable[..., Any]:
    """The argument RUN; the command starts only if it is a run directory."""

    @functools.wraps(function)
    def checked(*args: Any, run: Path, **options: Any) -> Any:
        from lm.config.recipes import run_config

        run_config(run)
        return function(*args, run=run, **options)

    return click.argument("run", metavar="RUN", type=click.Path(path_type=Path))(checked)


checkpoint_option, best_checkpoint_option = (
    click.option(
        "--checkpoint",
        "which",
        default=default,
        show_default=True,
        metavar="newest|best|average|STEP",
        help="Checkpoint to use. It is the newest, the one with the best validation, the mean of the last weights "
        "(setting average_last), or the one of a step.",
    )
    for default in ("newest", "best")
)
device_option = click.option(
    "--device",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "cpu", "cuda", "mps"]),
    help="Device to compute on.",
)
compile_option = click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile the model for this CPU first, which takes some seconds and a C++ compiler. It speeds up generating "
    "one text at a time, but not many. On a GPU: replay each step as a CUDA graph.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON to stdout.")


def sampling_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """An option for each field of ``Sampling`` except ``logprobs``."""
    for field in reversed([field for field in dataclasses.fields(Sampling) if field.name != "logprobs"]):
        repeated = isinstance(field.default, tuple)
        help = (
            field.metadata["help"][0].upper() + field.metadata["help"][1:] + ("; may be repeated." if repeated else ".")
        )
        default = {"multiple": True} if repeated else {"default": field.default, "show_default": True}
        function = click.option("--" + field.name.replace("_", "-"), help=help, **default)(function)
    return function


class SettingOption(SectionOption):
    """An option for a setting of a recipe, explained by the dataclass that defines it."""

    def __init__(self, names: Sequence[str], setting: Setting) -> None:
        self.setting = setting
        repeated = setting.kind == "list of texts"
        super().__init__(
            names,
            section=SECTIONS[setting.section],
            metavar="TEXT" if repeated else setting.kind.upper(),
            default=None,
            multiple=repeated,
            help=f"{setting.help[0].upper()}{setting.help[1:]}{'; may be repeated' if repeated else ''}.",
        )

    def get_help_extra(self, ctx: click.Context) -> OptionHelpExtra:
        default = self.setting.default
        extra: OptionHelpExtra = {}
        if default not in ("", ()):
            extra["default"] = default if isinstance(default, str) else json.dumps(default)
        if self.setting.choices:
            extra["range"] = f"one of {', '.join(self.setting.choices)}"
        return extra


ALSO = {"text_column": ("--text-field",)}  # what prep build calls it
SECTIONS = {
    section.name: f"[{section.name}] {section.default_factory.__doc__.partition('.')[0]}"  # type: ignore[union-attr]
    for section in dataclasses.fields(Config)
}


def settings_options(settings: Iterable[Setting]) -> Decorator:
    """An option for each of these settings; ``--help-all`` shows them by their section in a recipe."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for setting in reversed(list(settings)):
            names = (setting.option, *ALSO.get(setting.name, ()), setting.name)
            function = click.option(*names, cls=SettingOption, setting=setting)(function)
        return function

    return decorate


def given_settings(options: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the user typed, of all that ``settings_options`` passed to a command."""
    return {
        name: value[0] if isinstance(value, tuple) and len(value) == 1 else value
        for name, value in options.items()
        if value not in (None, ())
    }


def usual_command(path: Path, config: Config) -> str:
    """The command that uses a finished run, whole."""
    if config.has_task_head:
        return f"{command('predict')} {path} --input {'DIR' if config.reads_images else 'FILE'} --output FILE"
    if config.reads_images:
        return f"{command('embed')} {path} --input DIR --output FILE"
    if config.finetune.task == "contrastive" or not config.readouts:
        return f"{command('embed')} {path} --input FILE --output FILE"
    return f"{command('sample')} {path} {'--chat' if config.is_finetuning else '--prompt TEXT'}"


@contextmanager
def pictures_shown(pictures: Iterator[Picture], source: str, output: str) -> Iterator[Iterator[Picture]]:
    """Show on a terminal how many of a source's images have been read, unless ``output`` is stdout."""
    from lm.data.image_files import count_of

    hidden = output == "-" or not sys.stderr.isatty()
    length = None if hidden else count_of(source)
    bar = click.progressbar(
        pictures, length=length, label="images", file=sys.stderr, hidden=hidden, show_pos=True, update_min_steps=32
    )
    with bar:
        yield iter(bar)


def seeds_of(text: str) -> list[int]:
    """The value of ``--seeds``, as in 0,1,2.

    Raises:
        UserError: it is not a list of different whole numbers.
    """
    given = [seed.strip() for seed in text.split(",")]
    numbers = [int(seed) if seed.isdecimal() and len(seed) < 19 else -1 for seed in given]
    if min(numbers) < 0 or len(set(numbers)) < len(numbers):
        raise UserError(
            f"--seeds {text} must be different whole numbers below 10^18, separated by commas, for example 0,1,2"
        )
    return numbers


def reading_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """``--reads``, ``--pooling`` and ``--layer``: how a text becomes a vector (``embedding.reading_of``)."""
    for option in (
        click.option(
            "--layer",
            default=-1,
            show_default=True,
            help="Layer whose states to use: 0 is the embeddings, 1 the first block, -1 the last.",
        ),
        click.option(
            "--pooling",
            type=click.Choice(["mean", "last"]),
            help="Mean over a text's tokens, or its last one. [default: mean with bidirectional attention, else last]",
        ),
        click.option(
            "--reads",
            type=click.Choice(["causal", "bidirectional"]),
            help="Attention: causal, or bidirectional within the text. [default: bidirectional if the run was trained "
            "to fill masks]",
        ),
    ):
        function = option(function)
    return function


def _no_standard_input(context: click.Context, option: click.Parameter, value: str | None) -> str | None:
    if value == "-":
        raise UserError(f"{option.opts[0]} takes a file, not standard input")
    return value


whiten_option = click.option(
    "--whiten",
    metavar="FILE",
    callback=_no_standard_input,
    help="Unlabeled texts of the kind to compare, several thousand: make the numbers of their vectors uncorrelated and "
    "equally varied, which mostly improves the cosine.",
)


def columns_options(*names: str, default: str = "", also: bool = True) -> Decorator:
    """``--text-column`` and the like for these columns of task files; ``columns_of`` reads them.

    ``default`` says what a column is called if it is not named; "": as the setting has it. ``also`` adds the names of
    ``prep build``.
    """
    settings = {setting.name: setting for setting in all_settings()}
    chosen = [settings[f"{name}_column"] for name in names]

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for setting in reversed(chosen):
            help = f"{setting.help[0].upper()}{setting.help[1:]}. [default: {default or setting.default}]"
            others = ALSO.get(setting.name, ()) if also else ()
            function = click.option(setting.option, *others, setting.name, metavar="NAME", help=help)(function)
        return function

    return decorate


def columns_of(options: Mapping[str, Any]) -> Columns:
    """The columns that ``columns_options`` passed to a command."""
    from lm.data.examples import columns_of

    return columns_of(FinetuneConfig(**given_settings(options)))
