"""A run directory: all that sampling, evaluation and the report need of a trained model.

``config.toml``, ``tokenizer.json``, ``metrics.jsonl``, ``checkpoints/`` and, once made, ``evaluation.json`` and
``report.html``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from data_prep.errors import UserError
from data_prep.files import read_json
from data_prep.tokenizers.load import load_tokenizer
from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.recipes import load_config
from lm.config.settings import Config, all_settings
from lm.model.lora import merge_lora
from lm.model.transformer import Transformer
from lm.runs import checkpoint, metrics_log
from lm.runs.base_weights import starting_trunk
from lm.runs.checkpoint import MODEL, Checkpoint
from lm.runs.checkpoint_writer import load_trained

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Run:
    """An existing run directory; ``open_run`` makes it."""

    path: Path
    config: Config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / "tokenizer.json")

    def latest(self, warn: Callable[[str], None] = warn) -> Checkpoint | None:
        return checkpoint.latest(self.path / CHECKPOINTS, warn)

    def newest(self) -> Checkpoint:
        """The newest good checkpoint; UserError if the run has none yet."""
        found = self.latest()
        if found is None:
            raise UserError(f"{self.path} has no checkpoint yet: train it first, with train.py … --run {self.path}")
        return found

    def checkpoint(self, which: str, warn: Callable[[str], None] = warn) -> Checkpoint:
        """The checkpoint that a person asks for: "newest", "best" (of the validation), or the number of its step.

        A run that was not validated yet has no best one: ``warn`` is told that the newest is taken.

        Raises:
            UserError: it is not there, or damaged.
        """
        newest = self.newest()
        if which == "best" and not newest.best_step:
            warn(f"{self.path} was not validated yet: its newest checkpoint, of step {newest.step:,}, is taken")
        if which == "newest" or (which == "best" and not newest.best_step):
            return newest
        if which != "best" and not which.isdecimal():
            raise UserError(f'there is no checkpoint "{which}": say newest, best, or the number of a step')
        step = newest.best_step if which == "best" else int(which)
        there = checkpoint.steps(self.path / CHECKPOINTS)
        if step not in there:
            best = ", which validated best" if which == "best" else ""
            raise UserError(
                f"{self.path} has no checkpoint of step {step}{best}: there are those of {', '.join(map(str, there))}"
            )
        return checkpoint.of_step(self.path / CHECKPOINTS, step)

    def load_model(self, device: torch.device, saved: Checkpoint | None = None) -> Transformer:
        """The model of a checkpoint (None: the newest good one), ready to be read from.

        Raises:
            UserError: the checkpoint was trained with another model or tokenizer than the run directory says, or the
                run answers a task.
        """
        if self.config.has_task_head:
            raise UserError(
                f"{self.path} is fine-tuned for {self.config.finetune.task} and is no language model now: "
                "kindling predict asks it for its answers, kindling merge --trunk-only makes a plain run of it"
            )
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
                model.load_state_dict(saved.model(), assign=True)
        except RuntimeError as error:
            raise UserError(f"checkpoint {saved.path} does not fit config.toml: {error}".split("\n")[0]) from None
        return model.to(device).eval()

    def plain_weights(self) -> Path:
        """The file with the run's newest weights, all of them.

        Raises:
            UserError: it has a task's head, or additions by LoRA, or no checkpoint.
        """
        if self.config.has_task_head or (self.config.is_finetuning and self.config.finetune.method != "full"):
            raise UserError(f"{self.path} is itself fine-tuned: kindling merge makes a plain run of it")
        return self.newest().path / checkpoint.MODEL

    def refuse_another(self, saved: Checkpoint) -> None:
        """UserError if a checkpoint was trained with another model or tokenizer than the run directory says."""
        model = {setting.name for setting in all_settings() if setting.section == "model"}
        if edited := {name: values for name, values in changes(saved, self.config).items() if name in model}:
            told = ", ".join(f"{name} {there!r} (config.toml: {here!r})" for name, (there, here) in edited.items())
            raise UserError(f"checkpoint {saved.path} does not fit config.toml: it was trained with {told}")
        if saved.state["tokenizer_sha256"] != self.tokenizer.sha256:
            raise UserError(
                f"checkpoint {saved.path} was trained with another tokenizer than {self.path}/tokenizer.json"
            )

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl (``lm.runs.metrics_log``)."""
        return metrics_log.read(self.path / METRICS)


def changes(saved: Checkpoint, config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that a checkpoint was not trained with as ``config`` has them: its value and that of ``config``."""
    trained, now = saved.state["config"], plain_settings(config)
    return {n: (trained[n], now[n]) for n in now if n in trained and trained[n] != now[n]}


def plain_settings(config: Config) -> dict[str, Any]:
    """Every setting by its name, as JSON gives it back."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in config.flat().items()}


def open_run(path: str | Path) -> Run:
    """Open a run directory.

    Raises:
        UserError: there is no such directory, or it is not one of a run.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"there is no run directory {path}: train.py makes one")
    if not (path / "config.toml").is_file():
        raise UserError(f"{path} is not a run directory: it has no config.toml")
    return Run(path, load_config(path / "config.toml"))


RESULT = "evaluation.json"


def saved_evaluation(run: Run, checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What ``evaluate`` found, if this checkpoint is what it was last asked for and the file is whole."""
    try:
        known: dict[str, Any] = read_json(run.path / RESULT)
        return known if known["checkpoint"] == checkpoint.state["sha256"][MODEL] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
