"""The axes of a sweep: which values of which settings to try, as ``kindling sweep --set`` names them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError
from lm.config.recipes import convert, suggestion
from lm.config.setting import Setting
from lm.config.settings import pretraining_settings

EXAMPLE = "--set learning_rate=0.003,0.01"
RANGE = re.compile(r"([-+0-9._eE]+?)\.\.([-+0-9._eE]+)(:log)?")
COMMA = re.compile(r",(?![^\[]*\])")  # but not inside a list, which is one value


@dataclass(frozen=True)
class Axis:
    """A setting and what to try: the ``values``, or, if there are none, the range from ``low`` to ``high``.

    Values are as JSON has them: a list where the setting is a list of texts. ``log``: the logarithm is what varies
    evenly.
    """

    name: str
    values: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values, or both ends of the range."""
        return self.values or (self.low, self.high)


def parse_axes(texts: Sequence[str], *, searching: bool) -> list[Axis]:
    """Read axes such as ``learning_rate=0.003,0.01`` or, for a search, ``learning_rate=0.001..0.1:log``.

    Raises:
        UserError: one line per problem.
    """
    known, axes, problems = {each.name: each for each in pretraining_settings()}, [], []
    for text in texts:
        name, _, values = text.partition("=")
        name = name.strip()
        try:
            if not values.strip():
                raise ValueError(f'"{text}" names no values: write for example {EXAMPLE}')
            if name not in known:
                raise ValueError(f'unknown setting "{name}"{suggestion(name, known)}')
            if name in [axis.name for axis in axes]:
                raise ValueError(f"{name} is set twice: list all its values after one --set")
            axes.append(_axis(known[name], values.strip(), searching=searching))
        except ValueError as problem:
            problems.append(str(problem))
    if not texts:
        problems.append(f"name a setting to vary and its values, for example {EXAMPLE}")
    if problems:
        raise UserError("\n".join(problems))
    return axes


def _axis(setting: Setting, text: str, *, searching: bool) -> Axis:
    """One axis; the ValueError says what is wrong."""
    name, is_number = setting.name, setting.kind in ("integer", "number")
    if is_number and (found := RANGE.fullmatch(text)):
        low, high = (_value(setting, found[end]) for end in (1, 2))
        if not searching:
            raise ValueError(f"{name}={text} is a range: add --trials N to search it, or list values")
        if not low < high:
            raise ValueError(f"{name}={text} is no range: the second number must be larger")
        if found[3] and low <= 0:
            raise ValueError(f"{name}={text}: a logarithmic range starts above 0")
        return Axis(name, (), low, high, bool(found[3]))
    values = [_value(setting, part.strip()) for part in COMMA.split(text)]
    if twice := [value for number, value in enumerate(values) if value in values[:number]]:
        raise ValueError(f"{name} names {shown(twice[0])} twice")
    return Axis(name, tuple(values))


def _value(setting: Setting, text: str) -> Any:
    try:
        value = convert(setting, text)
    except ValueError as problem:
        raise ValueError(f"{setting.name} {problem}") from None
    return list(value) if isinstance(value, tuple) else value


def grid(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of all axes (of a range: its ends); the last axis varies fastest."""
    names = [axis.name for axis in axes]
    return (dict(zip(names, values, strict=True)) for values in itertools.product(*(axis.ends for axis in axes)))


def describe(settings: Mapping[str, Any]) -> str:
    """The settings of a point in words: "learning_rate 0.01, weight_decay 0.3"."""
    return ", ".join(f"{name} {shown(value)}" for name, value in settings.items())


def shown(value: Any) -> str:
    """A value of a setting in words."""
    if isinstance(value, list):
        return " ".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)
