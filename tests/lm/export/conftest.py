"""Runs with random weights, and exports of them."""

from __future__ import annotations

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

from lm.export.huggingface import export_huggingface
from lm.kernels import masks
from lm.model.transformer import Transformer
from lm.runs import checkpoint
from lm.runs.checkpoint_writer import snapshot
from lm.runs.directory import Run, open_run, plain_settings

SHAPES = [
    {"num_layers": 1, "hidden_size": 32, "num_heads": 2},
    {"num_layers": 3, "hidden_size": 48, "num_heads": 6, "num_key_value_heads": 2, "tie_embeddings": False},
    {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_key_value_heads": 1, "rope_theta": 50_000.0},
]


def disturbed(model):
    """The model with weights far from their initialization."""
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=draw), alpha=0.1)
    return model


def run_of(config, tokenizer, path) -> Run:
    """A run directory with random weights, far from their initialization."""
    config = config.replace(vocab_size=tokenizer.vocab_size, context_length=256, batch_tokens=256)
    model = disturbed(Transformer(config.model).initialize(1))
    path.mkdir()
    tokenizer.save(path / "tokenizer.json")
    config.save(path / "config.toml")
    state = {"tokenizer_sha256": tokenizer.sha256, "config": plain_settings(config)}
    checkpoint.save(path / "checkpoints", 7, snapshot(model.state_dict()), {}, state)
    return open_run(path)


@pytest.fixture
def make_run(small, dataset, tmp_path):
    return lambda **changes: run_of(small.replace(**changes), dataset.tokenizer, tmp_path / "run")


def export(run: Run, out: Path, readout: str) -> Path:
    """Export the newest checkpoint for transformers; returns ``out``."""
    export_huggingface(run, out, run.newest(), readout)
    return out


def our_logits(run: Run, ids: torch.Tensor, *, bidirectional: bool) -> torch.Tensor:
    model = run.load_model(torch.device("cpu"))
    rows, length = ids.shape
    lo, hi = masks.bidirectional(rows, length) if bidirectional else masks.causal(rows, length)
    positions = torch.arange(length).expand(rows, -1)
    with torch.no_grad():
        return model.logits(model(ids, positions, lo, hi))
