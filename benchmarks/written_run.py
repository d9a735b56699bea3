"""A run made of weights that no training wrote, to measure what reads runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from data_prep.tokenizers.tokenizer import Tokenizer
from lm.config.settings import Config
from lm.runs import checkpoint
from lm.runs.directory import Run, open_run, plain_settings


def written_run(folder: Path, tokenizer: Tokenizer, config: Config, weights: Mapping[str, Tensor]) -> Run:
    """A run in a new folder whose only checkpoint has these weights."""
    folder.mkdir()
    tokenizer.save(folder / "tokenizer.json")
    config.save(folder / "config.toml")
    state = {"tokenizer_sha256": tokenizer.sha256, "config": plain_settings(config), "data_fingerprint": ""}
    checkpoint.save(folder / "checkpoints", 1, weights, {}, state)
    return open_run(folder)
