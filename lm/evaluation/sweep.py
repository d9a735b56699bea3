"""A sweep: runs that differ in a few settings, each in its own run directory, and what each has reached.

    axes → points → for each point and seed a run, trained as any other → its last validation → a table, best first

``sweep.json`` lists the points that were begun, with the outcome of each run that has ended. It is written before a
run begins and after it ends, so the same command continues after a kill: ended runs are kept, the one that was running
resumes, and the points that follow are the same. A point whose run directory was removed is trained again.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Literal

from data_prep.errors import UserError
from data_prep.files import names_in, read_json, write_atomically
from lm.config.objective_settings import IMAGE_OBJECTIVES
from lm.config.settings import Config
from lm.config.sweep_axes import describe, grid
from lm.config.sweep_plan import Plan
from lm.data.corpora import Corpora
from lm.data.datasets import open_training_data, settled
from lm.data.image_corpora import ImageCorpora
from lm.data.images import ImageValidation
from lm.data.training_data import validation_rows
from lm.evaluation.sweep_search import suggest
from lm.model.device import choose_device
from lm.objectives.batches import TrainingBatches
from lm.objectives.objective import open_objective
from lm.runs.directory import open_run, plain_settings
from lm.runs.resume import ON_RESUME
from lm.training import trackers

JOURNAL, TABLE, PAGE = "sweep.json", "table.json", "sweep.html"
FORMAT = 1  # of the journal
OWN = re.compile(rf"\d{{3,}}(-seed\d+)?|({JOURNAL}|{TABLE}|{PAGE})(\.tmp)?")  # names in the folder of a sweep
# What a run can be judged by, in words. Bits per byte are the mean over the readouts, or of the one that is named.
MEASURES = {
    "bits_per_byte": "bits per byte",
    "next_token": "bits per byte of next_token",
    "masked_token": "bits per byte of masked_token",
    "masked_next_token": "bits per byte of masked_next_token",
    "loss": "loss",
    "knn_accuracy": "k-NN accuracy",
}
HIGHER_IS_BETTER = ("knn_accuracy",)
MUST_MATCH = ("steps", "validation_rows")  # besides what a resumed run may not change

Train = Callable[[Config, Path], object]  # trains a run in a directory, or resumes it


@dataclass(frozen=True)
class Outcome:
    """How one run ended: its last validation, or the ``reason`` why it failed or what shows its collapse."""

    status: Literal["finished", "collapsed", "failed"]
    step: int = 0
    validation: dict[str, dict[str, float]] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class Point:
    """Values of the swept settings, as JSON has them, and the outcomes of the runs that have ended, by seed."""

    number: int
    settings: dict[str, Any]
    outcomes: dict[str, Outcome] = field(default_factory=dict)


def check(plan: Plan) -> str:
    """Check the settings of every point against the data; return the measure to judge by.

    Raises:
        UserError: one line per problem, with the points that have it.
    """
    opened: dict[Any, Corpora | ImageCorpora] = {}
    checked: list[Config] = []

    def check_one(config: Config) -> None:
        if config.data.data not in opened:
            opened[config.data.data] = open_training_data(config.data.data, config.data.access)
        checked.append(_checked(config, opened[config.data.data], checked))

    plan.of_all(check_one, plan.configs())
    return _measure(plan.measure, checked, list(opened.values()))


def _checked(config: Config, corpora: Corpora | ImageCorpora, before: Sequence[Config]) -> Config:
    """The settings with what the data decides. UserError for what would stop the run before its first step."""
    config = settled(config, corpora)
    choose_device(config.training.device)
    trackers.require(config.training.trackers)
    parts = [(each.model, each.data, each.objective, each.views) for each in before]
    if (config.model, config.data, config.objective, config.views) not in parts:
        TrainingBatches(corpora, config)
    if validation_rows(corpora, config) is None:
        raise UserError(f"{corpora.name} has no validation split to compare runs by: prepare it with one")
    return config


def _measure(wanted: str, configs: Sequence[Config], data: Sequence[Corpora | ImageCorpora]) -> str:
    """The measure to judge by, if it suits all points."""
    first, objectives = configs[0], {config.objective.objective for config in configs}
    labeled = first.reads_images and all(_has_classes(each, first) for each in data)
    same_readouts = {config.readouts for config in configs} == {first.readouts} and first.readouts
    shared = [name for name in first.readouts if all(name in config.readouts for config in configs)]
    compares = any(name in IMAGE_OBJECTIVES for name in first.objective.shares)  # images, or views of texts
    fitting = ["knn_accuracy"] if labeled else ["bits_per_byte"] if same_readouts else []
    fitting += shared + (["loss"] if compares and len(objectives) == 1 else [])
    if not fitting:
        raise UserError("the objectives of these points have no measure in common: sweep each by itself")
    if not wanted and not same_readouts and shared:
        raise UserError(f"the objectives differ, so name what to compare: --measure {' or '.join(fitting)}")
    if wanted and wanted not in fitting:
        raise UserError(f"--measure {wanted} does not suit these points: choose {' or '.join(fitting)}")
    return wanted or fitting[0]


def _has_classes(corpora: Corpora | ImageCorpora, config: Config) -> bool:
    rows = validation_rows(corpora, config)
    assert isinstance(rows, ImageValidation)
    return bool((rows.held_out.labels >= 0).any() and (rows.train.labels >= 0).any())


class Sweep:
    """A sweep in its folder, new or continued; ``points`` are those that were begun.

    Raises:
        UserError: the folder holds something else, or a sweep that was begun with other settings.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.path = plan, plan.out / JOURNAL
        self.common = plan.config({})
        self.data = self._fingerprints()
        self.points: list[Point] = []
        if self.path.is_file():
            self._read()
        elif plan.out.exists() and any(not OWN.fullmatch(name) for name in names_in(plan.out)):
            raise UserError(f"{plan.out} is not empty and holds no sweep: choose another --out")

    def run(self, train: Train, note: Callable[[str], None], after_each: Callable[[], None]) -> None:
        """Train what has not ended yet, one run after another; ``after_each`` is called whenever one has."""
        total = self.plan.trials or math.prod(len(axis.values) for axis in self.plan.axes)
        for point in self._all_points(note):
            for seed in self._seeds(point):
                folder = self._folder(point, seed)
                if str(seed) in point.outcomes and folder.is_dir():
                    continue
                named = describe(point.settings) + (f", seed {seed}" if self.plan.seeds else "")
                note(f"point {point.number} of {max(total, len(self.points))}: {named}, in {folder}")
                point.outcomes.pop(str(seed), None)
                self._save()
                point.outcomes[str(seed)] = outcome = self._outcome(point, seed, folder, train)
                self._save()
                if outcome.status != "finished":
                    note(f"point {point.number} {outcome.status}, and the sweep continues: {outcome.reason}")
                after_each()

    def table(self) -> dict[str, Any]:
        """Every point that was begun, best first, ready for JSON: ``table.json``."""
        rows = [self._row(point) for point in self.points]
        sign = -1 if self.plan.measure in HIGHER_IS_BETTER else 1
        order = ("finished", "unfinished", "collapsed", "failed")
        rows.sort(key=lambda row: (order.index(row["status"]), sign * (row["value"] or 0), row["point"]))
        return {
            "recipe": self.plan.recipe,
            "measure": self.plan.measure,
            "unit": MEASURES[self.plan.measure],
            "better": "higher" if self.plan.measure in HIGHER_IS_BETTER else "lower",
            "trials": self.plan.trials,
            "settings": [axis.name for axis in self.plan.axes],
            "points": rows,
        }

    def _row(self, point: Point) -> dict[str, Any]:
        outcomes, value = point.outcomes, None
        statuses = {outcome.status for outcome in outcomes.values()}
        missing = len(self._seeds(point)) > len(outcomes)
        values = [value_of(each.validation, self.plan.measure) for each in outcomes.values() if each.validation]
        status = next((name for name in ("failed", "collapsed") if name in statuses), "")
        status = status or ("unfinished" if missing else "finished")
        if status == "finished":
            value = mean(values)
        return {
            "point": point.number,
            "runs": [self._folder(point, int(seed)).name for seed in outcomes],
            "settings": point.settings,
            "value": value,
            "deviation": stdev(values) if value is not None and len(values) > 1 else None,
            "status": status,
            "note": next((each.reason for each in outcomes.values() if each.reason), ""),
        }

    def _seeds(self, point: Point) -> list[int]:
        return list(self.plan.seeds) or [int(point.settings.get("seed", self.common.training.seed))]

    def _folder(self, point: Point, seed: int) -> Path:
        """The run directory of a point and a seed."""
        is_usual = "seed" in point.settings or seed == self.common.training.seed
        return self.plan.out / (f"{point.number:03d}" if is_usual else f"{point.number:03d}-seed{seed}")

    def _all_points(self, note: Callable[[str], None]) -> Iterator[Point]:
        """The points in order, those that were begun by an earlier command included; each is added when it begins."""
        if not self.plan.trials:
            for settings in grid(self.plan.axes):
                known = [point for point in self.points if point.settings == settings]
                yield known[0] if known else self._added(settings)
            return
        higher = self.plan.measure in HIGHER_IS_BETTER
        for number in range(self.plan.trials):
            if number < len(self.points):
                yield self.points[number]
                continue
            tried = [(point.settings, self._row(point)["value"]) for point in self.points]
            seed = self.common.training.seed
            found = suggest(self.plan.axes, tried, seed, self.plan.sampler, higher_is_better=higher)
            if found is None:
                note(f"after {number} points no new one was found: the search ends")
                return
            yield self._added(found)

    def _added(self, settings: dict[str, Any]) -> Point:
        self.points.append(Point(len(self.points) + 1, settings))
        return self.points[-1]

    def _outcome(self, point: Point, seed: int, folder: Path, train: Train) -> Outcome:
        """Train a run. What goes wrong with the run is its outcome; an error of the machine ends the sweep."""
        try:
            train(self.plan.config({**point.settings, "seed": seed}, folder), folder)
            run = open_run(folder)
            lines = [line for line in run.metrics() if line.get("validation")]
            if not lines:
                return Outcome("failed", reason="its metrics.jsonl has no validation")
            line = lines[-1]
            collapse = open_objective(run.config).collapse(line["validation"], line["step"])
            if not math.isfinite(value_of(line["validation"], self.plan.measure)):
                return Outcome("failed", reason=f"its last validation is not finite, at step {line['step']:,}")
            return Outcome("collapsed" if collapse else "finished", line["step"], line["validation"], collapse)
        except OSError:
            raise
        except UserError as error:
            return Outcome("failed", reason=str(error).replace("\n", "; "))
        except Exception as error:  # a run that cannot be computed must not end the others
            return Outcome("failed", reason=f"{type(error).__name__}: {error}".partition("\n")[0])

    def _definition(self) -> dict[str, Any]:
        """What must be the same when the sweep is continued."""
        axes = self.plan.axes
        swept = {axis.name for axis in axes} | {"data"}
        common = {
            name: value
            for name, value in plain_settings(self.common).items()
            if name not in swept and (ON_RESUME[name] != "free" or name in MUST_MATCH)
        }
        search = {}
        if self.plan.trials:  # the values of a grid may be added to
            search = {
                "sampler": self.plan.sampler,
                "measure": self.plan.measure,
                "axes": [asdict(each) for each in axes],
            }
        return {"settings": [axis.name for axis in axes], "search": json.loads(json.dumps(search)), "common": common}

    def _fingerprints(self) -> dict[str, str]:
        """The hash of the content of each dataset."""
        swept = next((axis.values for axis in self.plan.axes if axis.name == "data"), None)
        named = swept or [list(self.common.data.data)]
        return {" ".join(data): open_training_data(data, self.common.data.access).fingerprint for data in named}

    def _save(self) -> None:
        content = {
            "format": FORMAT,
            **self._definition(),
            "data": self.data,
            "points": [asdict(point) for point in self.points],
        }
        write_atomically(self.path, json.dumps(content, indent=1) + "\n")

    def _read(self) -> None:
        try:
            saved = read_json(self.path)
            points = [
                Point(each["number"], each["settings"], {s: Outcome(**o) for s, o in each["outcomes"].items()})
                for each in saved["points"]
            ]
            definition = {name: saved[name] for name in ("settings", "search", "common")}
            data = saved["data"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(
                f"{self.path} is damaged: remove it, and the same command finds the runs that are there"
            ) from None
        for line in _differences(definition, self._definition()):
            raise UserError(f"{self.plan.out} was begun with {line}: choose another --out")
        if changed := [name for name, now in self.data.items() if data.get(name, now) != now]:
            raise UserError(f"{changed[0]} has changed since {self.plan.out} was begun: choose another --out")
        self.points = points


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    if before["settings"] != now["settings"]:
        yield f"--set {' and '.join(before['settings'])} (now {' and '.join(now['settings'])})"
    if before["search"] != now["search"]:
        kinds = ["a search" if each["search"] else "a grid" for each in (before, now)]
        same = "a search over other values, by another sampler or another measure"
        yield same if kinds[0] == kinds[1] else f"{kinds[0]} (now {kinds[1]})"
    old, new = before["common"], now["common"]
    if changed := [name for name in new if old.get(name, new[name]) != new[name]]:
        yield ", ".join(f"{name} {old[name]!r} (now {new[name]!r})" for name in changed)


def value_of(validation: Mapping[str, Mapping[str, float]], measure: str) -> float:
    """The measure of a validation: of the readout that it names, or the mean over the groups that have it."""
    if measure in validation:
        return validation[measure]["bits_per_byte"]
    return mean(group[measure] for group in validation.values() if measure in group)
