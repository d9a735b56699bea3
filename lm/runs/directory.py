"""A run directory: everything that sampling, evaluation and the report need of a trained model.

``config.toml``, ``tokenizer.json`` (or another processor), ``metrics.jsonl``, ``checkpoints/`` and, once they exist,
``evaluation.json`` and ``report.html``.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch

from data_prep.errors import UserError
from data_prep.errors.command_names import command
from data_prep.files import LOCK, read_json, sha256_of_file, write_atomically
from data_prep.shards.images import ImageFormat
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.recipes import require_image_model, require_text_model, run_config
from lm.config.settings import Config, all_settings
from lm.model.image_transformer import ImageTransformer
from lm.model.lora import merge_lora
from lm.model.transformer import Transformer
from lm.runs import checkpoint, metrics_log
from lm.runs.base_weights import starting_trunk
from lm.runs.checkpoint import Checkpoint
from lm.runs.checkpoint_writer import load_trained

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
TOKENIZER, PROCESSOR = "tokenizer.json", "processor.json"
ANSWERS = "answers.json"  # of a task's head


class Processor(Protocol):
    """What turns raw data into model inputs: a tokenizer, or for example the preprocessing of images.

    ``file_name`` is its file in the run directory, ``TOKENIZER`` or ``PROCESSOR``, and ``sha256`` the file's hash.
    """

    @property
    def file_name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    def save(self, path: Path) -> None: ...


@dataclass(frozen=True)
class ProcessorFile:
    """A processor that is no tokenizer, as saved in a run directory."""

    path: Path

    @property
    def file_name(self) -> str:
        return self.path.name

    @cached_property
    def sha256(self) -> str:
        return sha256_of_file(self.path)


def sha256_key(file_name: str) -> str:
    """The key of a processor's hash in a checkpoint's state: ``tokenizer_sha256`` for ``tokenizer.json``."""
    return f"{Path(file_name).stem}_sha256"


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Run:
    """An existing run directory; ``open_run`` opens one."""

    path: Path
    config: Config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The run's tokenizer; UserError if it has none."""
        if not (self.path / TOKENIZER).is_file():
            raise UserError(f"{self.path} has no {TOKENIZER}: it cannot read or write text")
        return load_tokenizer(self.path / TOKENIZER)

    @cached_property
    def image_format(self) -> ImageFormat:
        """How the run makes model inputs of pictures; UserError if its file is missing or damaged."""
        return ImageFormat.load(self.path / PROCESSOR)

    @cached_property
    def processor(self) -> Tokenizer | ProcessorFile:
        """The run's tokenizer, or the file of its other processor."""
        other = self.path / PROCESSOR
        return ProcessorFile(other) if other.is_file() else self.tokenizer

    def latest(self, warn: Callable[[str], None] = warn) -> Checkpoint | None:
        return checkpoint.latest(self.path / CHECKPOINTS, warn)

    def newest(self) -> Checkpoint:
        """The newest checkpoint that is not damaged; UserError if the run has none yet."""
        found = self.latest()
        if found is None:
            raise UserError(
                f"{self.path} has no checkpoint yet: train it first, with {command('train')} … --run {self.path}"
            )
        return found

    def checkpoint(self, which: str, warn: Callable[[str], None] = warn) -> Checkpoint:
        """Return a checkpoint by name: "newest", "best" (of the validation), "average", or the number of its step.

        "average" is the newest one with the mean of the weights over the last steps (``average_last``) in the place of
        its weights; so is the best one if that mean was validated best. A run that was not validated yet has no best
        one: the newest is returned, after a message to ``warn``.

        Raises:
            UserError: it is missing or damaged.
        """
        named, there = which in ("newest", "best", "average"), checkpoint.steps(self.path / CHECKPOINTS)
        if not named and not (which.isdecimal() and len(which) < 19):
            raise UserError(f'there is no checkpoint "{which}": choose newest, best, average, or the number of a step')
        if there and not named:  # before all bytes of the newest one are read
            self._require_step(int(which), there)
        newest = self.newest()
        if which == "average":
            if not newest.has_average:
                raise UserError(
                    f"{self.path} has no average of its weights at step {newest.step:,}: average_last, for example "
                    "0.2, keeps one over that share of the steps, the last ones"
                )
            return newest.average()
        if which == "best" and not newest.best_step:
            warn(f"{self.path} was not validated yet: using its newest checkpoint, step {newest.step:,}")
        if which == "newest" or (which == "best" and not newest.best_step):
            return newest
        step = newest.best_step if which == "best" else int(which)
        self._require_step(step, there, ", the best one" if which == "best" else "")
        found = checkpoint.of_step(self.path / CHECKPOINTS, step)
        return found.average() if which == "best" and newest.best_is_average else found

    def _require_step(self, step: int, there: list[int], which: str = "") -> None:
        if step not in there:
            raise UserError(
                f"{self.path} has no checkpoint of step {step}{which}: available are {', '.join(map(str, there))}"
            )

    def load_model(self, device: torch.device, saved: Checkpoint | None = None) -> Transformer:
        """The model of a checkpoint (None: the newest one), on ``device`` and in evaluation mode.

        Raises:
            UserError: the checkpoint does not match the run directory's model or processor, or the run has a task's
                head instead of a language model's.
        """
        require_text_model(self.path, self.config)
        saved = saved or self.newest()
        self.refuse_another(saved)
        try:
            if self.config.is_finetuning:
                model = starting_trunk(self.config, self.path)
                load_trained(model, saved.model())
                merge_lora(model)
            else:
                with torch.device("meta"):
                    model = Transformer(self.config.model)
                weights = saved.model()
                model.load_state_dict({k: weights[k] for k in weights if not k.startswith("projector.")}, assign=True)
        except RuntimeError as error:
            raise UserError(f"checkpoint {saved.path} does not fit config.toml: {error}".split("\n")[0]) from None
        return model.to(device).eval()

    def load_image_model(
        self,
        device: torch.device,
        saved: Checkpoint | None = None,
        with_head: Callable[[], ImageTransformer] | None = None,
    ) -> ImageTransformer:
        """The model of an image run; arguments and errors as of ``load_model``.

        ``with_head`` makes a model with the head of the run's objective (its ``new_model``); None: without a head.
        """
        require_image_model(self.path, self.config)
        saved = saved or self.newest()
        self.refuse_another(saved)
        with torch.device("meta"):
            model = with_head() if with_head else ImageTransformer(self.config.model)
        weights = {name: weight for name, weight in saved.model().items() if with_head or not name.startswith("head.")}
        try:
            model.load_state_dict(weights, assign=True)
        except RuntimeError as error:
            raise UserError(f"checkpoint {saved.path} does not fit config.toml: {error}".split("\n")[0]) from None
        return model.to(device).eval()

    def plain_weights(self, which: str = "newest") -> Path:
        """The file with all weights of ``checkpoint(which)``; UserError also if the run has a task's head or LoRA."""
        if self.config.has_task_head or (self.config.is_finetuning and self.config.finetune.method != "full"):
            raise UserError(f"{self.path} is itself fine-tuned: make it a plain run with kindling merge")
        return self.checkpoint(which).weights_file()

    def refuse_another(self, saved: Checkpoint) -> None:
        """Raise UserError if a checkpoint does not match the run directory's model or processor."""
        model = {setting.name for setting in all_settings() if setting.section == "model"}
        if edited := {name: values for name, values in changes(saved, self.config).items() if name in model}:
            values = ", ".join(f"{name} {there!r} (config.toml: {here!r})" for name, (there, here) in edited.items())
            raise UserError(f"checkpoint {saved.path} does not fit config.toml: it was trained with {values}")
        file = self.path / self.processor.file_name
        if saved.state.get(sha256_key(file.name)) != self.processor.sha256:
            raise UserError(f"checkpoint {saved.path} was trained with another {file.stem} than {file}")

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl (``lm.runs.metrics_log``)."""
        return metrics_log.read(self.path / METRICS)


def changes(saved: Checkpoint, config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings in which a checkpoint and ``config`` differ, each with both values, the checkpoint's first."""
    trained, now = saved.state["config"], plain_settings(config)
    return {n: (trained[n], now[n]) for n in now if n in trained and trained[n] != now[n]}


def plain_settings(config: Config) -> dict[str, Any]:
    """Every setting by name, as it is read back from JSON (lists for tuples)."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.flat().items()}


def open_run(path: str | Path) -> Run:
    """Open a run directory; errors as of ``lm.config.recipes.run_config``."""
    return Run(Path(path), run_config(path))


def adopt(other: Path, path: Path) -> None:
    """Make ``path`` the run that is in ``other``, which is removed; if that is interrupted, it can be repeated."""
    settings = other / "config.toml"  # last: it is what makes a folder a run directory
    shutil.copytree(
        other, path, ignore=shutil.ignore_patterns(settings.name, LOCK), copy_function=_linked, dirs_exist_ok=True
    )
    write_atomically(path / settings.name, settings.read_text(encoding="utf-8"))
    shutil.rmtree(other)


def _linked(source: str, target: str) -> None:
    Path(target).unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


RESULT = "evaluation.json"


def saved_evaluation(run: Run, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The result of the last ``evaluate``, if it is of this checkpoint and the file is intact."""
    try:
        known: dict[str, Any] = read_json(run.path / RESULT)
        return known if known["checkpoint"] == checkpoint.weights_sha256 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
