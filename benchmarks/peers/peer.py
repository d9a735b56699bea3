"""What ``benchmarks.vs_peers`` needs of a system that it trains."""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from data_prep.errors import UserError
from lm.config.settings import Config, all_settings
from lm.data.corpora import Corpora
from lm.model.device import autocast, uses_bfloat16


@dataclass
class Peer(ABC):
    """A system: how it trains on ``corpora`` in the shape of ``config``.

    ``checkout`` is the folder of its code, None for an installed package.

    Attributes:
        objective: Kindling's objective with the same readouts.
        rates: the learning rates that are tried, in the system's own units.
        sections: of the recipe, those that it takes its settings from.
        changes: what the driver does differently from the system's own scripts.
    """

    corpora: Corpora
    config: Config
    checkout: Path | None = None

    objective: ClassVar[str]
    rates: ClassVar[tuple[float, ...]]
    sections: ClassVar[tuple[str, ...]] = ("model", "data")
    changes: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def train(self, rate: float, seed: int, steps: int) -> tuple[Any, list[float]]:
        """A new model after ``steps`` steps, and the CPU seconds of this process before the first and after each."""

    @property
    def settings(self) -> dict[str, Any]:
        """What it takes from the recipe, where that is not the default."""
        values, defaults = self.config.flat(), Config().flat()
        own = (each.name for each in all_settings() if each.section in self.sections and each.name != "data")
        return {name: values[name] for name in own if values[name] != defaults[name]}

    @property
    def bfloat16(self) -> bool:
        """Whether the products of training steps are in bfloat16: by the recipe's ``precision``, for all systems."""
        return uses_bfloat16(torch.device("cpu"), self.config.training.precision)

    def autocast(self) -> AbstractContextManager[object]:
        """A context for the forward pass of a training step."""
        return autocast(torch.device("cpu"), self.config.training.precision, training=True)

    def tokens_of_step(self, step: int, steps: int) -> int:
        """How many tokens step number ``step`` reads."""
        return self.config.data.batch_tokens

    def parameters(self, model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    @property
    def versions(self) -> dict[str, str]:
        """The commit of the checkout."""
        if self.checkout is None:
            return {}
        found = subprocess.run(["git", "-C", self.checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
        return {"commit": found.stdout.strip() or "unknown"}

    @property
    def vocab_size(self) -> int:
        return self.corpora.processor.vocab_size

    def documents(self) -> Iterator[NDArray[np.int64]]:
        """The tokens of each training document, without the end of text."""
        split, start = self.corpora.datasets[0].split("train"), 0
        for length in split.document_lengths().tolist():
            yield split.read(start, start + length - 1).astype(np.int64)
            start += length


class OtherPeer(Peer):
    """A system with a model of its own, which ``benchmarks.peers.reading`` reads by these two methods."""

    @abstractmethod
    def states(self, model: Any, tokens: Tensor, lengths: Tensor, causal: bool) -> Tensor:
        """Hidden states (texts, T, hidden_size) of texts (texts, T) that are padded behind ``lengths``."""

    @abstractmethod
    def logits(self, model: Any, states: Tensor) -> Tensor:
        """Scores (n, at least the vocabulary) of some states, (n, width)."""


class Clock:
    """CPU seconds of all threads of this process, before the first step and after each."""

    def __init__(self) -> None:
        self.times = [time.process_time()]

    def step(self) -> None:
        self.times.append(time.process_time())


def file_of(checkout: Path | None, url: str, name: str) -> Path:
    """A file of a checkout; UserError if it is not there."""
    if checkout is None or not (checkout / name).is_file():
        where = "no --checkout was given" if checkout is None else f"{checkout / name} does not exist"
        raise UserError(f"this peer runs its own code, but {where}: git clone {url}, and name its folder by --checkout")
    return checkout / name


def load_file(file: Path) -> ModuleType:
    """Import one file that imports nothing of its neighbors."""
    spec = importlib.util.spec_from_file_location(f"peer_{file.stem}", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _run(file, lambda: spec.loader.exec_module(module))
    return module


def load_package(folder: Path, names: Sequence[str]) -> list[ModuleType]:
    """Import modules of a package in a folder."""
    found: list[ModuleType] = []
    sys.path.insert(0, str(folder))
    try:
        _run(folder, lambda: found.extend(map(importlib.import_module, names)))
    finally:
        sys.path.remove(str(folder))
    return found


def _run(path: Path, work: Any) -> None:
    try:
        work()
    except ImportError as problem:
        raise UserError(f"{path} needs the package {problem.name}: pip install {problem.name}") from problem
