"""Recipe files and command lines, read into a ``Config``.

``learning_rate = 0.01`` under ``[optimizer]`` in a recipe (TOML) and ``--learning-rate 0.01`` on the command line are
two spellings of one setting. All problems of a configuration are reported together.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
import re
import site
import sys
import sysconfig
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from data_prep.errors.command_names import command, example_recipe
from data_prep.errors.other_names import other_name
from lm.config.consistency import inconsistencies
from lm.config.finetune_settings import IMAGE_METHODS, METHODS, FinetuneConfig
from lm.config.setting import Setting, shares_of
from lm.config.settings import (
    Config,
    ReportConfig,
    all_settings,
    finetuning_defaults,
    finetuning_settings,
    pretraining_settings,
)


def find_recipe(name: str) -> Path:
    """Return the file of a recipe, given its path or the name of one that comes with Kindling (``tiny``).

    Raises:
        UserError: there is no such file; the message suggests the closest name or lists all recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    # A checkout; an environment; and where "pip install --user" and the pip of Debian put a package's data.
    prefixes = (sys.prefix, site.getuserbase(), sysconfig.get_path("data"))
    shelves = [Path(__file__).parents[2], *(Path(prefix) / "share" / "kindling" for prefix in prefixes)]
    known = {recipe.stem: recipe for shelf in shelves for recipe in sorted((shelf / "configs").glob("*.toml"))}
    if name in known:
        return known[name]
    if path.stem in known and path.suffix == ".toml":
        raise UserError(f'there is no file {name}: the recipe that comes with Kindling is called "{path.stem}"')
    help = f"available recipes: {', '.join(sorted(known))}"
    if hint := difflib.get_close_matches(path.stem, known, 1):
        near = path.with_name(f"{hint[0]}.toml")
        help = f'did you mean "{near if near.is_file() else hint[0]}"?'
    raise UserError(f'no recipe "{name}": {help}')


def load_config(
    recipe: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    *,
    unknown_options: Sequence[str] = (),
    base: Config | None = None,
) -> Config:
    """Read a recipe and apply the command line's settings on top.

    Args:
        recipe: a TOML file, if any.
        overrides: setting names and values, as text (from the command line) or typed (from Python).
        unknown_options: options that the command line did not recognize; reported with the other problems.
        base: the values of settings in neither recipe nor overrides; None: the defaults.

    Raises:
        UserError: one line per problem.
    """
    known = {s.name: s for s in all_settings()}
    here = [s.name for s in (finetuning_settings() if base and base.finetune.base else pretraining_settings())]
    values: dict[str, Any] = {}
    problems: list[str] = []
    given = [(name, value, "") for name, value in (overrides or {}).items()]
    for name, value, where in [*_recipe_values(recipe, known, here, problems), *given]:
        if name not in known:
            problems.append(f'unknown setting "{name}"{suggestion(name, here)}')
            continue
        try:
            values[name] = convert(known[name], value)
        except ValueError as problem:
            problems.append(f"{f'{name} in {where}' if where else known[name].option} {problem}")
    for option in unknown_options:
        options = [*(known[name].option for name in here), "--run", "--resume"]
        problems.append(f"unknown option {option}{suggestion(option, options)}")
    if "data" in values:  # a run may move to another system
        values["data"] = tuple(entry.replace(os.sep, "/") for entry in values["data"])
    config = (base or Config()).replace(**values)
    problems += inconsistencies(config)
    if problems:
        raise UserError("\n".join(problems))
    return config


def run_config(path: str | Path) -> Config:
    """The settings of a run directory.

    Raises:
        UserError: there is no such directory, or it is not one of a run.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no run directory {path}: {command('train')} makes one")
    if not (path / "config.toml").is_file():
        raise UserError(f"{path} is not a run directory: it has no config.toml")
    return load_config(path / "config.toml")


def require_language_model(path: Path, config: Config) -> None:
    """Raise UserError if the run at ``path`` is no ``require_text_model``, or has no readout."""
    require_text_model(path, config)
    if not config.readouts:
        learns = "predicts hidden spans" if config.predicts_tokens else "predicts no tokens"
        raise UserError(
            f"{path} was trained with {config.objective.objective} only, which {learns}: kindling embed uses it; a "
            f"mixture such as hybrid:0.75,{next(iter(config.objective.shares))}:0.25 learns both"
        )


def require_text_model(path: Path, config: Config) -> None:
    """Raise UserError if the run at ``path`` reads images, or has a task's head instead of a language model's."""
    if config.reads_images:
        use = "kindling predict uses it" if config.has_task_head else "kindling embed and kindling evaluate use it"
        raise UserError(f"{path} reads images, not text: {use}")
    require_no_task_head(path, config)


def require_no_task_head(path: Path, config: Config) -> None:
    """Raise UserError if the run at ``path`` has a task's head."""
    if config.has_task_head:
        lost, input = ("", "DIR") if config.reads_images else (" and is no longer a language model", "FILE")
        raise UserError(
            f"{path} is fine-tuned for {config.finetune.task}{lost}: use "
            f"kindling predict {path} --input {input} for its answers, or kindling merge {path} --trunk-only --out RUN "
            "to make it a plain run"
        )


def require_image_model(path: Path, config: Config) -> None:
    """Raise UserError if the run at ``path`` reads text, or has a task's head instead of its objective's."""
    if not config.reads_images:
        raise UserError(
            f"{path} reads text, not images: {command('train')} images-simclr makes a run that reads images"
        )
    require_no_task_head(path, config)


def require_task_head(path: Path, config: Config) -> None:
    """Raise UserError if the run at ``path`` has no task's head, and so makes no predictions."""
    if not config.has_task_head:
        raise UserError(f"{path} was not fine-tuned on a task with a head: {command('finetune')} makes such a run")


def require_no_text_options(given: Mapping[str, Any]) -> None:
    """Raise UserError if one of these options, which are for texts, is given for a run that reads images."""
    if named := [f"--{name.replace('_', '-')}" for name, value in given.items() if value]:
        raise UserError(
            f"{' and '.join(named)} {'is' if len(named) == 1 else 'are'} for texts, and the run reads images"
        )


def require_examples(config: Config) -> None:
    """Raise UserError if the settings name no task to learn, or no examples of it."""
    if not config.is_finetuning:
        raise UserError("choose a task, for example --task classification")
    if not config.finetune.train:
        raise UserError("name a file with training examples: --train FILE")


def require_stride(stride: int, config: Config) -> None:
    """Raise UserError if a window of the context cannot score ``stride`` tokens (0: all of them)."""
    context = config.data.context_length
    if not 0 <= stride <= context:
        raise UserError(f"--stride must be between 1 and the context length, {context}, or 0 for all of it")


def finetuning_config(
    base: Path,
    of_base: Config,
    settings: Mapping[str, Any],
    recipe: Path | None = None,
    *,
    unknown_options: Sequence[str] = (),
) -> Config:
    """The settings of a fine-tuning of the run ``base``: its model and data, the defaults, and the given settings.

    Arguments and errors as of ``load_config``; the task must be among the settings.
    """
    start = Config(model=of_base.model, data=of_base.data, objective=of_base.objective, finetune=of_base.finetune)
    start = dataclasses.replace(start, views=of_base.views)
    start = start.replace(**finetuning_defaults(images=of_base.reads_images), base=str(base))
    load = partial(load_config, recipe, settings, unknown_options=unknown_options)
    task, rates = load(base=start).finetune, IMAGE_METHODS if of_base.reads_images else METHODS
    rate = rates[task.method]
    if task.method == "lora" and task.lora_rate == "scaled":
        rate = scaled_lora_rate(rates["full"], of_base.model.hidden_size, task.lora_rank, task.lora_alpha)
    return load(base=start.replace(learning_rate=rate))


def scaled_lora_rate(full: float, hidden_size: int, rank: int, alpha: float) -> float:
    """The learning rate with which LoRA changes what a matrix computes about as much in a step as ``full`` does.

    A step of Adam moves every weight by about its rate. On an input with entries around 1, that moves the output of a
    matrix by rate x sqrt(inputs), if the signs are unrelated; and B's by (alpha / rank) x rate x sqrt(rank), since A
    makes ``rank`` numbers around 1 of the input.
    """
    return full * (hidden_size / rank) ** 0.5 * rank / alpha


def pretraining_config(
    recipe: str | Path | None,
    run: str | Path | None,
    settings: Mapping[str, Any],
    *,
    unknown_options: Sequence[str] = (),
) -> tuple[Config, Path, Config | None]:
    """The settings of a pretraining, its run directory, and the settings the run has had so far, if it exists.

    Args:
        recipe: a TOML file, or the name of one that comes with Kindling; None: the settings of the run.
        run: the run directory; None: runs/NAME-OF-THE-RECIPE.
        settings, unknown_options: as of ``load_config``.

    Raises:
        UserError: a setting is wrong, or there is nothing to resume.
    """
    if recipe is None and run is None and not unknown_options:
        raise UserError(
            f"name a recipe to train (for example {example_recipe()}), or a run to resume: --run RUN --resume"
        )
    path = Path(run) if run is not None else Path("runs") / Path(str(recipe)).stem
    before = load_config(path / "config.toml") if (path / "config.toml").is_file() else None
    # The rows of a micro-batch may have been chosen for another batch: they are kept only if they still fit.
    base = before and before.replace(micro_batch_rows=0)
    if base is None and settings.get("init_from"):  # the settings of that run, except for data and report
        like = run_config(settings["init_from"])
        like = dataclasses.replace(like, report=ReportConfig(), finetune=FinetuneConfig())
        base = like.replace(data=(), micro_batch_rows=0)
    if recipe is None and base is None and not unknown_options:
        raise UserError(
            f"{path} is not a run directory yet: name a recipe to start it (for example {example_recipe()})"
        )
    file = find_recipe(str(recipe)) if recipe is not None else None
    config = load_config(file, settings, unknown_options=unknown_options, base=base)
    if config.is_finetuning:
        raise UserError(f"{path} is a fine-tuning run: {command('finetune')} resumes it")
    return config, path, before


def _recipe_values(
    recipe: Path | None, known: Mapping[str, Setting], here: Sequence[str], problems: list[str]
) -> Iterator[tuple[str, Any, str]]:
    """Yield a recipe's settings as (name, value, file); add a line to ``problems`` for each unknown one.

    ``here`` are the settings to suggest instead.
    """
    if recipe is None:
        return
    content = read_toml(recipe, "the recipe")
    sections = [f.name for f in dataclasses.fields(Config)]
    for section, settings in content.items():
        if not isinstance(settings, dict):
            home = f": it belongs under [{known[section].section}]" if section in known else suggestion(section, known)
            problems.append(f'setting "{section}" outside a section in {recipe}{home}')
        elif section not in sections:
            problems.append(f'unknown section "[{section}]" in {recipe}{suggestion(section, sections)}')
        else:
            for name, value in settings.items():
                if name not in known:
                    problems.append(f'unknown setting "{name}" in {recipe}{suggestion(name, here)}')
                elif section not in (known[name].section, known[name].once_in):
                    problems.append(
                        f'setting "{name}" in {recipe} belongs under [{known[name].section}], not [{section}]'
                    )
                else:
                    yield name, value, str(recipe)


def read_toml(path: Path, what: str) -> dict[str, Any]:
    """The content of a TOML file, which may begin with a byte-order mark. UserError if it cannot be read."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise UserError(f"cannot read {what} {path}: it is not UTF-8 ({byte})") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {what} {path}: {getattr(error, 'strerror', None) or error}") from None


def suggestion(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: what it is called here, the closest known one, or ""."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1, cutoff=0.6)
    return other_name(name, known) or (f': did you mean "{close[0]}"?' if close else "")


def convert(setting: Setting, value: Any) -> Any:
    """Convert ``value`` to the setting's type and check its limits; the ValueError says what is expected."""
    wanted = type(setting.default)
    if wanted is tuple:
        if isinstance(value, str):
            value = _texts(value)
        if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
            raise ValueError(f"must be a list of texts, not {value!r}")
        for item in value:
            _check_choice(setting, item)
        return tuple(value)
    if wanted is bool and isinstance(value, str) and value.lower() in ("true", "false"):
        value = value.lower() == "true"
    elif wanted in (int, float) and isinstance(value, str) and re.fullmatch(r"[-+0-9._eE]+", value):
        try:
            value = float(value) if wanted is float or re.search("[.eE]", value) else int(value)
        except ValueError:
            raise ValueError(f"must be {_article(setting.kind)}, not {value!r}") from None
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 10**300 else math.inf  # reported below
    if wanted is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not wanted:
        raise ValueError(f"must be {_article(setting.kind)}, not {value!r}")
    _check_choice(setting, value)
    if wanted in (int, float):
        largest = setting.maximum if setting.maximum is not None else 2**53 if wanted is int else sys.float_info.max
        if setting.minimum is not None and not value >= setting.minimum:
            raise ValueError(f"must be at least {setting.minimum:g}, not {value!r}")
        if wanted is float and not math.isfinite(value):
            raise ValueError(f"must be finite, not {value!r}")
        if not value <= largest:
            raise ValueError(f"must be at most {largest:{',' if wanted is int else 'g'}}, not {value!r}")
    return value


def _check_choice(setting: Setting, value: Any) -> None:
    for name in shares_of(value) if setting.mixture else [value]:
        if setting.choices and name not in setting.choices:
            raise ValueError(
                f"must be one of {', '.join(setting.choices)}, not {name!r}{suggestion(name, setting.choices)}"
            )


def _texts(text: str) -> Any:
    """Parse the command line's value of a list: a TOML list as in a recipe, or a single text."""
    try:
        value = tomllib.loads(f"texts = {text}")["texts"]
    except ValueError:
        return [text]
    return value if isinstance(value, list) else [value if isinstance(value, str) else text]


def _article(kind: str) -> str:
    return {"integer": "an integer", "number": "a number", "text": "a text"}.get(kind, kind)
