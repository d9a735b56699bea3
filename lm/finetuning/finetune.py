"""Fine-tuning, as a ``TrainModule`` for ``lm.training.trainer``: a pretrained run learns a task from examples.

    a run's weights (base_weights) → full, LoRA or probe → a task (head_task, …) → another run

The result is a run directory like any other, with the same loop, exact resume, checkpoints, metrics and early stopping,
and with the base's weights and tokenizer in it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.errors.command_names import command
from data_prep.files import sha256_of_file
from lm import kernels
from lm.config.finetune_settings import EPOCHS, FEW_EXAMPLES, HEAD_TASKS, IMAGE_TASKS, MORE_EPOCHS
from lm.config.recipes import require_examples
from lm.config.settings import Config
from lm.data.examples import Example, content_hash, read_task
from lm.data.image_files import read_image_task
from lm.data.keyed_random import Stream, key, permuted
from lm.finetuning.answers import labels_of
from lm.finetuning.contrastive_task import ContrastiveTask
from lm.finetuning.head_task import HeadTask
from lm.finetuning.image_task import ImageTask
from lm.finetuning.instruction_task import InstructionTask, settle_template
from lm.finetuning.task import Task
from lm.inference.embedding import reading_of
from lm.runs.base_weights import keep_base, kept_base, starting_trunk
from lm.runs.checkpoint_writer import trained_tensors
from lm.runs.companions import copy_companions
from lm.runs.directory import PROCESSOR, TOKENIZER, Run, adopt, open_run
from lm.runs.metrics_log import Best, metrics_at
from lm.runs.resume import refuse_other_directories
from lm.training.distributed import Ranks
from lm.training.learning_rates import lr_multipliers
from lm.training.reporter import Reporter
from lm.training.train_module import TrainModule
from lm.training.trainer import fit

# Every task of settings.TASKS, and the class that learns it.
TASKS: dict[str, type[Task]] = {
    **dict.fromkeys(HEAD_TASKS, HeadTask),
    "instruction": InstructionTask,
    "contrastive": ContrastiveTask,
    **dict.fromkeys(IMAGE_TASKS, ImageTask),
}


# Settings that a run decides at its start, and the value that leaves them open.
LEFT_OPEN = {"head_bias": "auto", "template_tokens": "auto", "epochs": 0}


@dataclass(frozen=True)
class Finetuned(Run):
    """A finished fine-tuning.

    ``step`` is that of the best validation, ``scores`` are its metrics; without validation examples it is the last.
    """

    step: int
    scores: dict[str, float]
    trained_parameters: int


def finetune(config: Config, path: Path, reporter: Reporter, *, accept_changes: bool = False) -> Finetuned:
    """Fine-tune in the run directory ``path``, or resume the fine-tuning that is there.

    Arguments and errors as of ``lm.training.pretraining.train``; ``finetuning_config`` makes the settings.
    """
    if config.finetune.pairs == "auto":
        learn = partial(finetune, reporter=reporter, accept_changes=accept_changes)
        config = settle_pairs(config, path, learn, reporter.note)
    done = fit(partial(Finetuning, config, path), config.training, path, reporter, accept_changes=accept_changes)
    run = Run(path, done)
    saved = run.checkpoint("best", lambda _: None)
    metrics = metrics_at(run.metrics(), saved.step, averaged=saved.is_average)
    return Finetuned(path, done, saved.step, metrics, sum(tensor.numel() for tensor in saved.model().values()))


WAYS = {"apart": "pairs_apart", "together": "pairs_together"}  # to read pairs, and the folder of a trial


def settle_pairs(
    config: Config, path: Path, learn: Callable[[Config, Path], Finetuned], note: Callable[[str], None]
) -> Config:
    """Choose between the two ways to read pairs by validation; return the settings with the better one.

    ``learn`` fine-tunes both, each in a folder of its own in ``path``, which then becomes the better run; the other
    folder stays. A run that is there keeps its way. What is no task on pairs is read apart, which makes no difference.

    Raises:
        UserError: as of ``finetune``, or there are no validation examples.
    """
    if (path / "config.toml").exists():
        return config.replace(pairs=open_run(path).config.finetune.pairs)
    task = config.finetune
    if task.task not in ("classification", "regression") or len(read_task(task)[0][0].texts) == 1:
        return config.replace(pairs="apart")
    if not task.validation:
        raise UserError("pairs auto chooses by validation: add --validation FILE, or choose apart or together")
    refuse_other_directories(path, WAYS.values())
    done = {way: learn(config.replace(pairs=way), path / folder) for way, folder in WAYS.items()}
    metric = done["apart"].config.finetune.judged_by
    value = {way: run.scores[metric] for way, run in done.items()}
    better = (min if metric == "loss" else max)(value, key=lambda way: value[way])
    scores = ", ".join(f"{metric} {each:.4f} if they are read {way}" for way, each in value.items())
    note(f"pairs: {scores}; {path} reads them {better}")
    adopt(path / WAYS[better], path)
    return config.replace(pairs=better)


class Finetuning(TrainModule[Any]):
    """A fine-tuning in the run directory ``path``."""

    def __init__(self, config: Config, path: Path, ranks: Ranks) -> None:
        """Read the examples and find the base's weights. UserError if an example, a setting or the base is invalid."""
        require_examples(config)
        if ranks.world > 1:
            raise UserError(f"fine-tuning runs in one process: start {command('finetune')} without torchrun")
        weights, own = kept_base(path), path / (PROCESSOR if config.reads_images else TOKENIZER)
        start = Run(path, config) if weights and own.is_file() else open_run(config.finetune.base)
        train, validation = examples_of(config, start, labels_of(path))
        weights = weights or start.plain_weights(config.finetune.checkpoint)
        processor = start.image_format if config.reads_images else start.tokenizer
        if (path / "config.toml").exists() and (run := open_run(path)).latest(lambda _: None):
            asked, kept = config.finetune, run.config.finetune  # a resumed run keeps what it has
            config = config.replace(
                **{name: getattr(kept, name) for name, open in LEFT_OPEN.items() if getattr(asked, name) == open}
            )
        self.config = settle_steps(settle_reading(config), len(train))
        if not config.reads_images:
            self.config = settle_template(self.config, start.tokenizer)
        self.path, self.ranks, self.weights = path, ranks, weights
        self.name, self.processor = config.finetune.train, processor
        self.task = TASKS[config.finetune.task](self.config, processor, train, validation)
        self.examples, self.tokens = len(train), sum(example.tokens for example in self.task.train)
        hashed = content_hash([*train, *(Example((text,), None, "") for text in self.task.hashed_texts)])
        self.fingerprint = hashlib.sha256(f"{hashed} {sha256_of_file(weights)}".encode()).hexdigest()

    def prepare(self, done: int) -> list[str]:
        keep_base(self.weights, self.path)
        self.task.save(self.path)
        copy_companions(Path(self.config.finetune.base), self.path)
        model, task, training = self.model(), self.config.finetune, self.config.training
        trained = sum(tensor.numel() for tensor in trained_tensors(model).values())
        total = sum(parameter.numel() for parameter in model.parameters())
        start = f"the weights of {task.base}" if task.weights == "pretrained" else "random weights"
        return [
            f"{task.task} from {start}: training {trained / 1e6:.3f}M of {total / 1e6:.2f}M parameters ({task.method})",
            *(self._size(part) for part in ("training", "validation")),
            *self.task.introduction(),
            f"{training.steps:,} steps x {task.batch_examples} examples = {self._passes()}",
            f"on {self.ranks.device.type.upper()}; {kernels.describe(self.ranks.device)}",
        ]

    def _passes(self) -> str:
        wanted, passes = self.config.finetune.epochs, self.epochs(self.config.training.steps)
        rounded = "" if math.isclose(wanted, passes) else f" ({wanted:g}, rounded up to whole steps)"
        return f"{passes:.2f} epochs{rounded}"

    def _size(self, part: str) -> str:
        """How many training or validation examples there are, and how many of them the context does not hold."""
        examples = self.task.train if part == "training" else self.task.validation
        cut = sum(example.cut for example in examples)
        how = "split into windows" if self.config.finetune.long_texts == "window" else "truncated"
        what = f"{len(examples):,} {part} example" + ("" if len(examples) == 1 else "s")
        return what + (f", {cut:,} longer than the context and {how}" if cut else "")

    def model(self) -> nn.Module:
        return self.task.model(starting_trunk(self.config, self.path))

    def lr_multipliers(self, model: nn.Module) -> dict[str, float]:
        return lr_multipliers(self.config, list(trained_tensors(model)))

    def batch(self, step: int) -> Any:
        """The examples of a step; each epoch goes through all of them in a new order."""
        count = self.config.finetune.batch_examples
        epochs, indices = np.divmod(np.arange(step * count, (step + 1) * count), self.examples)
        numbers = np.empty_like(indices)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            seed = key(self.config.training.seed, Stream.EXAMPLE_ORDER, epoch)
            numbers[of_epoch] = permuted(indices[of_epoch], self.examples, seed)
        return self.task.batch(numbers, epochs)

    def gradients(self, model: nn.Module, batch: Any, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        return self.task.gradients(model, batch, step)

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        return self.task.validate(model)

    def remark(self, step: int, line: dict[str, Any], best: Best) -> str:
        sentence = f"{best.worse} validations in a row without improvement; step {best.step:,} was the best"
        return f"stopping early: {sentence}" if self.should_stop(best) else ""

    def should_stop(self, best: Best) -> bool:
        return 0 < self.config.finetune.patience <= best.worse

    def epochs(self, steps: int) -> float:
        return steps * self.config.finetune.batch_examples / self.examples

    def progress(self, steps: int) -> dict[str, float]:
        epochs = self.epochs(steps)
        return {"tokens": round(epochs * self.tokens), "epoch": round(epochs, 6)}

    def throughput(self, seconds_per_step: float) -> dict[str, float]:
        return {"tokens_per_second": round(self.epochs(1) * self.tokens / seconds_per_step, 1)}


def examples_of(config: Config, base: Run, kept: Collection[str]) -> tuple[Sequence[Example], Sequence[Example]]:
    """The training and validation examples of the settings, of texts or images, as the run ``base`` reads them."""
    if config.reads_images:
        return read_image_task(config.finetune, base.image_format, kept)
    return read_task(config.finetune, kept)


def settle_reading(config: Config) -> Config:
    """Replace "auto" in ``reads``, ``pooling``, ``head_bias`` and ``judged_by`` by what it stands for."""
    task = config.finetune
    reading = reading_of(config, "causal" if task.task == "instruction" and task.reads == "auto" else None)
    metric = {"regression": "spearman", "contrastive": "spearman", "instruction": "loss"}.get(task.task, "accuracy")
    judged_by = metric if task.judged_by == "auto" else task.judged_by
    without = task.task == "classification" and (reading.reads, reading.pooling) == ("causal", "last")
    bias = ("false" if without else "true") if task.head_bias == "auto" else task.head_bias
    return config.replace(reads=reading.reads, pooling=reading.pooling, head_bias=bias, judged_by=judged_by)


def settle_steps(config: Config, examples: int) -> Config:
    """Set the epochs if they are 0, the number of steps from them, and the steps between validations."""
    if not config.finetune.epochs:
        more = examples < FEW_EXAMPLES and config.has_task_head and not config.reads_images
        config = config.replace(epochs=MORE_EPOCHS if more else EPOCHS)
    task = config.finetune
    per_epoch = examples / task.batch_examples
    steps = max(1, math.ceil(task.epochs * per_epoch))
    between = math.ceil(per_epoch / task.validations_per_epoch)
    return config.replace(steps=steps, validate_every=min(between, steps))
