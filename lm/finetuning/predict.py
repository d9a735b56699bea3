"""Stream the answers of a fine-tuned run to new texts or images."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from data_prep.errors import UserError
from data_prep.files import atomic_file, output_ending
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.recipes import require_task_head
from lm.config.settings import ANSWER_FILES, Config
from lm.data.examples import Example, columns_of, stream_examples
from lm.export.task_model import TaskHead
from lm.finetuning.answers import Answer, Answers
from lm.finetuning.head_task import HEADS, batches_of, encoder_of, outputs_of, task_model
from lm.finetuning.heads import ImageItems, TaskModel
from lm.model.lora import merge_lora
from lm.runs.base_weights import starting_trunk
from lm.runs.checkpoint import Checkpoint
from lm.runs.checkpoint_writer import load_trained
from lm.runs.directory import Run, open_run, warn

EXAMPLES_AT_ONCE = 256  # are in memory, and packed together


@dataclass(frozen=True)
class Predictor:
    """A run that was fine-tuned on a task with a head, ready to predict."""

    run: Run
    model: TaskModel
    answers: Answers
    saved: Checkpoint

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def exportable_head(self) -> TaskHead:
        """The head as ``lm.export`` takes it: its outputs are classes' logits, or a regression's values."""
        head, answers, task = self.model.head, self.answers, self.config.finetune
        weight = head.weight.detach().cpu().double() * answers.deviation
        bias = torch.zeros(len(weight)) if head.bias is None else head.bias.detach().cpu()
        bias = bias.double() * answers.deviation + answers.mean
        labels = answers.labels or ("value" if task.task == "regression" else "score",)
        texts = 2 if task.task == "choice" else answers.texts or 1
        layer = self.model.hidden
        hidden = None if layer is None else (layer.weight.detach().cpu().float(), layer.bias.detach().cpu().float())
        return TaskHead(weight.float(), bias.float(), labels, texts, self.model.pairs, hidden)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.run.tokenizer


def open_predictor(
    path: str | Path, device: torch.device, which: str = "best", warn: Callable[[str], None] = warn
) -> Predictor:
    """Open a run directory for prediction, at the checkpoint ``which`` (``Run.checkpoint``), with LoRA merged.

    Raise UserError if there is no such run, it was not fine-tuned on a task with a head, or its files do not match.
    """
    run = open_run(path)
    require_task_head(run.path, run.config)
    saved = run.checkpoint(which, warn)
    model, answers = load_task_model(run, saved)
    return Predictor(run, model.to(device).eval(), answers, saved)


def load_task_model(run: Run, saved: Checkpoint) -> tuple[TaskModel, Answers]:
    """The model of a checkpoint with a task's head, with LoRA merged, on the CPU, and what the head's outputs mean.

    Raise UserError if a file cannot be read, or the checkpoint does not match the run.
    """
    run.refuse_another(saved)
    answers = HEADS[run.config.finetune.task].load(run.path)
    model = task_model(run.config, starting_trunk(run.config, run.path), answers)
    try:
        load_trained(model, saved.model())
    except RuntimeError as error:
        raise UserError(f"checkpoint {saved.path} does not match the run directory: {error}") from None
    merge_lora(model.trunk)
    return model, answers


def read_inputs(predictor: Predictor, source: str | Path, columns: Mapping[str, Any] = {}) -> Iterator[Example]:
    """Stream the examples of a file (``examples.stream_examples``).

    Columns are named as in the run's training, but for those in ``columns``: settings such as ``text_column``.

    Raise UserError as there, or if the run was trained on pairs and these are single texts, or vice versa.
    """
    task, texts = predictor.config.finetune, predictor.answers.texts
    for example in stream_examples(source, task.task, columns_of(replace(task, **columns))):
        if texts and len(example.texts) != texts:
            learned, given = (("single texts", "pairs of texts")[n - 1] for n in (texts, len(example.texts)))
            raise UserError(f"{example.place}: {predictor.run.path} was fine-tuned on {learned}, but these are {given}")
        yield example


def parts_of(task: str, example: Example) -> dict[str, Any]:
    """The texts of an example by the usual names of their columns."""
    if task == "tokens":
        return {"words": list(example.texts)}
    if task == "choice":
        return {"text": example.texts[0], "choices": list(example.texts[1:])}
    return dict(zip(("text", "text_pair"), example.texts, strict=False))


def predict(predictor: Predictor, examples: Iterable[Example]) -> Iterator[tuple[Answer, bool]]:
    """Yield the answer to each example, in order, and whether the example was longer than the context.

    An answer is a JSON object: for classes the ``label`` and the ``probabilities`` of all labels, for a regression the
    ``value``, for words the ``labels`` and the ``probabilities`` of these, for choices the ``choice``, from 0, and the
    ``probabilities`` of all choices.
    """
    encoder, rest = encoder_of(predictor.config, predictor.tokenizer), iter(examples)
    while some := list(islice(rest, EXAMPLES_AT_ONCE)):
        encoded = encoder.encode(some)
        batches = batches_of(encoded, predictor.config, predictor.tokenizer)
        found = outputs_of(predictor.model, batches, predictor.config)
        for example, outputs in zip(encoded, found, strict=True):
            yield predictor.answers.answer(outputs), example.cut


def predict_images(predictor: Predictor, images: Iterable[NDArray[np.uint8]]) -> Iterator[Answer]:
    """Yield the answer to each image, uint8 (size, size, channels), in order."""
    form, config, rest = predictor.run.image_format, predictor.config, iter(images)
    rows = max(1, config.finetune.micro_batch_tokens // config.model.patches)
    while some := list(islice(rest, rows)):
        items = ImageItems(torch.from_numpy(np.stack(some)), form)
        for outputs in outputs_of(predictor.model, [items], config):
            yield predictor.answers.answer(outputs)


def write_answers(found: Iterable[Answer], output: str) -> int:
    """Stream answers to a .jsonl, .csv or .tsv file, or with ``-`` as JSON lines to stdout; return how many.

    A file appears only when it is complete. Numbers have six significant digits. In a table each probability has its
    own column; lists are JSON. Raise UserError if the output is of another kind.
    """
    suffix, written = output_ending(output, ANSWER_FILES), 0
    with nullcontext(sys.stdout.buffer) if output == "-" else atomic_file(Path(output)) as file:
        for written, each in enumerate(found, 1):
            file.write(_lines(each, suffix, header=written == 1).encode())
            if output == "-" and written % EXAMPLES_AT_ONCE == 0:
                file.flush()
        file.flush()
    return written


def _rounded(value: Any) -> Any:
    """The value with each float in it rounded to six significant digits, about what float32 holds."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _lines(each: Answer, suffix: str, *, header: bool) -> str:
    """An answer as a line of JSON, or as a row of a table, the first one after the ``header``."""
    each = {name: _rounded(value) for name, value in each.items()}
    if suffix == ".jsonl":
        return json.dumps(each, ensure_ascii=False) + "\n"
    cells = {n: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for n, value in each.items()}
    if isinstance(chances := each.get("probabilities"), dict):
        del cells["probabilities"]
        cells |= {f"probability {name}": chance for name, chance in chances.items()}
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(cells), delimiter="," if suffix == ".csv" else "\t", lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerow(cells)
    return text.getvalue()
