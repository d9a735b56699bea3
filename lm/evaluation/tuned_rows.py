"""The fine-tuned rows of a table of tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.files import write_atomically
from lm.config.recipes import finetuning_config
from lm.data.examples import Example
from lm.evaluation.probes import Predictions
from lm.evaluation.task_table import TUNED, Examples
from lm.finetuning.finetune import finetune
from lm.finetuning.predict import Predictor, open_predictor, predict
from lm.runs.directory import Run
from lm.training.reporter import NullReporter


@dataclass(frozen=True)
class Tuner:
    """A ``task_table.Tune``: fine-tunes a row in its own run directory and predicts the test examples."""

    run: Run
    device: torch.device

    def __call__(self, row: str, examples: Examples, seed: int, settings: dict[str, Any], folder: Path) -> Predictions:
        train, validation = examples.parts(seed)
        folder.mkdir(parents=True, exist_ok=True)
        write_examples(folder / "train.jsonl", train)
        write_examples(folder / "validation.jsonl", validation)
        own = {
            "train": str(folder / "train.jsonl"),
            "validation": str(folder / "validation.jsonl"),
            "task": examples.task.kind,
            "judged_by": examples.task.judged_by,
            "seed": seed,
            "device": self.device.type,
        }
        done = finetune(
            finetuning_config(self.run.path, self.run.config, {**settings, **TUNED[row], **own}),
            folder / "run",
            NullReporter(),
        )
        start = time.perf_counter()
        outputs, cut = predictions_of(open_predictor(done.path, self.device), examples)
        seconds = learning_seconds(done) + time.perf_counter() - start
        note = f"best at step {done.step:,}" + (f"; {cut:,} test examples longer than the context" if cut else "")
        return Predictions(outputs, done.trained_parameters, note, seconds)


def learning_seconds(run: Run) -> float:
    """The seconds of a run's optimizer steps in all its sessions, according to ``metrics.jsonl``."""
    seconds, before = 0.0, 0.0
    for line in run.metrics():
        if "tokens_per_second" in line:
            seconds += (line["tokens"] - before) / line["tokens_per_second"]
            before = line["tokens"]
    return seconds


def write_examples(path: Path, examples: Sequence[Example]) -> None:
    """Write examples as JSON lines with the default columns."""
    lines = (
        json.dumps(dict(zip(("text", "text_pair"), example.texts, strict=False)) | {"label": example.label})
        for example in examples
    )
    write_atomically(path, "".join(line + "\n" for line in lines))


def predictions_of(predictor: Predictor, examples: Examples) -> tuple[NDArray[np.float64], int]:
    """Outputs for test examples as in ``probes.Predictions``, and how many of them were longer than the context.

    A class that was not among the training examples of the fine-tuned run has probability 0.
    """
    found = list(predict(predictor, examples.test))
    cut = sum(was_cut for _, was_cut in found)
    if examples.labels is None:
        return np.array([answer["value"] for answer, _ in found]), cut
    names = examples.labels.names
    return np.array([[answer["probabilities"].get(name, 0.0) for name in names] for answer, _ in found]), cut
