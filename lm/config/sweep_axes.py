"""The axes of a sweep: which values of which settings to try, as ``kindling sweep --set`` names them."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.errors import UserError
from lm.config.recipes import convert, suggestion
from lm.config.setting import Setting, spelled
from lm.config.settings import pretraining_settings

EXAMPLE = "--set learning_rate=0.003,0.01"
RANGE = re.compile(r"([-+0-9._eE]+?)\.\.([-+0-9._eE]+)(:log)?")
COMMA = re.compile(r',(?![^\[]*\])(?=(?:[^"]*"[^"]*")*[^"]*$)')  # but not inside a list or between quotes


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


def parse_axes(texts: Sequence[str], fixed: Mapping[str, str], *, searching: bool) -> list[Axis]:
    """Read axes such as ``learning_rate=0.003,0.01`` or, for a search, ``learning_rate=0.001..0.1:log``.

    Args:
        fixed: settings that are not to be varied, with the options that set them.

    Raises:
        UserError: one line per problem.
    """
    known = {each.name: each for each in pretraining_settings()}
    axes: list[Axis] = []
    problems = [] if texts else [f"name a setting to vary and its values, for example {EXAMPLE}"]
    for text in texts:
        name, _, values = (part.strip() for part in text.partition("="))
        if not values:
            problems.append(f'"{text}" names no values: write for example {EXAMPLE}')
        elif name not in known:
            problems.append(f'unknown setting "{name}"{suggestion(name, known)}')
        elif name in [axis.name for axis in axes]:
            problems.append(f"--set {name} is there twice: list all its values after one")
        else:
            if name in fixed:
                problems.append(f"{fixed[name]} fixes what --set {name} varies: leave one of them out")
            axes.append(_axis(known[name], values, problems, searching=searching))
    if problems:
        raise UserError("\n".join(problems))
    return axes


def _axis(setting: Setting, values: str, problems: list[str], *, searching: bool) -> Axis:
    """One axis; what is wrong with it is added to ``problems``."""

    def value(part: str) -> Any:
        try:
            text = part.strip()
            converted = convert(setting, text if setting.kind == "list of texts" else text.strip('"'))
        except ValueError as problem:
            problems.append(f"--set {setting.name}: each value {problem}")
            return part
        return list(converted) if isinstance(converted, tuple) else converted

    before, written = len(problems), f"--set {setting.name}={values}"
    if setting.kind in ("integer", "number") and (found := RANGE.fullmatch(values)):
        low, high = value(found[1]), value(found[2])
        if not searching:
            problems.append(f"{written} is a range: add --trials N to search it, or list values")
        elif len(problems) == before and low >= high:
            problems.append(f"{written} is no range: the second number must be larger")
        elif len(problems) == before and found[3] and low <= 0:
            problems.append(f"{written}: a range of factors (:log) starts above 0")
        return Axis(setting.name, (), low, high, bool(found[3]))
    tried = [value(part) for part in COMMA.split(values)]
    if len(problems) == before and (twice := [each for n, each in enumerate(tried) if each in tried[:n]]):
        problems.append(f"--set {setting.name} names {spelled(twice[0])} twice")
    return Axis(setting.name, tuple(tried))


def grid(axes: Sequence[Axis]) -> Iterator[dict[str, Any]]:
    """Every combination of the values of all axes (of a range: its ends); the last axis varies fastest."""
    names = [axis.name for axis in axes]
    return (dict(zip(names, values, strict=True)) for values in itertools.product(*(axis.ends for axis in axes)))


def describe(settings: Mapping[str, Any]) -> str:
    """The settings of a point in words: "learning_rate 0.01, weight_decay 0.3"."""
    return ", ".join(f"{name} {spelled(value)}" for name, value in settings.items())
