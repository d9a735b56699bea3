"""What a sweep is to do, and the settings of its points."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from data_prep.errors import UserError
from data_prep.errors.wording import counted
from lm.config.recipes import pretraining_config
from lm.config.settings import Config
from lm.config.sweep_axes import Axis, describe, grid

MOST_POINTS = 1000
T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What a sweep is to do.

    Attributes:
        recipe, settings: what all runs have in common, as ``pretraining_config`` takes it.
        out: the folder of the sweep.
        seeds: of each point's runs; none: the recipe's own, or that of an axis.
        trials: how many points to search; 0: the grid of all values.
        sampler: how a search chooses points (``lm.evaluation.sweep_search``).
        measure: what runs are judged by (``lm.evaluation.sweep.MEASURES``); "": what suits the points.
    """

    recipe: str
    settings: dict[str, Any]
    axes: list[Axis]
    out: Path
    seeds: Sequence[int] = ()
    trials: int = 0
    sampler: str = "tpe"
    measure: str = ""

    def config(self, changes: Mapping[str, Any], folder: Path | None = None) -> Config:
        """The settings of a run with these changes, in its directory (None: a new one)."""
        name = folder or self.out / "new"  # which no run is called
        return pretraining_config(self.recipe, name, {**self.settings, **changes})[0]

    def configs(self) -> list[Config]:
        """The settings of every point, for a search of the ends of its ranges in all combinations.

        Raises:
            UserError: one line per problem, with the points that have it.
        """
        if (count := math.prod(len(axis.ends) for axis in self.axes)) > MOST_POINTS:
            hint = "name fewer values" if self.trials else "name fewer values, or search with --trials N"
            raise UserError(f"these values make {count:,} combinations, and at most {MOST_POINTS:,} are tried: {hint}")
        return self.of_all(self.config, list(grid(self.axes)))

    def of_all(self, compute: Callable[[Any], T], given: Sequence[Any]) -> list[T]:
        """What ``compute`` makes of what is ``given`` for each point of the grid; errors as of ``configs``."""
        points, made = list(grid(self.axes)), []
        problems: dict[str, list[dict[str, Any]]] = {}
        for point, each in zip(points, given, strict=True):
            try:
                made.append(compute(each))
            except UserError as error:
                for line in str(error).splitlines():
                    problems.setdefault(line, []).append(point)
        if problems:
            raise UserError("\n".join(_where(line, having, len(points)) for line, having in problems.items()))
        return made


def _where(problem: str, points: Sequence[dict[str, Any]], of: int) -> str:
    if len(points) == of:
        return problem
    others = len(points) - 1
    more = f" and {counted(others, 'other point')}" if others else ""
    return f"{problem} (at {describe(points[0])}{more})"


def require_optuna() -> None:
    """Raise UserError if Optuna is not installed."""
    if find_spec("optuna") is None:
        raise UserError('--trials needs the package "optuna": pip install "kindling-lm[sweep]"')
