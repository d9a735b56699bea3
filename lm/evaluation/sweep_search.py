"""The points of a sweep that searches, chosen by Optuna.

A point is a function of the seed, its number and the results of the points before it. So there is no sampler to save:
a sweep that was killed finds the same points again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.config.sweep_axes import Axis

SAMPLERS = ("tpe", "random")
TRIES = 100  # to find a point that is new, the last ones at random
DIGITS = 5  # of a number drawn from a range

Tried = tuple[dict[str, Any], float | None]  # a point and its result; None: it failed or collapsed


def suggest(
    axes: Sequence[Axis], tried: Sequence[Tried], seed: int, sampler: str, *, higher_is_better: bool
) -> dict[str, Any] | None:
    """The next point after ``tried``; None: no new one was found.

    Args:
        sampler: "tpe", the tree-structured Parzen estimator (Bergstra et al. 2011), or "random".
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {axis.name: _distribution(axis) for axis in axes}
    for attempt in range(TRIES):
        own = int(np.random.SeedSequence([seed, len(tried), attempt]).generate_state(1)[0])
        by_model = sampler == "tpe" and attempt < TRIES // 2
        samplers = optuna.samplers
        chosen = samplers.TPESampler(seed=own) if by_model else samplers.RandomSampler(seed=own)
        study = optuna.create_study(sampler=chosen, direction="maximize" if higher_is_better else "minimize")
        for settings, value in tried:
            # Of a pruned trial without values, TPE knows that it was worse than all others.
            state = optuna.trial.TrialState.COMPLETE if value is not None else optuna.trial.TrialState.PRUNED
            params = {axis.name: _coordinate(axis, settings[axis.name]) for axis in axes}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=value, state=state))
        found = study.ask(space).params
        point = {axis.name: _value(axis, found[axis.name]) for axis in axes}
        if point not in [settings for settings, _ in tried]:
            return point
    return None


def _distribution(axis: Axis) -> Any:
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if axis.values:
        return CategoricalDistribution(range(len(axis.values)))
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return IntDistribution(axis.low, axis.high, log=axis.log)
    return FloatDistribution(axis.low, axis.high, log=axis.log)


def _coordinate(axis: Axis, value: Any) -> Any:
    """What stands for a setting's value in Optuna: its number among the values, if there are any."""
    return axis.values.index(value) if axis.values else value


def _value(axis: Axis, coordinate: Any) -> Any:
    if axis.values:
        return axis.values[coordinate]
    if isinstance(axis.low, int):
        return coordinate
    return min(max(float(f"{coordinate:.{DIGITS}g}"), axis.low), axis.high)
