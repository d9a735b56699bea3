"""Kindling's own training, by the recipe."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from time import process_time
from typing import Any

import torch

from benchmarks.peers.peer import Peer
from lm.runs.directory import open_run
from lm.training.pretraining import train
from lm.training.reporter import NullReporter

ROOT = Path(__file__).resolve().parents[2]


class StepTimes(NullReporter):
    """CPU seconds of this process at ``begin`` and when each step is logged.

    The last step is logged before its validation and checkpoint, which the other systems' times do not include either.
    """

    def __init__(self) -> None:
        self.times: list[float] = []

    def begin(self, done: int, total: int) -> None:
        self.times = [process_time()]

    def metrics(self, line: dict[str, Any]) -> None:
        if "validation" not in line:
            self.times.append(process_time())


class Kindling(Peer):
    """The recipe with its objective; ``rate`` is a factor on its learning rates."""

    objective = ""  # that of the recipe
    rates = (1.0,)
    sections = ("model", "data", "objective", "optimizer")

    @property
    def versions(self) -> dict[str, str]:
        found = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True)
        return {"commit": found.stdout.strip() or "unknown"}

    def train(self, rate: float, seed: int, steps: int) -> tuple[Any, list[float]]:
        optimizer, times = self.config.optimizer, StepTimes()
        rates = {name: getattr(optimizer, name) * rate for name in ("learning_rate", "muon_learning_rate")}
        rare = {"validate_every": steps, "checkpoint_every": steps, "log_every": 1}
        config = self.config.replace(steps=steps, seed=seed, **rare, **(rates if rate != 1 else {}))
        with tempfile.TemporaryDirectory() as folder:
            train(config, Path(folder) / "run", times)
            return open_run(Path(folder) / "run").load_model(torch.device("cpu")), times.times
