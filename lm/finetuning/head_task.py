"""What is learned from a task's examples: the lessons of ``finetune``, for tasks with a head of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config, usual_pooling, usual_reading
from lm.data import keyed_random
from lm.data.examples import columns_of, content_hash, read_examples
from lm.data.keyed_random import Stream
from lm.finetuning import heads, metrics
from lm.finetuning.answers import Answers
from lm.finetuning.heads import ItemBatch, TaskModel, item_batch
from lm.finetuning.task_inputs import Encoded, Encoder, in_parts
from lm.model.device import autocast
from lm.model.transformer import Transformer
from lm.training.gradients import accumulated


def settle_reading(config: Config) -> Config:
    """The settings with the ways of reading and pooling, and the metric, decided where they are left open ("auto")."""
    task = config.finetune
    usual = "causal" if task.task == "instruction" else usual_reading(config)
    reads = usual if task.reads == "auto" else task.reads
    pooling = usual_pooling(reads) if task.pooling == "auto" else task.pooling
    metric = {"regression": "spearman", "contrastive": "spearman", "instruction": "loss"}.get(task.task, "accuracy")
    judged_by = metric if task.judged_by == "auto" else task.judged_by
    return config.replace(reads=reads, pooling=pooling, judged_by=judged_by)


@dataclass(frozen=True)
class Part:
    """Examples of one forward pass; ``labels`` and ``weights`` (labels,), the weights of a whole step add up to 1."""

    batch: ItemBatch
    labels: Tensor
    weights: Tensor


class HeadTask:
    """Classification, regression, words and choices: a head answers for each item."""

    def __init__(self, config: Config, tokenizer: Tokenizer) -> None:
        task = config.finetune
        metrics.require_libraries()
        self.config, self.kind, self.tokenizer = config, task.task, tokenizer
        read = [
            read_examples(file, self.kind, columns_of(task)) if file else [] for file in (task.train, task.validation)
        ]
        self.answers = Answers.of(self.kind, read[0])
        self.fingerprint = content_hash(read[0])
        encoder = encoder_of(config, tokenizer)
        self.train, self.validation = (encoder.encode(examples) for examples in read)
        self.labels, self.validation_labels = (
            [self.answers.numbers(self.kind, example) for example in examples] for examples in read
        )
        self.class_weights = self._class_weights()

    @property
    def examples(self) -> int:
        return len(self.train)

    @property
    def tokens(self) -> int:
        return sum(example.tokens for example in self.train)

    def _class_weights(self) -> NDArray[np.float64]:
        """Of each class: 1, or what makes all classes count alike."""
        classes = len(self.answers.labels)
        if self.config.finetune.class_weights == "none" or not classes:
            return np.ones(max(classes, 1))
        counts = np.bincount(np.concatenate(self.labels), minlength=classes)
        return counts.sum() / (classes * counts)

    def introduction(self) -> list[str]:
        told = []
        for name, encoded in (("training", self.train), ("validation", self.validation)):
            cut = sum(example.cut for example in encoded)
            how = "read in windows" if self.config.finetune.long_texts == "window" else "truncated"
            more = f", {cut:,} of them longer than the context and {how}" if cut else ""
            told.append(f"{len(encoded):,} {name} examples{more}")
        task = self.config.finetune
        told.append(
            f"texts are read {'both ways' if task.reads == 'bidirectional' else 'causally'}; a text is "
            f"{'the mean of its tokens' if task.pooling == 'mean' else 'its last token'}"
            f"{f', and pairs are read {task.pairs}' if self.answers.texts == 2 else ''}"
        )
        if self.answers.labels:
            told.append(f"{len(self.answers.labels)} labels: {', '.join(self.answers.labels[:20])}")
        return told

    def save(self, path: Path) -> None:
        self.answers.save(path)

    def model(self, trunk: Transformer) -> TaskModel:
        return task_model(self.config, trunk, self.answers)

    def batch(self, numbers: NDArray[np.int64]) -> list[Part]:
        chosen = [self.train[n] for n in numbers.tolist()]
        labels = [np.array(self.labels[n]) for n in numbers.tolist()]
        of_class = self.class_weights[np.concatenate(labels)] if self.answers.labels else None
        weights = np.ones(sum(map(len, labels))) if of_class is None else of_class
        weights = weights / weights.sum()
        bounds = np.cumsum([0, *map(len, labels)])
        parts = []
        for first, stop in in_parts(chosen, self.config.finetune.micro_batch_tokens):
            wanted = torch.from_numpy(np.concatenate(labels[first:stop]))
            parts.append(
                Part(
                    pack_items(chosen[first:stop], self.config, self.tokenizer),
                    wanted.float() if self.kind == "regression" else wanted.long(),
                    torch.from_numpy(weights[bounds[first] : bounds[stop]].astype(np.float32)),
                )
            )
        return parts

    def gradients(self, model: nn.Module, batch: list[Part], step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        return {self.kind: accumulated(model, batch, self._loss, self.config, step)}, {self.kind: 1.0}

    def _loss(self, model: nn.Module, part: Part) -> Tensor:
        device = next(model.parameters()).device
        batch, labels, weights = part.batch.to(device), part.labels.to(device), part.weights.to(device)
        with autocast(device, self.config.training.precision):
            outputs = model(batch)
        smoothing = self.config.finetune.label_smoothing
        return (heads.losses(self.kind, outputs, labels, batch.items, smoothing) * weights).sum()

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        if not self.validation:
            return {"metrics": {}}, None
        assert isinstance(model, TaskModel)
        found = list(outputs_of(model, self.validation, self.config, self.tokenizer))
        metrics = measure(self.kind, self.answers, found, self.validation_labels)
        judged_by = self.config.finetune.judged_by
        if judged_by not in metrics:
            raise UserError(f"judged_by {judged_by} is not measured here: choose one of {', '.join(metrics)}")
        value = metrics[judged_by] if judged_by == "loss" else -metrics[judged_by]
        return {"metrics": metrics, "examples": len(self.validation)}, value


def encoder_of(config: Config, tokenizer: Tokenizer) -> Encoder:
    """How the settings, settled, have examples read."""
    task = config.finetune
    windows = task.long_texts == "window"
    return Encoder(tokenizer, task.task, config.data.context_length, task.pooling, windows, task.pairs == "apart")


def task_model(config: Config, trunk: Transformer, answers: Answers) -> TaskModel:
    """The trunk with a head drawn from the seed."""
    apart = config.finetune.pairs == "apart" and answers.texts == 2
    model = TaskModel(trunk, answers.outputs, config.model.dropout, pairs=apart)
    model.initialise_head(keyed_random.key(config.training.seed, Stream.TASK_HEAD) >> 1)
    return model


def pack_items(examples: Sequence[Encoded], config: Config, tokenizer: Tokenizer) -> ItemBatch:
    """Examples packed as the settings, settled, have them read."""
    return item_batch(examples, config.finetune.reads, tokenizer.end_of_text_id, config.data.context_length)


@torch.no_grad()
def outputs_of(model: TaskModel, examples: Sequence[Encoded], config: Config, tokenizer: Tokenizer) -> Iterator[Tensor]:
    """The head's numbers for each example, float32 (its items, outputs) on the CPU, in order."""
    device = model.head.weight.device
    was_training = model.training
    model.eval()
    for first, stop in in_parts(examples, config.finetune.micro_batch_tokens):
        batch = pack_items(examples[first:stop], config, tokenizer).to(device)
        with autocast(device, config.training.precision):
            outputs = model(batch)
        yield from outputs.cpu().split(batch.items.tolist())
    model.train(was_training)


def measure(
    kind: str, answers: Answers, outputs: Sequence[Tensor], labels: Sequence[Sequence[float]]
) -> dict[str, float]:
    """Metrics of answers: ``outputs`` of each example as ``outputs_of`` gives them, and its ``labels``; and the loss.

    A choice has accuracy only, words are counted one by one.
    """
    together = torch.cat(list(outputs))
    items = torch.tensor([len(each) for each in outputs])
    wanted = torch.tensor([label for of_example in labels for label in of_example])
    cost = heads.losses(kind, together, wanted.float() if kind == "regression" else wanted, items)
    truth = wanted.numpy()
    if kind == "regression":
        found = metrics.regression_metrics(truth.astype(np.float64), together[:, 0].double().numpy())
    elif kind == "choice":
        chosen = heads.by_example(together[:, 0], items).argmax(1).numpy()
        found = {"accuracy": float((chosen == truth).mean())}
    else:
        found = metrics.classification_metrics(truth, together.argmax(1).numpy(), len(answers.labels))
    return {"loss": float(cost.mean()), **found}
