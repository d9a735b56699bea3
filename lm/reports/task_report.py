"""``report.html`` of ``kindling tasks``: tables, charts, and the predictions of one row example by example."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.files import write_atomically
from lm.evaluation.task_table import Cell, Examples, Summary, findings, summarize
from lm.finetuning.metrics import CALIBRATION_BINS, calibration, confusion_matrix
from lm.reports.page import Bars, Panel, chart, render

HARDEST = 10
# These know nothing of the pretraining.
BASELINES = ("majority", "tfidf", "untrained", "probe_untrained", "knn_pixels", "probe_pixels", "knn_untrained")
# The first of these that exists is shown in detail.
DETAILED = ("full", "lora", "probe", "knn", "untrained", "tfidf", "probe_pixels", "majority")


def write_task_report(path: Path, name: str, lead: str, tasks: Sequence[Examples], cells: Sequence[Cell]) -> None:
    """Write a page about the cells of some tasks; ``lead`` is a sentence about the run, ``name``."""
    sections = [_section(examples, [c for c in cells if c.task == examples.task.name]) for examples in tasks]
    several = len({cell.seed for cell in cells}) > 1
    write_atomically(
        path,
        render(
            "tasks.html",
            name=name,
            lead=lead,
            sections=sections,
            rows=tasks[0].rows,
            baselines=BASELINES,
            several=several,
        ),
    )


def table(summaries: Sequence[Summary], judged_by: str) -> tuple[list[str], list[list[str]]]:
    """A task's table as texts, header and rows; the metric ``judged_by`` comes first."""
    metrics = sorted(summaries[0].metrics, key=lambda name: name != judged_by)
    rows = []
    for summary in summaries:
        form = "{:.3f} ± {:.3f}" if len(summary.seeds) > 1 else "{:.3f}"
        numbers = [form.format(*summary.metrics[name]) for name in metrics]
        rows.append([summary.row, *numbers, f"{summary.trained_parameters:,}", f"{summary.seconds:.1f}"])
    return ["", *metrics, "trained parameters", "seconds"], rows


def _section(examples: Examples, cells: Sequence[Cell]) -> dict[str, Any]:
    """The values of the template for one task."""
    task, summaries = examples.task, summarize(cells)
    header, rows = table(summaries, task.judged_by)
    values = {summary.row: summary.metrics[task.judged_by] for summary in summaries}
    by_row = {cell.row: cell for cell in reversed(cells)}  # the first of several seeds
    shown = by_row[next(row for row in (*DETAILED, *by_row) if row in by_row)]
    outputs, truth = np.array(shown.outputs), examples.values(examples.test)
    return {
        "name": task.name,
        "size": f"{len(examples.numbers(0)):,} training examples, {len(examples.test):,} test examples; "
        f"seeds {', '.join(map(str, summaries[0].seeds))}",
        "header": header,
        "rows": rows,
        "findings": findings(summaries, task.judged_by),
        "chart": chart([_bars(values, task.judged_by, several=len(summaries[0].seeds) > 1)], height=3.0),
        "shown": f"{examples.rows[shown.row]}, seed {shown.seed}",
        **of_examples(examples, outputs, truth),
    }


def of_examples(examples: Examples, outputs: NDArray[np.float64], truth: NDArray[Any]) -> dict[str, Any]:
    """The values of ``answers.html``, from the outputs for the test examples and what is right (``Examples.values``).

    ``outputs`` are probabilities (examples, classes), or numbers (examples,).
    """
    return {
        "confusion": _confusion(examples, outputs, truth),
        "calibration": chart([_calibration(examples, outputs, truth)], height=3.0),
        "hardest": _hardest(examples, outputs, truth),
    }


def _bars(values: dict[str, tuple[float, float]], metric: str, *, several: bool) -> Bars:
    """The rows of a task; an error bar is the standard deviation over ``several`` seeds."""
    label = f"{metric}, ± one standard deviation over seeds" if several else metric
    return Bars("", values, label, BASELINES, None if metric == "loss" else 1.0)


def _confusion(examples: Examples, outputs: NDArray[np.float64], truth: NDArray[Any]) -> dict[str, Any] | None:
    if examples.labels is None:
        return None
    counts = confusion_matrix(truth, outputs.argmax(1), examples.classes)
    return {"names": examples.labels.names, "counts": [[f"{n:,}" for n in row] for row in counts.tolist()]}


def _calibration(examples: Examples, outputs: NDArray[np.float64], truth: NDArray[Any]) -> Panel:
    if examples.labels is not None:
        bins, error = calibration(outputs, truth)
        points = [(each.confidence, each.accuracy) for each in bins]
        title = f"accuracy by confidence; expected calibration error {error:.3f}"
        low, high, horizontal = 1 / examples.classes, 1.0, "confidence"
    else:
        parts = np.array_split(np.argsort(outputs, kind="stable"), CALIBRATION_BINS)
        points = [(float(outputs[part].mean()), float(truth[part].mean())) for part in parts if len(part)]
        title, horizontal = "mean true number, by tenths of the predictions", "prediction"
        low, high = float(truth.min()), float(truth.max())
    return Panel(title, {"perfect": [(low, low), (high, high)]}, {"measured": points}, horizontal=horizontal)


def _hardest(examples: Examples, outputs: NDArray[np.float64], truth: NDArray[Any]) -> list[dict[str, Any]]:
    """The errors with the highest confidence, or the numbers that are farthest off."""
    if examples.labels is not None:
        answered = outputs.argmax(1)
        badness = np.where(answered == truth, -1.0, outputs.max(1))
        names = examples.labels.names
        shown = [(names[a], names[t], f"{o.max():.0%}") for a, t, o in zip(answered, truth, outputs, strict=True)]
    else:
        badness = np.abs(outputs - truth)
        shown = [(f"{o:.2f}", f"{t:g}", f"{abs(o - t):.2f} off") for o, t in zip(outputs, truth, strict=True)]
    errors = []
    for number in np.argsort(-badness, kind="stable")[:HARDEST]:
        if badness[number] > 0:
            example = {"texts": examples.test[number].texts, "place": examples.test[number].place.rpartition("/")[2]}
            errors.append(example | dict(zip(("answer", "truth", "sure"), shown[number], strict=True)))
    return errors
