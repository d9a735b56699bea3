"""What did pretraining buy? A table per task: baselines, probes and fine-tuning on the same examples, over seeds.

    task → examples → for each row and seed a *cell*: learn, predict the test examples, measure → mean ± sd per row

Each cell is a file (``cells/TASK/ROW-SEED.json``), written when it is complete: a table that was interrupted resumes
where it was, and adding a row or a seed computes only the new cells. A cell is computed again if the model, the
examples or the settings have changed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import read_json, write_atomically
from data_prep.shards.images import ImageFormat
from lm.config.settings import IMAGE_TASKS
from lm.data.examples import Columns, Example, Labels, content_hash, numbers_of, read_examples
from lm.data.image_files import TRAIN, VALIDATION, LabeledImages, has_validation, read_labeled
from lm.evaluation.probes import Predictions, Target, linear, majority, nearest, tfidf
from lm.finetuning.metrics import METRICS, metrics_of
from lm.inference.embedding import Vectors

# In the order of the table: its names, and what each is.
ROWS = {
    "majority": "class frequencies, or the mean, regardless of the text",
    "tfidf": "a linear classifier over TF-IDF of words and word pairs (logistic regression; ridge for numbers)",
    "untrained": "the same architecture, untrained, fine-tuned in full",
    "probe_untrained": "linear probe of the untrained architecture's frozen features",
    "knn": "k nearest neighbors by frozen features",
    "probe": "linear probe of frozen features",
    "lora": "fine-tuned by LoRA",
    "full": "fine-tuned in full",
}
# The rows of tasks on images.
IMAGE_ROWS = {
    "majority": "class frequencies, regardless of the image",
    "knn_pixels": "k nearest neighbors by raw pixels",
    "probe_pixels": "linear probe of raw pixels",
    "knn_untrained": "k nearest neighbors by frozen features of the same architecture with random weights",
    "probe_untrained": "linear probe of frozen features of the same architecture with random weights",
    "untrained": "the same architecture, trained from scratch on the labels",
    **{name: ROWS[name] for name in ("knn", "probe", "lora", "full")},
}
# The rows that are fine-tuned, and the settings of each.
TUNED = {"untrained": {"method": "full", "weights": "random"}, "lora": {"method": "lora"}, "full": {"method": "full"}}
FROZEN = ("knn_pixels", "probe_pixels", "knn_untrained", "probe_untrained", "knn", "probe")
WITHOUT_MODEL = ("majority", "tfidf", "knn_pixels", "probe_pixels")  # rows that do not depend on the run's weights
CELLS, TABLE = "cells", "table.json"
FORMAT = 2  # of a cell; cells of another format are computed again


@dataclass(frozen=True)
class Task:
    """One task of a table.

    All rows learn from ``train`` and are measured on ``test``. Fine-tuning chooses its best step on ``validation``; ""
    stands for a tenth of ``train``, drawn by the seed. ``settings`` are those of the fine-tuned rows, by row.
    ``labels`` is the share of ``train`` that is used, of each class, drawn by the seed.
    """

    name: str
    kind: str
    train: str
    test: str
    validation: str = ""
    metric: str = ""
    columns: Columns = field(default_factory=Columns)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)
    labels: float = 1.0

    @property
    def judged_by(self) -> str:
        return self.metric or METRICS[self.kind][0]


@dataclass(frozen=True)
class Examples:
    """The examples of a task, read; ``labels`` is None for a regression."""

    task: Task
    train: Sequence[Example]
    test: Sequence[Example]
    validation: Sequence[Example]
    labels: Labels | None

    @property
    def classes(self) -> int:
        return len(self.labels.names) if self.labels else 0

    def values(self, examples: Sequence[Example]) -> NDArray[Any]:
        """Labels as numbers: int64 classes, or float64. UserError for a class that is not in the training examples."""
        if self.labels is None:
            return np.array([example.label for example in examples], dtype=np.float64)
        return np.array([n for example in examples for n in self.labels.indices(example)], dtype=np.int64)

    @property
    def rows(self) -> dict[str, str]:
        """The rows of the task's table."""
        return IMAGE_ROWS if self.task.kind in IMAGE_TASKS else ROWS

    @property
    def notes(self) -> list[str]:
        """What to tell the user of the examples."""
        return [
            n
            for part in (self.train, self.test, self.validation)
            if isinstance(part, LabeledImages)
            for n in part.notes
        ]

    def numbers(self, seed: int) -> NDArray[np.int64]:
        """The training examples that a seed uses: the task's share of each class, at least one, ascending.

        A smaller share is part of a larger one.
        """
        classes = np.zeros(len(self.train), dtype=np.int64) if self.labels is None else self.values(self.train)
        order = np.random.default_rng([seed, 2]).permutation(len(self.train))
        chosen = []
        for number in np.unique(classes):
            of_class = order[classes[order] == number]
            chosen.append(of_class[: max(1, round(len(of_class) * self.task.labels))])
        return np.sort(np.concatenate(chosen))

    def of_seed(self, seed: int) -> Examples:
        """With the training examples that a seed uses."""
        return self if self.task.labels == 1 else replace(self, train=_taken(self.train, self.numbers(seed)))

    def parts(self, seed: int) -> tuple[Sequence[Example], Sequence[Example]]:
        """The training and validation examples of a fine-tuning."""
        if self.validation:
            return self.train, self.validation
        seen: set[Any] = set()
        held: set[int] = set()
        for number in np.random.default_rng([seed, 1]).permutation(len(self.train)).tolist():
            if self.labels is not None and self.train[number].label not in seen:
                seen.add(self.train[number].label)  # one of each class is for training
            elif len(held) < max(1, len(self.train) // 10):
                held.add(number)
        rest = np.array([number for number in range(len(self.train)) if number not in held], dtype=np.int64)
        return _taken(self.train, rest), _taken(self.train, np.array(sorted(held), dtype=np.int64))


def _taken(examples: Sequence[Example], numbers: NDArray[np.int64]) -> Sequence[Example]:
    if isinstance(examples, LabeledImages):
        return examples.chosen(numbers)
    return [examples[number] for number in numbers.tolist()]


@dataclass(frozen=True)
class Cell:
    """One row of a task with one seed: the metrics on the test examples, and their cost.

    ``outputs`` are those of ``probes.Predictions``; ``seconds`` cover learning, choosing and predicting; ``source`` is
    the hash of everything that the cell depends on.
    """

    task: str
    row: str
    seed: int
    metrics: dict[str, float]
    trained_parameters: int
    seconds: float
    note: str
    outputs: list[Any]
    source: str


# Makes a fine-tuned row: (row, examples, seed, settings, folder for its run) → predictions for the test examples.
Tune = Callable[[str, Examples, int, dict[str, Any], Path], Predictions]


def read_task(task: Task, form: ImageFormat | None = None) -> Examples:
    """Read the examples of a task, images as a run with this format does.

    Raise UserError if a file cannot be read, all labels are the same, or a test label is not in the training examples.
    """
    if task.kind not in METRICS:
        raise UserError(f'task "{task.name}": tables support {", ".join(METRICS)}, not {task.kind}')
    if task.judged_by not in METRICS[task.kind]:
        known = ", ".join(METRICS[task.kind])
        raise UserError(f'task "{task.name}": {task.kind} has no metric "{task.metric}": choose one of {known}')

    def read(source: str, split: str) -> Sequence[Example]:
        if task.kind not in IMAGE_TASKS:
            return read_examples(source, task.kind, task.columns)
        assert form is not None
        label = "" if task.columns.label == Columns.label else task.columns.label
        return read_labeled(source, form, split if has_validation(source) else "", label)

    train, test = read(task.train, TRAIN), read(task.test, VALIDATION)
    validation = read(task.validation, VALIDATION) if task.validation else []
    if len({len(example.texts) for example in [*train, *test, *validation]}) > 1:
        raise UserError(f'task "{task.name}": some examples are pairs of texts and others single texts')
    if task.kind == "regression":
        numbers_of(train)
    examples = Examples(task, train, test, validation, None if task.kind == "regression" else Labels.of(train))
    examples.values([*test, *validation])
    if task.judged_by == "f1" and examples.classes != 2:
        raise UserError(f'task "{task.name}" has {examples.classes} classes, but f1 is for two: choose macro_f1')
    return examples


@dataclass(frozen=True)
class Frozen:
    """Vectors of a task's training and test examples, the seconds they took, and how many texts were truncated."""

    train: Vectors
    test: Vectors
    seconds: float
    cut: int = 0


class Features(Protocol):
    """Where the frozen rows get their vectors (``lm.evaluation.frozen_features``)."""

    def key(self, row: str) -> Any:
        """What the vectors of a row depend on besides examples and weights, as JSON."""

    def of(self, examples: Examples, row: str, seed: int) -> Frozen:
        """The vectors for a row, of the training examples that the seed uses."""


@dataclass
class CellMaker:
    """Computes the cells of a run's tables.

    ``weights`` is the hash of the model's file, ``out`` the folder of the tables. The run directories of fine-tuned
    rows, in ``out/runs``, are removed once their cell is written, or kept.
    """

    features: Features
    weights: str
    tune: Tune
    out: Path
    keep_runs: bool = field(default=False, kw_only=True)

    def cell(self, examples: Examples, row: str, seed: int) -> Cell:
        """Return the saved cell, or compute and save it."""
        task = examples.task.name
        path = self.out / CELLS / task / f"{row}-{seed}.json"
        source = self._source(examples.of_seed(seed), row, seed)
        if (known := read_cell(path)) and known.source == source:
            return known
        folder = self.out / "runs" / task / f"{row}-{seed}-{source[:8]}"
        found, seconds = self._predictions(examples, row, seed, folder)
        metrics = metrics_of(examples.values(examples.test), found.outputs, examples.classes)
        outputs = found.outputs.tolist()
        cell = Cell(task, row, seed, metrics, found.parameters, seconds, found.chosen, outputs, source)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(asdict(cell)) + "\n")
        if not self.keep_runs:
            shutil.rmtree(folder, ignore_errors=True)
            with suppress(OSError):  # another process's run may be there
                folder.parent.rmdir()
                folder.parent.parent.rmdir()
        return cell

    def _source(self, examples: Examples, row: str, seed: int) -> str:
        """The hash of everything that a cell depends on."""
        task, reading = examples.task, self.features.key(row) if row in FROZEN else None
        weights = self.weights if row not in WITHOUT_MODEL else ""
        parts = (FORMAT, task.kind, task.judged_by, row, seed, task.settings.get(row, {}), reading, weights)
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        for part in (examples.train, examples.test, examples.validation if row in TUNED else []):
            digest.update(content_hash(part).encode())
            if isinstance(part, LabeledImages):
                digest.update(part.digest.encode())
        return digest.hexdigest()

    def _predictions(self, examples: Examples, row: str, seed: int, folder: Path) -> tuple[Predictions, float]:
        """The predictions of a row for the test examples, and the seconds they took."""
        features = self.features.of(examples, row, seed) if row in FROZEN else None
        examples = examples.of_seed(seed)
        target = Target(examples.values(examples.train), examples.classes, examples.task.judged_by)
        start = time.perf_counter() - (features.seconds if features else 0)
        if features:
            found = (nearest if row.startswith("knn") else linear)(features.train, target, features.test, seed)
            if features.cut:
                found = replace(found, chosen=f"{found.chosen}; {features.cut:,} texts truncated")
        elif row in TUNED:
            found = self.tune(row, examples, seed, examples.task.settings.get(row, {}), folder)
        elif row == "tfidf":
            train, test = ([example.texts for example in part] for part in (examples.train, examples.test))
            found = tfidf(train, target, test, seed)
        else:
            found = majority(target, len(examples.test))
        return found, time.perf_counter() - start if found.seconds is None else found.seconds


def read_cell(path: Path) -> Cell | None:
    """Read a saved cell; None if it is missing, damaged, or of another version."""
    try:
        return Cell(**read_json(path))
    except (OSError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class Summary:
    """A row of a task over its seeds: mean and sample standard deviation of each metric (0.0 for one seed)."""

    task: str
    row: str
    seeds: tuple[int, ...]
    metrics: dict[str, tuple[float, float]]
    trained_parameters: int
    seconds: float


def summarize(cells: Sequence[Cell]) -> list[Summary]:
    """Summarize the cells of each task and row, in the order of the cells."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.task, cell.row), []).append(cell)
    summaries = []
    for (task, row), group in groups.items():
        values = {name: [cell.metrics[name] for cell in group] for name in group[0].metrics}
        metrics = {name: (mean(each), stdev(each) if len(each) > 1 else 0.0) for name, each in values.items()}
        parameters = max(cell.trained_parameters for cell in group)
        seconds = mean(cell.seconds for cell in group)
        summaries.append(Summary(task, row, tuple(cell.seed for cell in group), metrics, parameters, seconds))
    return summaries


# Which rows the findings compare: ours, another, and how a sentence calls both.
COMPARED = (
    ("full", "untrained", "Full fine-tuning", "the untrained architecture"),
    ("full", "tfidf", "Full fine-tuning", "TF-IDF"),
    ("probe", "probe_pixels", "The linear probe", "one of raw pixels"),
    ("probe", "probe_untrained", "The linear probe", "one of random weights"),
    ("knn", "knn_pixels", "k-NN", "k-NN by raw pixels"),
    ("knn", "knn_untrained", "k-NN", "k-NN by random weights"),
)


def findings(summaries: Sequence[Summary], metric: str) -> list[str]:
    """The findings of one task's table in sentences: what the run gives, against what is there without pretraining.

    A difference counts if it exceeds two of its standard deviations, computed from those of both rows. Probes are
    compared where raw pixels are a row, for images.
    """
    rows = {summary.row: summary for summary in summaries}
    sentences = []
    for row, other, called, name in COMPARED:
        if row not in rows or other not in rows or (row != "full" and not rows.keys() & {"knn_pixels", "probe_pixels"}):
            continue
        (ours, our_sd), (theirs, their_sd) = rows[row].metrics[metric], rows[other].metrics[metric]
        margin, difference = 2 * (our_sd**2 + their_sd**2) ** 0.5, ours - theirs
        numbers = f"{metric} {ours:.3f} vs. {theirs:.3f}, a difference of {difference:+.3f}"
        if min(len(rows[row].seeds), len(rows[other].seeds)) < 2:
            sentences.append(f"{called} vs. {name}: {numbers}; with a single seed this may be chance.")
            continue
        clear = "better than" if difference > 0 else "worse than"
        verdict = clear if abs(difference) > margin else "not clearly different from"
        sentences.append(f"{called} is {verdict} {name}: {numbers} (two standard deviations: {margin:.3f}).")
    return sentences
