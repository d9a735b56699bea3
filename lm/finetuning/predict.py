"""Answers of a fine-tuned run to new texts, one after the other and none kept, however many there are."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from data_prep.errors import UserError
from data_prep.files import atomic_file
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.data.examples import Example, columns_of, stream_examples
from lm.finetuning.answers import Answers
from lm.finetuning.head_task import encoder_of, outputs_of, task_model
from lm.finetuning.heads import TaskModel, probabilities
from lm.model.lora import merge_lora
from lm.runs.base_weights import starting_trunk
from lm.runs.checkpoint import Checkpoint
from lm.runs.checkpoint_writer import load_trained
from lm.runs.directory import Run, open_run, warn

EXAMPLES_AT_ONCE = 256  # are held, and packed among themselves
Answer = dict[str, Any]


@dataclass(frozen=True)
class Predictor:
    """A run that was fine-tuned for a task with a head, ready to answer."""

    run: Run
    model: TaskModel
    answers: Answers

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def tokenizer(self) -> Tokenizer:
        return self.run.tokenizer


def open_predictor(
    path: str | Path, device: torch.device, which: str = "best", warn: Callable[[str], None] = warn
) -> Predictor:
    """Open a run directory to predict with, at the checkpoint ``which`` (``Run.checkpoint``); LoRA is merged.

    Raises:
        UserError: there is no such run, it is fine-tuned for no task that has answers, or its files do not fit.
    """
    run = open_run(path)
    if not run.config.has_task_head:
        raise UserError(f"{run.path} answers no task: kindling finetune makes a run that does")
    model = load_task_model(run, run.checkpoint(which, warn))
    return Predictor(run, model.to(device).eval(), Answers.load(run.path))


def load_task_model(run: Run, saved: Checkpoint) -> TaskModel:
    """The model of a checkpoint of a run with a task's head, LoRA merged, on the CPU; UserError if it does not fit."""
    run.refuse_another(saved)
    model = task_model(run.config, starting_trunk(run.config, run.path), Answers.load(run.path))
    try:
        load_trained(model, saved.model())
    except RuntimeError as error:
        raise UserError(f"checkpoint {saved.path} does not fit the run directory: {error}") from None
    merge_lora(model.trunk)
    return model


def read_inputs(predictor: Predictor, source: str | Path) -> Iterator[Example]:
    """The examples of a file (``examples.stream_examples``), read from the columns that the run was trained with.

    Raises:
        UserError: as there, or they are not pairs where the run was trained on pairs, or the other way round.
    """
    answers = predictor.answers
    for example in stream_examples(source, predictor.config.finetune.task, columns_of(predictor.config.finetune)):
        if answers.texts and len(example.texts) != answers.texts:
            words = ("one text each", "pairs of texts")
            raise UserError(
                f"{example.place}: {predictor.run.path} was fine-tuned on {words[answers.texts - 1]}, and this holds "
                f"{words[len(example.texts) - 1]}"
            )
        yield example


def predict(predictor: Predictor, examples: Iterable[Example]) -> Iterator[tuple[Answer, bool]]:
    """The answer to each example, in order, and whether the example was longer than the context.

    Classification: ``label`` and the ``probabilities`` of all labels by name. Regression: ``value``. Words: ``labels``,
    and the ``probabilities`` of these. A choice: its number ``choice``, from 0, and the ``probabilities`` of all.
    """
    encoder, rest = encoder_of(predictor.config, predictor.tokenizer), iter(examples)
    while some := list(islice(rest, EXAMPLES_AT_ONCE)):
        encoded = encoder.encode(some)
        found = outputs_of(predictor.model, encoded, predictor.config, predictor.tokenizer)
        for example, outputs in zip(encoded, found, strict=True):
            yield answer(predictor.config.finetune.task, predictor.answers, outputs), example.cut


def answer(kind: str, answers: Answers, outputs: Tensor) -> Answer:
    """What the head's numbers for one example (its items, outputs) say."""
    if kind == "regression":
        return {"value": float(outputs[0, 0].double()) * answers.deviation + answers.mean}
    chances = probabilities(kind, outputs, torch.tensor([len(outputs)]))
    best = chances.argmax(1).tolist()
    if kind == "choice":
        return {"choice": best[0], "probabilities": chances[0].tolist()}
    if kind == "tokens":
        return {"labels": [answers.labels[n] for n in best], "probabilities": chances.max(1).tolist()}
    return {
        "label": answers.labels[best[0]],
        "probabilities": dict(zip(answers.labels, chances[0].tolist(), strict=True)),
    }


def write_answers(found: Iterable[Answer], output: str) -> int:
    """Write answers as they come, to a .jsonl, .csv or .tsv file, or with ``-`` as JSON lines to stdout; their number.

    A file appears when it is complete. In a table each probability has a column, lists are JSON.

    Raises:
        UserError: the name ends otherwise.
    """
    suffix = ".jsonl" if output == "-" else Path(output).suffix
    if suffix not in (".jsonl", ".csv", ".tsv"):
        raise UserError(f"answers are written to .jsonl, .csv or .tsv, or to -, not to {output}")
    opened: AbstractContextManager[IO[bytes]] = (
        nullcontext(sys.stdout.buffer) if output == "-" else atomic_file(Path(output))
    )
    written = 0
    with opened as file:
        for written, each in enumerate(found, 1):
            if suffix == ".jsonl":
                file.write(json.dumps(each, ensure_ascii=False).encode() + b"\n")
                if output == "-" and written % EXAMPLES_AT_ONCE == 0:
                    file.flush()
            else:
                cells = _cells(each)
                if written == 1:
                    file.write(_table_row(list(cells), suffix))
                file.write(_table_row(list(cells.values()), suffix))
        file.flush()
    return written


def _cells(each: Answer) -> dict[str, Any]:
    chances = each.get("probabilities")
    if isinstance(chances, dict):
        named = {f"probability {name}": chance for name, chance in chances.items()}
        return {"label": each["label"], **named}
    return {name: json.dumps(value, ensure_ascii=False) for name, value in each.items()}


def _table_row(cells: list[Any], suffix: str) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="," if suffix == ".csv" else "\t", lineterminator="\n").writerow(cells)
    return text.getvalue().encode()
