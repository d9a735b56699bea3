"""``report.html`` of a run that was fine-tuned on a task with a head: curves, metrics, and its validation examples."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import write_atomically
from lm.data.examples import Example, Labels
from lm.data.image_files import LabeledImages
from lm.evaluation.task_table import Examples, Task
from lm.finetuning.answers import labels_of
from lm.finetuning.finetune import examples_of
from lm.finetuning.metrics import METRICS
from lm.finetuning.predict import Predictor, open_predictor, predict, predict_images
from lm.model.device import choose_device
from lm.reports.page import Panel, chart, render
from lm.reports.run_report import environment, lead, settings_of
from lm.reports.task_report import of_examples
from lm.runs.directory import Run
from lm.runs.metrics_log import metrics_at, series, summary
from lm.training.plan import format_bytes

MOST = 1000  # validation examples that are predicted for the page


def write_finetune_report(run: Run, which: str = "best") -> Path:
    """Write ``report.html`` into the run directory and return its path.

    ``which`` is the checkpoint, as of ``Run.checkpoint``. If the validation examples are gone, or their answers are no
    classes and no numbers, the parts about them are left out.
    """
    predictor = open_predictor(run.path, choose_device("auto"), which)
    lines, task = list(run.metrics()), run.config.finetune
    validated = [{"step": line["step"], **line["metrics"]} for line in lines if line.get("metrics")]
    shown = metrics_at(lines, predictor.saved.step, averaged=predictor.saved.is_average) or None
    validation = _validation_of(run)
    html = render(
        "finetune_report.html",
        name=run.path.name,
        lead=lead(run, predictor.saved, predictor.model.trunk, lines),
        metrics={name: f"{value:.4f}" for name, value in (shown or {}).items()},
        judged_by=task.judged_by,
        step=f"{predictor.saved.step:,}",
        verdict=_verdict(validation, shown),
        meaning=_meaning(predictor),
        curves=_curves(lines, validated, task.judged_by),
        remarks=[],
        summary=_summary(lines),
        events=[],
        task=_answered(predictor, validation),
        settings=settings_of(run),
        environment=environment(predictor.model.trunk, "Pillow" if run.config.reads_images else "tokenizers"),
    )
    path = run.path / "report.html"
    write_atomically(path, html)
    return path


def _validation_of(run: Run) -> Sequence[Example]:
    """The validation examples; none if the files are gone."""
    try:
        return examples_of(run.config, run, labels_of(run.path))[1]
    except UserError:
        return []


def _verdict(validation: Sequence[Example], shown: dict[str, float] | None) -> str:
    """What a constant answer would reach on the validation examples, which have one class each; "" for others."""
    if not shown or not validation or "accuracy" not in shown or not isinstance(validation[0].label, str):
        return ""
    (label, count), *_ = Counter(example.label for example in validation).most_common(1)
    usual = count / len(validation)
    better = shown["accuracy"] > usual
    return (
        f"The model is right on {shown['accuracy']:.1%} of {len(validation):,} validation examples; always answering "
        f"“{label}” is right on {usual:.1%}{'' if better else ': it has learned nothing of use yet'}."
    )


def _meaning(predictor: Predictor) -> str:
    """What the loss is."""
    if predictor.config.finetune.task == "regression":
        return (
            "The loss is the squared distance from the true number, in units of the training numbers' variance: "
            "always answering their mean has about 1."
        )
    classes = len(predictor.answers.labels)
    guess = f": guessing evenly among {classes} has {math.log(classes):.2f}" if classes else ""
    return (
        f"The loss is the mean negative logarithm of the right answer's probability, in nats{guess}. If it rises while "
        "the accuracy stays, the model grows too sure of its errors."
    )


def _curves(lines: Sequence[dict[str, Any]], validated: Sequence[dict[str, Any]], judged_by: str) -> list[str]:
    """Losses, the metric that judges, learning rate, gradient norm and speed by step, as SVG elements."""
    training = [line for line in lines if "loss" in line]
    if not training:
        return []
    points = {"validation": series(validated, "loss")} if validated else {}
    panels = [
        Panel("loss, nats" if judged_by == "accuracy" else "loss", {"training": series(training, "loss")}, points)
    ]
    if judged_by != "loss" and series(validated, judged_by):
        panels.append(Panel(f"{judged_by.replace('_', ' ')}, validation", {}, {"": series(validated, judged_by)}))
    names = ("learning_rate", "gradient_norm", "tokens_per_second")
    rates = [Panel(name.replace("_", " "), {"": series(training, name)}) for name in names]
    return [chart(panels, height=3.2), chart(rates, height=2.2)]


def _summary(lines: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The state of the run, in words."""
    found = summary(lines)
    state = {"epochs seen": f"{found['epoch']:.2f}"} if found else {}
    return state | ({"peak memory": format_bytes(found["memory_bytes"])} if "memory_bytes" in found else {})


def _answered(predictor: Predictor, validation: Sequence[Example]) -> dict[str, Any] | None:
    """Validation examples and the answers to them, example by example; None if there is nothing to show."""
    task = predictor.config.finetune
    if not validation or task.task not in METRICS:
        return None
    labels = Labels(predictor.answers.labels) if predictor.answers.labels else None
    drawn = np.sort(np.random.default_rng(0).permutation(len(validation))[:MOST])
    test = validation.chosen(drawn) if isinstance(validation, LabeledImages) else [validation[n] for n in drawn]
    examples = Examples(Task(task.task, task.task, task.train, task.validation), [], test, [], labels)
    of = f" of the {len(validation):,}" if len(validation) > MOST else ""
    found = of_examples(examples, _outputs(predictor, test), examples.values(test))
    return found | {"among": f"{len(test):,}{of} validation examples{', drawn at random' if of else ''}"}


def _outputs(predictor: Predictor, examples: Sequence[Example]) -> NDArray[np.float64]:
    """Probabilities (examples, classes), or numbers (examples,)."""
    if isinstance(examples, LabeledImages):
        pixels = (examples.read(np.array([number]))[0] for number in range(len(examples)))
        answers = list(predict_images(predictor, pixels))
    else:
        answers = [answer for answer, _ in predict(predictor, examples)]
    if "value" in answers[0]:
        return np.array([answer["value"] for answer in answers])
    return np.array([list(answer["probabilities"].values()) for answer in answers])
