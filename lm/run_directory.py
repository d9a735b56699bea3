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
from data_prep.tokenizers import Tokenizer
from lm import checkpoint, metrics
from lm.config import Config
from lm.model import Transformer
from lm.recipes import load_config

METRICS = "metrics.jsonl"


def warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)


@dataclass(frozen=True)
class Run:
    """An existing run directory; ``open_run`` makes it."""

    path: Path
    config: Config

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.load(self.path / "tokenizer.json")

    def latest(self, warn: Callable[[str], None] = warn) -> checkpoint.Checkpoint | None:
        return checkpoint.latest(self.path / "checkpoints", warn)

    def newest(self) -> checkpoint.Checkpoint:
        """The newest good checkpoint; UserError if the run has none yet."""
        found = self.latest()
        if found is None:
            raise UserError(f"{self.path} has no checkpoint yet: train it first, with train.py … --run {self.path}")
        return found

    def load_model(self, device: torch.device, saved: checkpoint.Checkpoint | None = None) -> Transformer:
        """The model of a checkpoint (None: the newest good one), ready to be read from."""
        saved = saved or self.newest()
        with torch.device("meta"):
            model = Transformer(self.config.model)
        try:
            model.load_state_dict(saved.model(), assign=True)
        except RuntimeError as error:
            raise UserError(f"checkpoint {saved.path} does not fit config.toml: {error}".split("\n")[0]) from None
        return model.to(device).eval()

    def metrics(self) -> Iterator[dict[str, Any]]:
        """The lines of metrics.jsonl (``lm.metrics``)."""
        return metrics.read(self.path / METRICS)


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


def choose_device(name: str) -> torch.device:
    """The device that a setting asks for; "auto" is a GPU if there is one. UserError if it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(device for device, there in available.items() if there)
    if not available[name]:
        raise UserError(f"device {name} was asked for, but PyTorch {torch.__version__} sees none here")
    return torch.device(name)
