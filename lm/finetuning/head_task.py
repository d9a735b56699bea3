"""Tasks with a head: classification, regression, words and choices. The head answers for each item.

``lm.finetuning.image_task`` reads images instead of texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.data.examples import Example
from lm.data.keyed_random import Stream, key
from lm.finetuning.answers import Answers, ChoiceAnswers, NumberAnswers, TagAnswers
from lm.finetuning.heads import ImageTaskModel, ItemBatch, Items, TaskModel, item_batch
from lm.finetuning.metrics import require_libraries
from lm.finetuning.task import Task
from lm.finetuning.task_inputs import EncodedExample, Encoder, in_parts
from lm.model.device import autocast
from lm.model.image_transformer import Model
from lm.training.gradients import accumulated

# Every task of settings.HEAD_TASKS, and what its head's outputs mean.
HEADS: dict[str, type[Answers]] = {
    "classification": Answers,
    "regression": NumberAnswers,
    "tokens": TagAnswers,
    "choice": ChoiceAnswers,
    "image_classification": Answers,
}


@dataclass(frozen=True)
class MicroBatch:
    """Examples of one forward pass; ``targets`` and ``weights`` (targets,), the weights of a whole step add up to 1."""

    batch: Items
    targets: Tensor
    weights: Tensor


class HeadTask(Task):
    """Learns a head, and with it the trunk or its adapter, by the losses of its ``Answers``."""

    train: Sequence[Any]  # EncodedExample, if they are texts
    validation: Sequence[Any]

    def __init__(
        self, config: Config, tokenizer: Tokenizer, train: Sequence[Example], validation: Sequence[Example]
    ) -> None:
        self.tokenizer = tokenizer
        self.read_answers(config, train, validation)
        encoder = encoder_of(config, tokenizer)
        self.train, self.validation = encoder.encode(train), encoder.encode(validation)

    def read_answers(self, config: Config, train: Sequence[Example], validation: Sequence[Example]) -> None:
        """Learn from the training examples what the head's outputs mean, and what is right. UserError as of ``of``."""
        require_libraries()
        self.config, self.kind = config, config.finetune.task
        self.answers = HEADS[self.kind].of(train)
        if config.finetune.head_bias == "false":
            self.answers = self.answers.uncentered()
        self.targets, self.validation_targets = (
            [np.array(self.answers.targets(example)) for example in examples] for examples in (train, validation)
        )

    def introduction(self) -> list[str]:
        task, labels = self.config.finetune, self.answers.labels
        how = "bidirectionally" if task.reads == "bidirectional" else "causally"
        vector = "the mean over its tokens" if task.pooling == "mean" else "that of its last token"
        pairs = f"; pairs are read {task.pairs}" if self.answers.texts == 2 else ""
        names = [f"{len(labels)} labels: {', '.join(labels[:20])}"] if labels else []
        return [f"texts are read {how}, and a text's vector is {vector}{pairs}", *names]

    def save(self, path: Path) -> None:
        self.answers.save(path)

    def model(self, trunk: Model) -> TaskModel:
        return task_model(self.config, trunk, self.answers)

    def batch(self, numbers: NDArray[np.int64], epochs: NDArray[np.int64]) -> list[MicroBatch]:
        chosen = [self.train[n] for n in numbers.tolist()]
        targets = [self.targets[n] for n in numbers.tolist()]
        weights = self._weights(targets)
        weights = weights / weights.sum()
        bounds = np.cumsum([0, *map(len, targets)])
        return [
            MicroBatch(
                self.items(numbers[first:stop], epochs[first:stop]),
                _tensor(targets[first:stop]),
                torch.from_numpy(weights[bounds[first] : bounds[stop]].astype(np.float32)),
            )
            for first, stop in in_parts(chosen, self.config.finetune.micro_batch_tokens)
        ]

    def items(self, numbers: NDArray[np.int64], epochs: NDArray[np.int64]) -> Items:
        """Training examples for one forward pass; arguments as of ``batch``."""
        return pack_items([self.train[n] for n in numbers.tolist()], self.config, self.tokenizer)

    def validation_items(self) -> Iterator[Items]:
        """All validation examples, for one forward pass after another."""
        return batches_of(self.validation, self.config, self.tokenizer)

    def _weights(self, targets: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
        """The weight of each target: 1, or with balanced classes the inverse frequency of its class."""
        if self.config.finetune.class_weights == "none":
            return np.ones(sum(map(len, targets)))
        classes = len(self.answers.labels)
        counts = np.bincount(np.concatenate(self.targets), minlength=classes)
        return (counts.sum() / (classes * counts))[np.concatenate(targets)]

    def gradients(
        self, model: nn.Module, batch: list[MicroBatch], step: int
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        return {self.kind: accumulated(model, batch, self._loss, self.config, step)}, {self.kind: 1.0}

    def _loss(self, model: nn.Module, part: MicroBatch) -> Tensor:
        device = next(model.parameters()).device
        batch, targets, weights = part.batch.to(device), part.targets.to(device), part.weights.to(device)
        with autocast(device, self.config.training.precision, training=True):
            outputs = model(batch)
        smoothing = self.config.finetune.label_smoothing
        return (self.answers.losses(outputs, targets, batch.items, smoothing) * weights).sum()

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        if not self.validation:
            return {"metrics": {}}, None
        assert isinstance(model, TaskModel)
        outputs = list(outputs_of(model, self.validation_items(), self.config))
        together, items = torch.cat(outputs), torch.tensor([len(each) for each in outputs])
        targets = _tensor(self.validation_targets)
        loss = float(self.answers.losses(together, targets, items).mean())
        found = {"loss": loss, **self.answers.metrics(together, targets, items)}
        judged_by = self.config.finetune.judged_by
        if judged_by not in found:
            raise UserError(f"judged_by {judged_by} is not measured for this task: choose one of {', '.join(found)}")
        value = found[judged_by] if judged_by == "loss" else -found[judged_by]
        return {"metrics": found, "examples": len(self.validation)}, value


def _tensor(targets: Sequence[NDArray[Any]]) -> Tensor:
    """Targets of several examples, int64 or float32."""
    tensor = torch.from_numpy(np.concatenate(targets))
    return tensor.float() if tensor.is_floating_point() else tensor


def encoder_of(config: Config, tokenizer: Tokenizer) -> Encoder:
    """The encoder for these settings, in which nothing is "auto"."""
    task = config.finetune
    windows = task.long_texts == "window"
    return Encoder(tokenizer, task.task, config.data.context_length, task.pooling, windows, task.pairs == "apart")


def task_model(config: Config, trunk: Model, answers: Answers) -> TaskModel:
    """The trunk with a head drawn from the seed."""
    apart = config.finetune.pairs == "apart" and answers.texts == 2
    bias = config.finetune.head_bias == "true"
    kind = ImageTaskModel if config.reads_images else TaskModel
    hidden = config.finetune.head_hidden
    model = kind(trunk, answers.outputs, config.model.dropout, pairs=apart, bias=bias, hidden=hidden)
    model.initialize_head(key(config.training.seed, Stream.TASK_HEAD) >> 1)
    return model


def pack_items(examples: Sequence[EncodedExample], config: Config, tokenizer: Tokenizer) -> ItemBatch:
    """Pack examples for these settings, in which nothing is "auto"."""
    return item_batch(examples, config.finetune.reads, tokenizer.end_of_text_id, config.data.context_length)


def batches_of(examples: Sequence[EncodedExample], config: Config, tokenizer: Tokenizer) -> Iterator[ItemBatch]:
    """Pack examples for one forward pass after another, with at most ``micro_batch_tokens`` each."""
    for first, stop in in_parts(examples, config.finetune.micro_batch_tokens):
        yield pack_items(examples[first:stop], config, tokenizer)


@torch.no_grad()
def outputs_of(model: TaskModel, batches: Iterable[Items], config: Config) -> Iterator[Tensor]:
    """The head's outputs for each example in order, float32 (its items, outputs) on the CPU."""
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    for each in batches:
        batch = each.to(device)
        with autocast(device, config.training.precision, training=False):
            outputs = model(batch)
        yield from outputs.cpu().split(batch.items.tolist())
    model.train(was_training)
