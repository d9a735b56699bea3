"""The fine-tuned rows of a table of tasks."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.files import atomic_file, write_atomically
from lm.config.finetune_settings import FinetuneConfig
from lm.config.recipes import finetuning_config
from lm.data.examples import Example
from lm.data.image_files import LabeledImages
from lm.evaluation.image_probes import parts_of
from lm.evaluation.probes import Predictions
from lm.evaluation.task_table import TUNED, Examples
from lm.finetuning.finetune import finetune
from lm.finetuning.predict import Predictor, open_predictor, predict, predict_images
from lm.runs.directory import Run, open_run
from lm.training.reporter import NullReporter

# What a row is fine-tuned with if a table names nothing else, whatever the defaults of fine-tuning: older tables and
# files of tasks keep their meaning.
ALWAYS = {"epochs": FinetuneConfig.epochs}


@dataclass(frozen=True)
class Tuner:
    """A ``task_table.Tune``: fine-tunes a row in its own run directory and predicts the test examples."""

    run: Run
    device: torch.device

    def __call__(self, row: str, examples: Examples, seed: int, settings: dict[str, Any], folder: Path) -> Predictions:
        train, validation = examples.parts(seed)
        folder.mkdir(parents=True, exist_ok=True)
        of_images = isinstance(train, LabeledImages)
        files = {name: folder / f"{name}.{'parquet' if of_images else 'jsonl'}" for name in ("train", "validation")}
        for file, part in zip(files.values(), (train, validation), strict=True):
            if isinstance(part, LabeledImages):
                write_images(file, part)
            else:
                write_examples(file, part)
        own = {
            **{name: str(file) for name, file in files.items()},
            "task": examples.task.kind,
            "judged_by": examples.task.judged_by,
            "seed": seed,
            "device": self.device.type,
        }
        done = finetune(
            finetuning_config(self.run.path, self.run.config, {**ALWAYS, **settings, **TUNED[row], **own}),
            folder / "run",
            NullReporter(),
        )
        start = time.perf_counter()
        outputs, cut = predictions_of(open_predictor(done.path, self.device), examples)
        seconds = learning_seconds(done) + time.perf_counter() - start
        note = f"best at step {done.step:,}" + (f"; {cut:,} test examples longer than the context" if cut else "")
        return Predictions(outputs, done.trained_parameters, note, seconds)


def learning_seconds(run: Run) -> float:
    """The seconds of a run's optimizer steps in all its sessions, according to ``metrics.jsonl``.

    With them, those of the way to read pairs that was tried and not kept.
    """
    seconds, before = sum(learning_seconds(open_run(each.parent)) for each in run.path.glob("pairs_*/config.toml")), 0.0
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


def write_images(path: Path, images: LabeledImages) -> None:
    """Write images with their classes as a table of PNG files, which decode to the same pixels."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    schema = pyarrow.schema([("image", pyarrow.binary()), ("label", pyarrow.string())])
    with atomic_file(path) as file, pyarrow.parquet.ParquetWriter(file, schema) as writer:
        written = 0
        for part in parts_of(images):
            files = []
            for pixels in part:
                buffer = io.BytesIO()
                Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0]).save(
                    buffer, "PNG", compress_level=1
                )
                files.append(buffer.getvalue())
            labels = [example.label for example in images[written : written + len(part)]]
            written += len(part)
            writer.write_table(pyarrow.table([files, labels], schema=schema))


def predictions_of(predictor: Predictor, examples: Examples) -> tuple[NDArray[np.float64], int]:
    """Outputs for test examples as in ``probes.Predictions``, and how many of them were longer than the context.

    A class that was not among the training examples of the fine-tuned run has probability 0.
    """
    if isinstance(examples.test, LabeledImages):
        found = [
            (answer, False)
            for answer in predict_images(predictor, (each for part in parts_of(examples.test) for each in part))
        ]
    else:
        found = list(predict(predictor, examples.test))
    cut = sum(was_cut for _, was_cut in found)
    if examples.labels is None:
        return np.array([answer["value"] for answer, _ in found]), cut
    names = examples.labels.names
    return np.array([[answer["probabilities"].get(name, 0.0) for name in names] for answer, _ in found]), cut
