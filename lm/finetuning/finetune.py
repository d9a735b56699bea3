"""Fine-tuning, as the work that ``lm.training.trainer`` carries out: a pretrained run learns a task from examples.

    a run's weights (base_weights) -> all, LoRA or the head learn -> a lesson (head_task, …) -> another run

What comes out is a run directory like any other, with exact resume, checkpoints, metrics and early stopping by the same
loop, and the base's weights and tokenizer beside its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError
from data_prep.files import sha256_of_file
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.tokenizer import Tokenizer
from lm import kernels
from lm.config.finetuning_defaults import DEFAULTS, LEARNING_RATES
from lm.config.recipes import load_config
from lm.config.settings import Config, OptimizerConfig, ReportConfig, TrainingConfig
from lm.data import keyed_random
from lm.data.keyed_random import Stream
from lm.finetuning.contrastive_task import ContrastiveTask
from lm.finetuning.head_task import HeadTask, settle_reading
from lm.finetuning.instruction_task import InstructionTask
from lm.finetuning.layer_decay import learning_rates
from lm.model.transformer import Transformer
from lm.runs.base_weights import keep_base, kept_base, starting_trunk
from lm.runs.checkpoint_writer import trained_tensors
from lm.runs.directory import Run, open_run
from lm.runs.metrics_log import Best
from lm.training.distributed import Ranks
from lm.training.reporter import Reporter
from lm.training.trainer import carry_out


class Lesson(Protocol):
    """What is learned, as far as tasks differ; see ``trainer.TrainModule`` for what ``gradients`` and ``validate`` give."""

    fingerprint: str

    @property
    def examples(self) -> int: ...
    @property
    def tokens(self) -> int: ...
    def introduction(self) -> list[str]: ...
    def save(self, path: Path) -> None: ...
    def model(self, trunk: Transformer) -> nn.Module: ...
    def batch(self, numbers: NDArray[np.int64]) -> Any: ...
    def gradients(self, model: nn.Module, batch: Any, step: int) -> tuple[dict[str, Tensor], dict[str, float]]: ...
    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]: ...


def finetune_config(
    run: Run, settings: Mapping[str, Any], recipe: Path | None = None, *, unknown_options: Sequence[str] = ()
) -> Config:
    """The settings of a fine-tuning of ``run``: its shape and way of reading, ``DEFAULTS``, and what is given here.

    Arguments and errors as of ``lm.config.recipes.load_config``; the task must be among the settings.
    """
    start = dataclasses.replace(
        run.config, optimizer=OptimizerConfig(), training=TrainingConfig(), report=ReportConfig()
    ).replace(**DEFAULTS, base=str(run.path))
    given = {"unknown_options": unknown_options}
    method = load_config(recipe, settings, base=start, **given).finetune.method
    return load_config(recipe, settings, base=start.replace(learning_rate=LEARNING_RATES[method]), **given)


@dataclass(frozen=True)
class Finetuned:
    """A fine-tuning that is done: its run, and the best validation (the last one, where it was judged by nothing)."""

    run: Run
    step: int
    metrics: dict[str, float]
    trained_parameters: int


def finetune(config: Config, path: Path, reporter: Reporter, *, accept_changes: bool = False) -> Finetuned:
    """Fine-tune in the run directory ``path``, or go on with the fine-tuning that is there.

    Arguments and errors as of ``lm.training.trainer.train``; ``finetune_config`` makes the settings.
    """
    done = carry_out(
        lambda ranks: Finetuning.open(config, path, ranks),
        config.training,
        path,
        reporter,
        accept_changes=accept_changes,
    )
    run = Run(path, done)
    saved = run.checkpoint("best", lambda _: None)
    metrics: dict[str, float] = {}
    for line in run.metrics():
        if line["step"] == saved.step:
            metrics = line.get("metrics") or line.get("validation", {}).get("response") or metrics
    return Finetuned(run, saved.step, metrics, sum(tensor.numel() for tensor in saved.model().values()))


class Finetuning:
    """The ``lm.training.trainer.TrainModule`` of a fine-tuning in the run directory ``path``."""

    def __init__(
        self, config: Config, path: Path, ranks: Ranks, lesson: Lesson, tokenizer: Tokenizer, weights: Path
    ) -> None:
        self.path, self.ranks, self.lesson, self.tokenizer, self.weights = path, ranks, lesson, tokenizer, weights
        self.config, self.name = config, config.finetune.train
        self.fingerprint = hashlib.sha256(f"{lesson.fingerprint} {sha256_of_file(weights)}".encode()).hexdigest()

    @classmethod
    def open(cls, config: Config, path: Path, ranks: Ranks) -> Finetuning:
        """Read the examples and find the weights; ``path`` is the run directory.

        Raises:
            UserError: an example, a setting or the base run is not as it should be.
        """
        if not config.is_finetuning:
            raise UserError("name a task: --task classification, say")
        if not config.finetune.train:
            raise UserError("name the examples to learn from: --train FILE")
        if ranks.world > 1:
            raise UserError("fine-tuning runs in one process: start finetune.py without torchrun")
        weights, own = kept_base(path), path / "tokenizer.json"
        if weights and own.is_file():
            tokenizer = load_tokenizer(own)
        else:
            base = open_run(config.finetune.base)
            tokenizer, weights = base.tokenizer, weights or base.plain_weights()
        config = settle_reading(config)
        lesson: Lesson
        if config.finetune.task == "instruction":
            lesson = InstructionTask(config, tokenizer)
        elif config.finetune.task == "contrastive":
            lesson = ContrastiveTask(config, tokenizer)
        else:
            lesson = HeadTask(config, tokenizer)
        return cls(settle_steps(config, lesson.examples), path, ranks, lesson, tokenizer, weights)

    def prepare(self, done: int) -> list[str]:
        keep_base(self.weights, self.path)
        self.lesson.save(self.path)
        model, task, training = self.model(), self.config.finetune, self.config.training
        learn = sum(tensor.numel() for tensor in trained_tensors(model).values())
        whole = sum(parameter.numel() for parameter in model.parameters())
        begun = f"the weights of {task.base}" if task.weights == "pretrained" else "random weights"
        return [
            f"{task.task} from {begun}: {learn / 1e6:.3f}M of {whole / 1e6:.2f}M parameters learn ({task.method})",
            *self.lesson.introduction(),
            f"{training.steps:,} steps x {task.batch_examples} examples = {self.epochs(training.steps):.2f} epochs",
            f"on {self.ranks.device.type.upper()}; {kernels.describe(self.ranks.device)}",
        ]

    def model(self) -> nn.Module:
        return self.lesson.model(starting_trunk(self.config, self.path))

    def lr_multipliers(self, model: nn.Module) -> dict[str, float]:
        return learning_rates(self.config, list(trained_tensors(model)))

    def batch(self, step: int) -> Any:
        """The examples of a step: each epoch has all of them in an order of its own."""
        count = self.config.finetune.batch_examples
        epochs, turns = np.divmod(np.arange(step * count, (step + 1) * count), self.lesson.examples)
        numbers = np.empty_like(turns)
        for epoch in np.unique(epochs).tolist():
            of_epoch = epochs == epoch
            seed = keyed_random.key(self.config.training.seed, Stream.EXAMPLE_ORDER, epoch)
            numbers[of_epoch] = keyed_random.permuted(turns[of_epoch], self.lesson.examples, seed)
        return self.lesson.batch(numbers)

    def gradients(self, model: nn.Module, batch: Any, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        return self.lesson.gradients(model, batch, step)

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        return self.lesson.validate(model)

    def remark(self, best: Best) -> str:
        if not self.should_stop(best):
            return ""
        return (
            f"{best.worse} validations in a row were no better than that of step {best.step:,}, whose weights are kept"
        )

    def should_stop(self, best: Best) -> bool:
        return 0 < self.config.finetune.patience <= best.worse

    def epochs(self, steps: int) -> float:
        return steps * self.config.finetune.batch_examples / self.lesson.examples

    def progress(self, steps: int) -> dict[str, float]:
        epochs = self.epochs(steps)
        return {"tokens": round(epochs * self.lesson.tokens), "epoch": round(epochs, 6)}

    def throughput(self, seconds_per_step: float) -> dict[str, float]:
        return {"tokens_per_second": round(self.epochs(1) * self.lesson.tokens / seconds_per_step, 1)}


def settle_steps(config: Config, examples: int) -> Config:
    """The settings with the steps that the epochs take, and those between validations."""
    task = config.finetune
    per_epoch = examples / task.batch_examples
    steps = max(1, math.ceil(task.epochs * per_epoch))
    between = math.ceil(per_epoch / task.validations_per_epoch)
    return config.replace(steps=steps, validate_every=min(between, steps))
