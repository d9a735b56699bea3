"""Pretraining: learn an objective from corpora of tokens."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from data_prep.errors import StoreError, UserError
from lm.config.recipes import load_config
from lm.config.settings import Config
from lm.data.corpora import Corpora
from lm.data.datasets import open_training_data, settled
from lm.data.image_corpora import ImageCorpora
from lm.model.device import uses_bfloat16
from lm.model.image_transformer import Model
from lm.objectives.batches import TrainingBatches
from lm.objectives.objective import Objective
from lm.runs.base_weights import keep_base, kept_base, load_base
from lm.runs.companions import copy_companions
from lm.runs.directory import Processor, Run, open_run
from lm.runs.metrics_log import OVERFITTING, Best, loss_of_readouts
from lm.runs.run_data import open_data
from lm.training.distributed import Ranks
from lm.training.gradients import step_gradients
from lm.training.learning_rates import lr_multipliers
from lm.training.plan import FEWEST_STEPS, describe_data, make_plan, settle_micro_batch
from lm.training.reporter import Reporter
from lm.training.train_module import TrainModule
from lm.training.trainer import fit
from lm.training.validation import rows_of_validation, validate_readouts


class Pretraining(TrainModule[Any]):
    """The ``TrainModule`` of pretraining, for the run ``path``.

    ``may_shrink``: the micro-batch is not a setting of the user's, so it may be made smaller if memory runs out.
    """

    def __init__(
        self, config: Config, path: Path, corpora: Corpora | ImageCorpora, ranks: Ranks, *, may_shrink: bool = False
    ) -> None:
        self.config, self.path, self.corpora, self.ranks, self.may_shrink = config, path, corpora, ranks, may_shrink
        self.collapsed = ""  # what to say about a collapse, until the model recovers
        self.start: Path | None = None  # the initial weights, if they are another run's
        self.batches = TrainingBatches(corpora, config)
        self.objective: Objective = self.batches.objective
        self.batches.check_ranks(ranks.world)
        self.name, self.fingerprint = corpora.name, corpora.fingerprint
        self.processor: Processor = corpora.processor

    @classmethod
    def open(cls, config: Config, path: Path, ranks: Ranks) -> Pretraining:
        """Open the data and decide, for all ranks, what the settings leave open; ``path`` is the run directory.

        Raises:
            UserError: the data is missing or damaged, or does not fit the settings.
        """
        if config.training.compile and ranks.world > 1:
            raise UserError("several processes train without compiling: leave out --compile")
        try:
            corpora = open_training_data(config.data.data, config.data.access)
        except StoreError:
            raise
        except UserError:
            if not any(config.data.data) or not (path / "config.toml").is_file():
                raise
            corpora = open_data(Run(path, config))
        if config.data.verify_data:
            ranks.on_main(corpora.verify)
        before = load_config(path / "config.toml") if (path / "config.toml").is_file() else None
        config = ranks.on_main(partial(settled, config, corpora, before))
        may_shrink = not config.data.micro_batch_rows and ranks.world == 1
        module = cls(config, path, corpora, ranks, may_shrink=may_shrink)
        if config.training.init_from:
            module.start = ranks.on_main(module._find_start)
        module.config = ranks.on_main(partial(settle_micro_batch, config, ranks.device, before))
        return module

    def _find_start(self) -> Path:
        """The initial weights. UserError if their run has another shape or tokenizer."""
        if kept := kept_base(self.path):
            return kept
        start = open_run(self.config.training.init_from)
        ours, theirs = (
            dataclasses.replace(c.model, dropout=0.0, residual_precision="float32") for c in (self.config, start.config)
        )
        if ours != theirs:
            raise UserError(f"{start.path} has a model of another shape: without a recipe, its shape is used")
        if start.processor.sha256 != self.processor.sha256:
            if self.config.reads_images:
                raise UserError(f"{self.name} has images of another format than {start.path} was trained on")
            raise UserError(
                f"{self.name} was made with another tokenizer than {start.path}: "
                f"prepare it with --tokenizer {start.path}/tokenizer.json"
            )
        return start.plain_weights()

    def prepare(self, done: int) -> list[str]:
        """Plan the run by a dry step, with fewer rows at a time if memory runs out."""
        lines, training, asked = [], self.config.training, self.config
        if self.start:
            lines.append(f"starting from the weights of {training.init_from}")
            self.ranks.on_main(partial(keep_base, self.start, self.path))
            self.ranks.on_main(partial(copy_companions, Path(training.init_from), self.path))
        one_model = self.ranks.world == 1 or training.parallel == "ddp"
        model = self.objective.new_model().initialize(training.seed, output_init=training.output_init)
        if one_model:  # otherwise it may be too large for the device
            model.to(self.ranks.device)
        self.objective.begin(model)
        self.plan = make_plan(
            self.config,
            model,
            self.objective,
            self.batch(done),
            self.ranks.device,
            data=describe_data(self.corpora, self.batches.rows),
            epochs=self.batches.rows.epochs(training.steps),
            measure=one_model and training.steps - done >= FEWEST_STEPS,
            may_shrink=self.may_shrink,
        )
        self.config = self.plan.config
        if self.config != asked:
            lines.append(f"memory ran out with {asked.data.micro_batch_rows} rows at a time")
        if self.config.model.residual_precision == "bfloat16" and not uses_bfloat16(
            self.ranks.device, training.precision
        ):
            lines.append("note: residual_precision has no effect, since products are in float32 here")
        if training.compile:
            lines.append("the first step compiles the model, which takes half a minute or so")
        lines += [*self.plan.introduction(self.ranks.describe()), *self.batches.rows.introduction(training.steps)]
        lines += [f"note: {warning}" for warning in self.objective.warnings(self.batches.rows.count)]
        return lines + ([f"this may not fit: {self.plan.obstacle}"] if self.plan.obstacle else [])

    def model(self) -> Model:
        model, training = self.objective.new_model(), self.config.training
        if not training.init_from or self.objective.compares or self.config.reads_images:
            model.initialize(training.seed, output_init=training.output_init)
        if training.init_from:
            load_base(model, self.path)
        if training.compile:
            warnings.filterwarnings("ignore", "TensorFloat32")  # float32 is what the user asked for, or is hardly used
            model.compile_training()
        return model

    def lr_multipliers(self, model: nn.Module) -> dict[str, float]:
        return lr_multipliers(self.config, (name for name, _ in model.named_parameters()))

    def batch(self, step: int) -> Any:
        batch = self.batches.batch(step, self.ranks.rank, self.ranks.world)
        if self.ranks.device.type != "cuda":
            return batch
        with torch.cuda.device(self.ranks.device):  # a thread of its own begins with the first GPU
            return batch.each(Tensor.pin_memory)  # so that its copy to the GPU need not wait for the GPU

    def gradients(self, model: nn.Module, batch: Any, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        if not self.config.training.compile:
            return step_gradients(self.objective, model, batch, self.config, step, self.ranks)
        from torch._dynamo.exc import TorchDynamoException  # two seconds to import

        try:
            return step_gradients(self.objective, model, batch, self.config, step, self.ranks)
        except TorchDynamoException as problem:
            reason = str(problem).strip().partition("\n")[0]
            raise UserError(f"the model could not be compiled: {reason}; --compile false trains without") from problem

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        objective, ranks = self.objective, self.ranks
        line: dict[str, Any] = {
            "validation": validate_readouts(model, self.corpora, self.config, objective=objective, ranks=ranks)
        }
        if line["validation"]:
            line["rows"] = rows_of_validation(self.corpora, self.config)
        if not objective.comparable:
            line["comparable"] = False
        return line, loss_of_readouts(line) if objective.comparable else None

    def remark(self, step: int, line: dict[str, Any], best: Best) -> str:
        before, self.collapsed = self.collapsed, self.objective.collapse(line["validation"], step)
        if self.collapsed and not before:
            return self.collapsed
        if best.worse != OVERFITTING:
            return ""
        what = "images" if self.config.reads_images else "text"
        return (
            f"the validation loss has been rising since step {best.step:,}: the model is overfitting. That step's "
            f"checkpoint is kept; more {what}, dropout or fewer steps would help"
        )

    def progress(self, steps: int) -> dict[str, float]:
        return {"tokens": steps * self.config.data.batch_tokens, "epoch": round(self.batches.rows.epochs(steps), 6)}

    def throughput(self, seconds_per_step: float) -> dict[str, float]:
        speed = self.config.data.batch_tokens / seconds_per_step
        peak = self.plan.machine_rate * self.ranks.world
        images = self.config.data.batch_images
        return {
            **({"images_per_second": round(images / seconds_per_step, 1)} if images else {}),
            "tokens_per_second": round(speed, 1),
            "share_of_peak": round(speed * self.plan.flops_per_token / peak, 4),
        }


def train(config: Config, path: Path, reporter: Reporter, *, accept_changes: bool = False) -> Run:
    """Train ``config`` in the run directory ``path``, or resume the run that is there.

    Under torchrun every process calls it; the first one writes the files and calls ``reporter``.

    Args:
        accept_changes: resume an existing run even if settings that shape its training have changed.

    Raises:
        UserError: the data, the settings and the run directory do not fit together, or training diverged for good.
        SystemExit: stopped by SIGINT or SIGTERM (status 130 or 143), with a checkpoint written.
        OSError: a file could not be written, for example because the disk is full; finished checkpoints are intact.
    """
    done = fit(
        lambda ranks: Pretraining.open(config, path, ranks),
        config.training,
        path,
        reporter,
        accept_changes=accept_changes,
    )
    return Run(path, done)
