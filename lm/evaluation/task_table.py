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
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import read_json, write_atomically
from lm.data.examples import Columns, Example, Labels, content_hash, numbers_of, read_examples
from lm.evaluation.probes import Predictions, Target, linear, majority, nearest, tfidf
from lm.finetuning.heads import pair_features
from lm.finetuning.metrics import METRICS, metrics_of
from lm.inference.embedding import Reading, Vectors, all_vectors
from lm.inference.language_model import LanguageModel
from lm.model.transformer import Transformer
from lm.runs.directory import Run

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
# The rows that are fine-tuned, and the settings of each.
TUNED = {"untrained": {"method": "full", "weights": "random"}, "lora": {"method": "lora"}, "full": {"method": "full"}}
FROZEN = ("probe_untrained", "knn", "probe")
CELLS, TABLE = "cells", "table.json"
FORMAT = 2  # of a cell; cells of another format are computed again


@dataclass(frozen=True)
class Task:
    """One task of a table.

    All rows learn from ``train`` and are measured on ``test``. Fine-tuning chooses its best step on ``validation``; ""
    stands for a tenth of ``train``, drawn by the seed. ``settings`` are those of the fine-tuned rows, by row.
    """

    name: str
    kind: str
    train: str
    test: str
    validation: str = ""
    metric: str = ""
    columns: Columns = field(default_factory=Columns)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def judged_by(self) -> str:
        return self.metric or METRICS[self.kind][0]


@dataclass(frozen=True)
class Examples:
    """The examples of a task, read; ``labels`` is None for a regression."""

    task: Task
    train: list[Example]
    test: list[Example]
    validation: list[Example]
    labels: Labels | None

    @property
    def classes(self) -> int:
        return len(self.labels.names) if self.labels else 0

    def values(self, examples: Sequence[Example]) -> NDArray[Any]:
        """Labels as numbers: int64 classes, or float64. UserError for a class that is not in the training examples."""
        if self.labels is None:
            return np.array([example.label for example in examples], dtype=np.float64)
        return np.array([n for example in examples for n in self.labels.indices(example)], dtype=np.int64)

    def parts(self, seed: int) -> tuple[list[Example], list[Example]]:
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
        rest = [example for number, example in enumerate(self.train) if number not in held]
        return rest, [self.train[number] for number in sorted(held)]


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


def read_task(task: Task) -> Examples:
    """Read the examples of a task.

    Raise UserError if a file cannot be read, all labels are the same, or a test label is not in the training examples.
    """
    if task.kind not in METRICS:
        raise UserError(f'task "{task.name}": tables support {" and ".join(METRICS)}, not {task.kind}')
    if task.judged_by not in METRICS[task.kind]:
        known = ", ".join(METRICS[task.kind])
        raise UserError(f'task "{task.name}": {task.kind} has no metric "{task.metric}": choose one of {known}')
    train, test = (read_examples(file, task.kind, task.columns) for file in (task.train, task.test))
    validation = read_examples(task.validation, task.kind, task.columns) if task.validation else []
    if len({len(example.texts) for example in [*train, *test, *validation]}) > 1:
        raise UserError(f'task "{task.name}": some examples are pairs of texts and others single texts')
    if task.kind == "regression":
        numbers_of(train)
    examples = Examples(task, train, test, validation, Labels.of(train) if task.kind == "classification" else None)
    examples.values([*test, *validation])
    if task.judged_by == "f1" and examples.classes != 2:
        raise UserError(f'task "{task.name}" has {examples.classes} classes, but f1 is for two: choose macro_f1')
    return examples


@dataclass(frozen=True)
class _Features:
    """Vectors of a task's examples, the seconds they took, and how many texts were truncated to the context."""

    train: Vectors
    test: Vectors
    seconds: float
    cut: int


@dataclass
class CellMaker:
    """Computes the cells of a run's tables; caches the features of one task at a time.

    ``weights`` is the hash of the model's file, ``out`` the folder of the tables. The run directories of fine-tuned
    rows, in ``out/runs``, are removed once their cell is written, or kept.
    """

    run: Run
    model: Transformer
    weights: str
    reading: Reading
    tune: Tune
    out: Path
    keep_runs: bool = field(default=False, kw_only=True)
    _features: dict[tuple[str, int | None], _Features] = field(default_factory=dict, init=False)

    def cell(self, examples: Examples, row: str, seed: int) -> Cell:
        """Return the saved cell, or compute and save it."""
        task = examples.task.name
        path = self.out / CELLS / task / f"{row}-{seed}.json"
        source = self._source(examples, row, seed)
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
        task, reading = examples.task, asdict(self.reading) if row in FROZEN else None
        weights = self.weights if row not in ("majority", "tfidf") else ""
        parts = (FORMAT, task.kind, task.judged_by, row, seed, task.settings.get(row, {}), reading, weights)
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode())
        for part in (examples.train, examples.test, examples.validation if row in TUNED else []):
            digest.update(content_hash(part).encode())
        return digest.hexdigest()

    def _predictions(self, examples: Examples, row: str, seed: int, folder: Path) -> tuple[Predictions, float]:
        """The predictions of a row for the test examples, and the seconds they took."""
        target = Target(examples.values(examples.train), examples.classes, examples.task.judged_by)
        features = self._vectors(examples, seed if row == "probe_untrained" else None) if row in FROZEN else None
        start = time.perf_counter() - (features.seconds if features else 0)
        if features:
            found = (nearest if row == "knn" else linear)(features.train, target, features.test, seed)
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

    def _vectors(self, examples: Examples, untrained: int | None) -> _Features:
        """Features of a task by the run's model, or by an untrained one that is drawn from the seed ``untrained``."""
        key = (examples.task.name, untrained)
        if key not in self._features:
            start = time.perf_counter()
            trunk = self.model
            if untrained is not None:
                device = next(self.model.parameters()).device
                trunk = Transformer(self.run.config.model).initialize(untrained).to(device).eval()
            model = LanguageModel(trunk, self.run.tokenizer, self.run.config)
            train, test = (self._vectors_of(model, part) for part in (examples.train, examples.test))
            seconds = time.perf_counter() - start
            self._features = {key: value for key, value in self._features.items() if key[0] == examples.task.name}
            self._features[key] = _Features(train[0], test[0], seconds, train[1] + test[1])
        return self._features[key]

    def _vectors_of(self, model: LanguageModel, examples: Sequence[Example]) -> tuple[Vectors, int]:
        """A vector per example (those of a pair are combined), and how many texts were truncated."""
        columns = zip(*(example.texts for example in examples), strict=True)
        found = [all_vectors(model, [(text,) for text in column], self.reading) for column in columns]
        first, *others = (vectors for vectors, _ in found)
        vectors = np.concatenate(pair_features(first, others[0]), axis=1) if others else first
        return vectors, sum(cut for _, cut in found)


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


def findings(summaries: Sequence[Summary], metric: str) -> list[str]:
    """The findings of one task's table in sentences: full fine-tuning against the untrained architecture and TF-IDF.

    A difference counts if it exceeds two of its standard deviations, computed from those of both rows.
    """
    rows = {summary.row: summary for summary in summaries}
    sentences = []
    for other, name in (("untrained", "the untrained architecture"), ("tfidf", "TF-IDF")):
        if "full" not in rows or other not in rows:
            continue
        (ours, our_sd), (theirs, their_sd) = rows["full"].metrics[metric], rows[other].metrics[metric]
        margin, difference = 2 * (our_sd**2 + their_sd**2) ** 0.5, ours - theirs
        numbers = f"{metric} {ours:.3f} vs. {theirs:.3f}, a difference of {difference:+.3f}"
        if min(len(rows["full"].seeds), len(rows[other].seeds)) < 2:
            sentences.append(f"Full fine-tuning vs. {name}: {numbers}; with a single seed this may be chance.")
            continue
        clear = "better than" if difference > 0 else "worse than"
        verdict = clear if abs(difference) > margin else "not clearly different from"
        sentences.append(f"Full fine-tuning is {verdict} {name}: {numbers} (two standard deviations: {margin:.3f}).")
    return sentences
