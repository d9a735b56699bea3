"""Pretraining, as the work that ``lm.training.trainer`` carries out: learn an objective from corpora of tokens."""

from __future__ import annotations

import dataclasses
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from data_prep.errors import UserError
from lm.config.recipes import load_config
from lm.config.settings import Config
from lm.data.batch import Batch
from lm.data.corpora import Corpora, open_corpora, with_vocabulary
from lm.model.transformer import Transformer
from lm.objectives.batches import TrainingBatches
from lm.runs.base_weights import keep_base, kept_base, load_base
from lm.runs.directory import Run, open_run
from lm.runs.metrics_log import OVERFITTING, Best, loss_of_readouts
from lm.training.distributed import Ranks
from lm.training.gradients import step_gradients
from lm.training.plan import FEWEST_STEPS, make_plan, settle_micro_batch, told_data
from lm.training.reporter import Reporter
from lm.training.trainer import carry_out
from lm.training.validation import rows_of_validation, validate_readouts


class Pretraining:
    """Pretraining as a ``TrainModule``, in the run ``path``; ``may_shrink``: its micro-batch was not asked for."""

    def __init__(self, config: Config, path: Path, corpora: Corpora, ranks: Ranks, *, may_shrink: bool = False) -> None:
        self.config, self.path, self.corpora, self.ranks, self.may_shrink = config, path, corpora, ranks, may_shrink
        self.start: Path | None = None  # the weights it begins with, if they are another run's
        self.batches = TrainingBatches(corpora, config)
        self.batches.check_ranks(ranks.world)
        self.name, self.tokenizer, self.fingerprint = corpora.name, corpora.tokenizer, corpora.fingerprint

    @classmethod
    def open(cls, config: Config, path: Path, ranks: Ranks) -> Pretraining:
        """Open the data and settle what the settings leave open, as one for all ranks; ``path`` is the run directory.

        Raises:
            UserError: the data is missing or damaged, or does not fit the settings.
        """
        if config.training.compile and ranks.world > 1:
            raise UserError("several processes train without compiling: leave out --compile")
        corpora = open_corpora(config.data.data)
        if config.data.verify_data:
            ranks.on_main(corpora.verify)
        config = ranks.on_main(partial(with_vocabulary, config, corpora))
        before = load_config(path / "config.toml") if (path / "config.toml").is_file() else None
        may_shrink = not config.data.micro_batch_rows and ranks.world == 1
        work = cls(config, path, corpora, ranks, may_shrink=may_shrink)
        if config.training.init_from:
            work.start = ranks.on_main(work._find_start)
        work.config = ranks.on_main(partial(settle_micro_batch, config, ranks.device, before))
        return work

    def _find_start(self) -> Path:
        """The weights to begin with. UserError if the run that has them has another shape or tokenizer."""
        if kept := kept_base(self.path):
            return kept
        start = open_run(self.config.training.init_from)
        if dataclasses.replace(start.config.model, dropout=0.0) != dataclasses.replace(self.config.model, dropout=0.0):
            raise UserError(
                f"{start.path} has a model of another shape: leave the recipe out, and the shape is its own"
            )
        if start.tokenizer.sha256 != self.tokenizer.sha256:
            raise UserError(
                f"{self.name} was made with another tokenizer than {start.path}: "
                f"prepare it with --tokenizer {start.path}/tokenizer.json"
            )
        return start.plain_weights()

    def prepare(self, done: int) -> list[str]:
        """Plan the run after a dry step on weights that are drawn or read afterwards; fewer rows if memory runs out."""
        told, training, asked = [], self.config.training, self.config
        if self.start:
            told.append(f"from the weights of {training.init_from}")
            self.ranks.on_main(partial(keep_base, self.start, self.path))
        one_model = self.ranks.world == 1 or training.parallel == "ddp"
        self.plan = make_plan(
            self.config,
            Transformer(self.config.model).initialise(training.seed).to(self.ranks.device),
            self.batch(done),
            self.ranks.device,
            data=told_data(self.corpora, self.batches),
            epochs=self.batches.epochs(training.steps),
            measure=one_model and training.steps - done >= FEWEST_STEPS,
            may_shrink=self.may_shrink,
        )
        self.config = self.plan.config
        if self.config != asked:
            told.append(f"memory ran out with {asked.data.micro_batch_rows} rows at a time")
        if training.compile:
            told.append("the first step compiles the model, which takes half a minute or so")
        told += [*self.plan.introduction(self.ranks.describe()), *self.batches.introduction(training.steps)]
        return told + ([f"this may not fit: {self.plan.obstacle}"] if self.plan.obstacle else [])

    def model(self) -> Transformer:
        model = Transformer(self.config.model)
        if self.config.training.init_from:
            load_base(model, self.path)
        else:
            model.initialise(self.config.training.seed)
        if self.config.training.compile:
            warnings.filterwarnings("ignore", "TensorFloat32")  # float32 is what was asked for, or is hardly used
            model.compile_training()
        return model

    def lr_multipliers(self, model: nn.Module) -> dict[str, float]:
        return {}

    def batch(self, step: int) -> Batch:
        return self.batches.batch(step, self.ranks.rank, self.ranks.world)

    def gradients(self, model: nn.Module, batch: Batch, step: int) -> tuple[dict[str, Tensor], dict[str, float]]:
        assert isinstance(model, Transformer)
        if not self.config.training.compile:
            return step_gradients(model, batch, self.config, step, self.ranks)
        from torch._dynamo.exc import TorchDynamoException  # two seconds to import

        try:
            return step_gradients(model, batch, self.config, step, self.ranks)
        except TorchDynamoException as problem:
            reason = str(problem).strip().partition("\n")[0]
            raise UserError(f"the model could not be compiled: {reason}; --compile false trains without") from problem

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], float | None]:
        assert isinstance(model, Transformer)
        results = validate_readouts(model, self.corpora, self.config, ranks=self.ranks)
        line: dict[str, Any] = {"validation": {name: result.as_dict() for name, result in results.items()}}
        if results:
            line["rows"] = rows_of_validation(self.corpora, self.config)
        return line, loss_of_readouts(line)

    def remark(self, best: Best) -> str:
        if best.worse != OVERFITTING:
            return ""
        return (
            f"the validation loss has been rising since step {best.step:,}: the model begins to know its text by "
            f"heart. That step's checkpoint is kept; more text, dropout or fewer steps would help"
        )

    def should_stop(self, best: Best) -> bool:
        return False

    def progress(self, steps: int) -> dict[str, float]:
        return {"tokens": steps * self.config.data.batch_tokens, "epoch": round(self.batches.epochs(steps), 6)}

    def throughput(self, seconds_per_step: float) -> dict[str, float]:
        speed = self.config.data.batch_tokens / seconds_per_step
        peak = self.plan.machine_rate * self.ranks.world
        return {
            "tokens_per_second": round(speed, 1),
            "share_of_peak": round(speed * self.plan.flops_per_token / peak, 4),
        }


def train(config: Config, path: Path, reporter: Reporter, *, accept_changes: bool = False) -> Run:
    """Train ``config`` in the run directory ``path``, or go on with the run that is there.

    Under torchrun every process calls it; the first one writes the files and talks to ``reporter``.

    Args:
        accept_changes: continue an existing run although settings that shape its training have changed.

    Raises:
        UserError: the data, the settings and the run directory do not fit together, or the loss is no longer finite.
        SystemExit: stopped by SIGINT or SIGTERM (status 130 or 143), with a checkpoint written.
        OSError: a file could not be written (the disk is full, say); finished checkpoints are untouched.
    """
    done = carry_out(
        lambda ranks: Pretraining.open(config, path, ranks),
        config.training,
        path,
        reporter,
        accept_changes=accept_changes,
    )
    return Run(path, done)
